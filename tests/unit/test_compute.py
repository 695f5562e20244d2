"""Threads, the device, the matmul back end, and progress in a log."""

from __future__ import annotations

import pytest
import torch

from rlsae.compute import configure, device, medium_is_exact, rounded_products
from rlsae.progress import Progress


@pytest.fixture(autouse=True)
def settings_as_before():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_the_asked_number_of_threads_is_used():
    configure(threads=2)
    assert torch.get_num_threads() == 2
    configure()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("exact", "precision"), [(True, "medium"), (False, "highest")])
def test_the_faster_matmul_is_used_only_where_it_is_exact(monkeypatch, exact, precision):
    monkeypatch.setattr("rlsae.compute.medium_is_exact", lambda: exact)
    configure()
    assert torch.get_float32_matmul_precision() == precision


def test_products_are_rounded_for_a_while_only():
    torch.set_float32_matmul_precision("highest")
    with rounded_products():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_matmul_that_is_chosen_keeps_float32_precision():
    configure()
    a, b = torch.randn(128, 256), torch.randn(256, 64)
    error = (a @ b).double() - a.double() @ b.double()
    assert error.norm() / (a.double() @ b.double()).norm() < 1e-5


def test_asking_whether_a_matmul_is_exact_changes_no_setting():
    torch.set_float32_matmul_precision("high")
    medium_is_exact()
    assert torch.get_float32_matmul_precision() == "high"


def test_the_environment_overrides_the_device(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "meta")
    assert device() == torch.device("meta")


def test_a_log_has_a_line_at_the_end_with_count_and_values(capsys):
    progress = Progress("tune", total=3, unit="samples", done=1)
    progress.update(1, reward=0.5)
    assert capsys.readouterr().err == ""
    progress.update(1, reward=0.25)
    line = capsys.readouterr().err
    assert line.startswith("tune: 3 of 3 samples, ")
    assert line.endswith("0 s left (reward 0.25)\n")
