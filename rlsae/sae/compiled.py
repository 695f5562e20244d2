"""Loops over a batch of latents on the CPU for which torch has no single operation, compiled once per machine by numba.

As many threads as torch has take a block of rows each. Positive values are compared as the whole numbers that their bits make,
which have the same order. NaN counts as the largest, so that the loss shows it. Shapes: B rows, F latents, K entries of a row,
N entries of a batch, G groups of latents, S values that may be among the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

NAN = np.int32(2**31 - 1)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

Values = NDArray[np.float32]
Keys = NDArray[np.int32]
Places = NDArray[np.int64]
Flags = NDArray[np.uint8]
Halves = NDArray[np.uint16]


def serves(values: Tensor) -> bool:
    """Whether these loops can read them. bfloat16 goes to `relu_` and `relu_backward_` alone."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.bfloat16)


def largest_of_rows(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest positive values of each row and their latents [B, K]; a row that has fewer ends with zeros."""
    rows, latents = pre_BF.shape
    value_BK, latent_BK = torch.zeros(rows, k), torch.zeros(rows, k, dtype=torch.int64)
    groups = min(latents, max(64, 2 * k))
    _by_blocks(_largest_of_rows, rows, pre_BF.numpy(), groups, value_BK.numpy(), latent_BK.numpy())
    return value_BK, latent_BK


def largest_of_batch(pre_BF: Tensor, count: int, guess: float) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest positive values of a batch, or all if it has fewer, with their latents and rows [N].

    Args:
        guess: a value that is perhaps not above the smallest of them; it decides the time and not the result.
    """
    rows, pre, bound = len(pre_BF), pre_BF.numpy(), np.float32(max(guess, SMALLEST))
    found_B = np.empty(rows, np.int64)
    _by_blocks(_count_reaching, rows, pre, bound, found_B)
    if guess > 0 and found_B.sum() < count:
        return largest_of_batch(pre_BF, count, 0.0)
    end_B = found_B.cumsum()
    key_S, value_S = np.empty(end_B[-1], np.int32), np.empty(end_B[-1], np.float32)
    latent_S, row_S, place_N = np.empty_like(key_S, np.int64), np.empty_like(key_S, np.int64), np.empty(count, np.int64)
    _by_blocks(_gather_reaching, rows, pre, bound, end_B - found_B, key_S, value_S, latent_S, row_S)
    kept_N = place_N[: _places_of_largest(key_S, count, place_N)]
    return torch.from_numpy(value_S[kept_N]), torch.from_numpy(latent_S[kept_N]), torch.from_numpy(row_S[kept_N])


def sort_by_latent(latent_N: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """Order of the entries by latent [N], stable, and where those of each latent begin in it [F]."""
    order_N, first_F = _sort_by_latent(latent_N.numpy(), latents)
    return torch.from_numpy(order_N), torch.from_numpy(first_F)


def relu_(pre_BF: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pre-activations without their bias into latents; returns the sum of each latent [F] and how many are active."""
    loop = _relu_bfloat16 if pre_BF.dtype == torch.bfloat16 else _relu
    sums, active = zip(*_by_blocks(loop, len(pre_BF), _readable(pre_BF), bias_F.numpy()), strict=True)
    return torch.from_numpy(np.sum(sums, axis=0)), torch.tensor(float(sum(active)))


def relu_backward_(grad_BF: Tensor, latents_BF: Tensor, bias_F: Tensor) -> Tensor:
    """Add a gradient that all rows share and stop it where a latent is inactive; returns the sum over rows [F]."""
    loop = _relu_backward_bfloat16 if grad_BF.dtype == torch.bfloat16 else _relu_backward
    sums = _by_blocks(loop, len(grad_BF), _readable(grad_BF), _readable(latents_BF), bias_F.numpy())
    return torch.from_numpy(np.sum(sums, axis=0))


def add_gram(latents_BF: csr_array, total_FF: Tensor) -> None:
    """Add Σ fᵀf of a sparse code to a matrix of float64."""
    arrays = [array for code in (latents_BF.tocsc(), latents_BF) for array in (code.indptr, code.indices, code.data)]
    _by_blocks(_add_gram, len(total_FF), *arrays, total_FF.numpy())


def _readable(values: Tensor) -> NDArray[Any]:
    """An array of the same memory; of bfloat16, which numpy lacks, the bits."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _by_blocks(loop: Callable[..., Any], rows: int, *arguments: Any) -> list[Any]:
    """What a compiled loop gives for the block of rows of each thread; the first of them is ours."""
    threads = min(torch.get_num_threads(), rows)
    ends = [rows * block // threads for block in range(threads + 1)]
    others = [_pool(threads).submit(loop, *block, *arguments) for block in pairwise(ends[1:])]
    return [loop(0, ends[1], *arguments), *(other.result() for other in others)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1)


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """A loop in machine code, which runs without the interpreter's lock; kept beside this file or in the user's cache."""
    try:
        return njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # neither can be written to
        return njit(nogil=True)(loop)


@compiled
def _key(value: np.float32, bits: np.int32) -> np.int32:
    return NAN if value != value else max(bits, np.int32(0))


@compiled
def _cut(keys: Keys, count: int) -> np.int32:
    """The largest number, found bit by bit, that `count` keys reach; 0 if so many are not positive."""
    cut = np.int32(0)
    for bit in range(30, -1, -1):
        higher, reaching = np.int32(cut | (1 << bit)), np.int32(0)
        for i in range(len(keys)):
            reaching = np.int32(reaching + (keys[i] >= higher))
        if reaching >= count:
            cut = higher
        if reaching == count:
            break
    return cut


@compiled
def _places_of_largest(keys_S: Keys, count: int, place_N: Places) -> int:
    """The places of the `count` largest, rising; of equal ones the first. Returns how many there are."""
    cut, spare, kept = _cut(keys_S, count), count, 0
    for i in range(len(keys_S)):
        spare -= keys_S[i] > cut
    for i in range(len(keys_S)):
        equal = keys_S[i] == cut and spare > 0
        spare -= equal
        if keys_S[i] > cut or equal:
            place_N[kept] = i
            kept += 1
    return kept


@compiled
def _mark(values_F: Values, bound: np.float32, reaches_F: Flags) -> None:
    for i in range(len(values_F)):
        reaches_F[i] = not values_F[i] < bound


@compiled
def _latents_that_reach(values_F: Values, bound: np.float32, reaches_F: Flags, latent_S: Places) -> int:
    """Those whose value is not below a bound. `reaches_F` and `latent_S`: room for them, the first with zeros up to a
    multiple of 8, so that eight flags are looked at together."""
    _mark(values_F, bound, reaches_F)
    found = 0
    for eight, flags in enumerate(reaches_F.view(np.uint64)):
        if flags:
            for latent in range(8 * eight, 8 * eight + 8):
                latent_S[found] = latent
                found += reaches_F[latent]
    return found


@compiled
def _room(latents: int) -> tuple[Flags, Places]:
    return np.zeros((latents + 7) // 8 * 8, np.uint8), np.empty(latents + 8, np.int64)


@compiled
def _raise_to(top_G: Keys, keys_G: Keys) -> None:
    for group in range(len(top_G)):
        top_G[group] = max(top_G[group], keys_G[group])


@compiled
def _largest_of_rows(first: int, last: int, pre_BF: Values, groups: int, value_BK: Values, latent_BK: Places) -> None:
    """The k-th of the groups' largest is not above the k-th of a row; so the search is among those that reach it."""
    latents, k = pre_BF.shape[1], value_BK.shape[1]
    (reaches_F, latent_S), key_S = _room(latents), np.empty(latents, np.int32)
    top_G, bound_1, place_K = np.empty(groups, np.int32), np.empty(1, np.int32), np.empty(k, np.int64)
    for row in range(first, last):
        values_F, bits_F = pre_BF[row], pre_BF[row].view(np.int32)
        top_G[:] = bits_F[:groups]
        for start in range(groups, latents - groups + 1, groups):
            _raise_to(top_G, bits_F[start : start + groups])
        bound_1[0] = _cut(top_G, k)
        survivors = _latents_that_reach(values_F, bound_1.view(np.float32)[0], reaches_F, latent_S)
        for i in range(survivors):
            key_S[i] = _key(values_F[latent_S[i]], bits_F[latent_S[i]])
        for i in range(_places_of_largest(key_S[:survivors], k, place_K)):
            latent_BK[row, i] = latent_S[place_K[i]]
            value_BK[row, i] = values_F[latent_S[place_K[i]]]


@compiled
def _count_reaching(first: int, last: int, pre_BF: Values, bound: np.float32, found_B: Places) -> None:
    reaches_F, _ = _room(pre_BF.shape[1])
    for row in range(first, last):
        _mark(pre_BF[row], bound, reaches_F)
        found_B[row] = reaches_F.sum()


@compiled
def _gather_reaching(
    first: int, last: int, pre_BF: Values, bound: np.float32, start_B: Places,
    key_S: Keys, value_S: Values, latent_S: Places, row_S: Places,
) -> None:  # fmt: skip
    reaches_F, found_F = _room(pre_BF.shape[1])
    for row in range(first, last):
        values_F, bits_F, start = pre_BF[row], pre_BF[row].view(np.int32), start_B[row]
        for i in range(_latents_that_reach(values_F, bound, reaches_F, found_F)):
            latent = found_F[i]
            value_S[start + i], latent_S[start + i], row_S[start + i] = values_F[latent], latent, row
            key_S[start + i] = _key(values_F[latent], bits_F[latent])


@compiled
def _sort_by_latent(latent_N: Places, latents: int) -> tuple[Places, Places]:
    ends_F = np.zeros(latents, np.int64)
    for latent in latent_N:
        ends_F[latent] += 1
    first_F = ends_F.cumsum() - ends_F
    next_F, order_N = first_F.copy(), np.empty(len(latent_N), np.int64)
    for i, latent in enumerate(latent_N):
        order_N[next_F[latent]] = i
        next_F[latent] += 1
    return order_N, first_F


@compiled
def _add_gram(
    first: int, last: int, ends_F: Keys, row_N: Keys, of_latent_N: Values,
    ends_B: Keys, latent_N: Keys, of_row_N: Values, total_FF: NDArray[np.float64],
) -> None:  # fmt: skip
    """The rows of the matrix from `first` to `last`, one after the other, so that each stays close at hand."""
    for latent in range(first, last):
        total_F = total_FF[latent]
        for i in range(ends_F[latent], ends_F[latent + 1]):
            for j in range(ends_B[row_N[i]], ends_B[row_N[i] + 1]):
                total_F[latent_N[j]] += of_latent_N[i] * of_row_N[j]


@compiled
def _relu_of_row(values_F: Values, bias_F: Values, sum_F: Values, active_F: Keys) -> None:
    for f in range(len(bias_F)):
        value = values_F[f] + bias_F[f]
        value = np.float32(0) if value <= 0 else value
        values_F[f] = value
        sum_F[f] += value
        active_F[f] += np.int32(value > 0)


@compiled
def _relu(first: int, last: int, pre_BF: Values, bias_F: Values) -> tuple[Values, int]:
    sum_F, active_F = np.zeros(len(bias_F), np.float32), np.zeros(len(bias_F), np.int32)
    for row in range(first, last):
        _relu_of_row(pre_BF[row], bias_F, sum_F, active_F)
    return sum_F, active_F.sum()


@compiled
def _relu_bfloat16(first: int, last: int, pre_BF: Halves, bias_F: Values) -> tuple[Values, int]:
    sum_F, active_F = np.zeros(len(bias_F), np.float32), np.zeros(len(bias_F), np.int32)
    values_F = np.empty(len(bias_F), np.float32)
    for row in range(first, last):
        _widen(pre_BF[row], values_F.view(np.uint32))
        _relu_of_row(values_F, bias_F, sum_F, active_F)
        _narrow(values_F.view(np.uint32), pre_BF[row])
    return sum_F, active_F.sum()


@compiled
def _relu_backward_of_row(grad_F: Values, latents_F: Values, bias_F: Values, sum_F: Values) -> None:
    for f in range(len(bias_F)):
        grad = np.float32(0) if latents_F[f] <= 0 else grad_F[f] + bias_F[f]
        grad_F[f] = grad
        sum_F[f] += grad


@compiled
def _relu_backward(first: int, last: int, grad_BF: Values, latents_BF: Values, bias_F: Values) -> Values:
    sum_F = np.zeros(len(bias_F), np.float32)
    for row in range(first, last):
        _relu_backward_of_row(grad_BF[row], latents_BF[row], bias_F, sum_F)
    return sum_F


@compiled
def _relu_backward_bfloat16(first: int, last: int, grad_BF: Halves, latents_BF: Halves, bias_F: Values) -> Values:
    sum_F = np.zeros(len(bias_F), np.float32)
    grad_F, latents_F = np.empty(len(bias_F), np.float32), np.empty(len(bias_F), np.float32)
    for row in range(first, last):
        _widen(grad_BF[row], grad_F.view(np.uint32))
        _widen(latents_BF[row], latents_F.view(np.uint32))
        _relu_backward_of_row(grad_F, latents_F, bias_F, sum_F)
        _narrow(grad_F.view(np.uint32), grad_BF[row])
    return sum_F


@compiled
def _widen(halves_F: Halves, bits_F: NDArray[np.uint32]) -> None:
    """The bits of float32 from those of bfloat16, their upper half."""
    for f in range(len(halves_F)):
        bits_F[f] = np.uint32(halves_F[f]) << np.uint32(16)


@compiled
def _narrow(bits_F: NDArray[np.uint32], halves_F: Halves) -> None:
    """Rounded to the nearest, to the even one of two; NaN stays NaN."""
    for f in range(len(halves_F)):
        bits = bits_F[f]
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        halves_F[f] = np.uint16((bits if is_nan else rounded) >> np.uint32(16))
