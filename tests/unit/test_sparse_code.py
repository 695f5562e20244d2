"""Entries of a sparse code: which are selected, and that compiled loops and torch's operations agree on them."""

from __future__ import annotations

import pytest
import torch
from small_dictionaries import random_rows

from rlsae.sae import compiled, dense_code, sparse_code

NAN, INFINITY = float("nan"), float("inf")


def dense(code, pre_BF):
    """The code as a matrix."""
    return torch.zeros_like(pre_BF).index_put_((code.row_N, code.latent_N), code.value_N, accumulate=True)


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both ways to the same results."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "serves", lambda values: False)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- the largest of each row -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 40, 90, 130])
@pytest.mark.parametrize("latents", [130, 8 * 17])
def test_the_largest_of_each_row_are_those_of_a_sort(path, threads, latents, k):
    pre_BF = random_rows(50, latents)
    value_BK = pre_BF.relu().sort(dim=1, descending=True).values[:, :k]
    wanted_BF = torch.where(pre_BF >= value_BK[:, -1:], pre_BF.relu(), 0)
    code = sparse_code.largest_of_rows(pre_BF, k)
    assert torch.equal(dense(code, pre_BF), wanted_BF)
    assert code.first_R.tolist() == list(range(0, 50 * k, k))


def test_a_k_above_the_number_of_latents_keeps_all(path):
    pre_BF = random_rows(4, 6)
    assert torch.equal(dense(sparse_code.largest_of_rows(pre_BF, 10), pre_BF), pre_BF.relu())


def test_no_row_is_too_uneven_for_the_search(path):
    pre_BF = torch.zeros(4, 640)
    pre_BF[0, ::64] = torch.arange(1.0, 11)  # all large ones in one group of latents
    pre_BF[1] = torch.arange(640.0)
    pre_BF[2] = -torch.arange(640.0)
    pre_BF[3, 7] = 1e-40
    kept_BF = dense(sparse_code.largest_of_rows(pre_BF, 8), pre_BF)
    assert kept_BF[0].nonzero().view(-1).tolist() == list(range(128, 640, 64))
    assert kept_BF[1].nonzero().view(-1).tolist() == list(range(632, 640))
    assert not kept_BF[2].any()
    assert kept_BF[3].nonzero().view(-1).tolist() == [7]


def test_of_equal_values_as_many_as_fit_are_kept():
    pre_BF = torch.ones(3, 200)
    pre_BF[1, 150:] = 2.0
    kept_BF = dense(sparse_code.largest_of_rows(pre_BF, 60), pre_BF)
    assert (kept_BF > 0).sum(1).tolist() == [60, 60, 60]
    assert (kept_BF[1, 150:] == 2).all()


@pytest.mark.parametrize("value", [NAN, -NAN, INFINITY], ids=["NaN", "-NaN", "infinity"])
def test_what_is_not_finite_is_never_dropped(path, value):
    pre_BF = random_rows(8, 200)
    pre_BF[3, 70] = value
    rows = sparse_code.largest_of_rows(pre_BF, 5)
    batch = sparse_code.largest_of_batch(pre_BF, 40, last_cut=1.0 if path == "compiled" else 0.0)
    for code in (rows, batch):
        assert torch.isfinite(dense(code, pre_BF)).logical_not().nonzero().tolist() == [[3, 70]]


# --- the largest of a batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [0.0, 0.5, 1.0, 1.2, 100.0], ids=lambda share: f"guess at {share} of the cut")
def test_the_largest_of_a_batch_are_found_whatever_the_guess(path, threads, guess):
    pre_BF, count = random_rows(64, 50), 300
    cut = pre_BF.flatten().topk(count).values[-1].item()
    code = sparse_code.largest_of_batch(pre_BF, count, guess * cut)
    assert torch.equal(dense(code, pre_BF), torch.where(pre_BF >= cut, pre_BF, 0))
    assert code.first_R.tolist() == [(code.row_N < row).sum() for row in range(64)]


def test_a_good_guess_spares_a_second_look(monkeypatch):
    pre_BF = random_rows(64, 50)
    cut = pre_BF.flatten().topk(300).values[-1].item()
    looks = []
    by_blocks = compiled._by_blocks
    monkeypatch.setattr(compiled, "_by_blocks", lambda loop, *rest: (looks.append(loop), by_blocks(loop, *rest))[1])
    sparse_code.largest_of_batch(pre_BF, 300, cut)
    assert looks.count(compiled._count_reaching) == 1
    sparse_code.largest_of_batch(pre_BF, 300, 100 * cut)
    assert looks.count(compiled._count_reaching) == 3


def test_of_equal_values_of_a_batch_as_many_as_fit_are_kept():
    assert len(sparse_code.largest_of_batch(torch.ones(30, 20), 47, last_cut=1.0).value_N) == 47


def test_a_batch_with_fewer_positive_values_than_it_may_keep_keeps_them_all(path):
    pre_BF = -random_rows(8, 20).abs()
    pre_BF[2, 3], pre_BF[5, 7] = 0.5, 0.25
    code = sparse_code.largest_of_batch(pre_BF, 40, last_cut=0.1)
    assert torch.equal(dense(code, pre_BF), pre_BF.relu())


# --- products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [2**18, 32], ids=["whole rows", "by stretches of channels"])
def test_products_of_a_sparse_code_are_those_of_a_dense_one(monkeypatch, cached):
    monkeypatch.setattr(sparse_code, "CACHED", cached)
    rows, latents, channels = 40, 30, 100
    pre_BF, W_FD, grad_BD = random_rows(rows, latents), random_rows(latents, channels, 1), random_rows(rows, channels, 2)
    code = sparse_code.largest_of_rows(pre_BF, 9)
    torch.testing.assert_close(code.decode(W_FD), dense(code, pre_BF) @ W_FD)
    torch.testing.assert_close(code.products(grad_BD, W_FD), (grad_BD @ W_FD.T)[code.row_N, code.latent_N])
    order_N, first_F = code.by_latent(latents)
    sums_FD = sparse_code.sum_by_latent(order_N, first_F, code.row_N, code.value_N, grad_BD)
    torch.testing.assert_close(sums_FD, dense(code, pre_BF).T @ grad_BD)


def test_entries_of_a_latent_keep_the_order_of_their_rows():
    code = sparse_code.largest_of_rows(random_rows(40, 30), 9)
    order_N, first_F = code.by_latent(30)
    assert torch.equal(order_N, torch.sort(code.latent_N, stable=True).indices)
    assert first_F.tolist() == [(code.latent_N < latent).sum() for latent in range(30)]


# --- dense codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_code_is_rectified_and_summed_in_one_pass(path, threads, dtype):
    pre_BF, grad_BF = random_rows(50, 33).to(dtype), random_rows(50, 33, 1).to(dtype)
    b_F, shared_F = random_rows(2, 33, 2)
    wanted_BF = (pre_BF.float() + b_F).relu()
    sum_F, active = dense_code.relu_(pre_BF, b_F)
    assert torch.equal(pre_BF, wanted_BF.to(dtype))
    assert active == (wanted_BF > 0).sum()
    loose = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
    torch.testing.assert_close(sum_F, wanted_BF.sum(0), **loose)

    wanted_BF = (grad_BF.float() + shared_F) * (pre_BF > 0)
    sum_F = dense_code.relu_backward_(grad_BF, pre_BF, shared_F)
    assert torch.equal(grad_BF, wanted_BF.to(dtype))
    torch.testing.assert_close(sum_F, wanted_BF.sum(0), **loose)


def test_what_is_not_finite_stays_so_in_a_dense_code(path):
    for dtype in (torch.float32, torch.bfloat16):
        pre_BF = torch.tensor([[NAN, -NAN, INFINITY, -INFINITY, 3.39e38]], dtype=dtype)
        dense_code.relu_(pre_BF, torch.zeros(5))
        assert pre_BF.isnan().tolist() == [[True, True, False, False, False]]
        assert pre_BF[0, 2:4].tolist() == [INFINITY, 0]
