"""Threads, the device and the matmul back end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlsae.progress import say


def configure(threads: int | None = None) -> None:
    """Use so many threads, and the faster fp32 matmul where it is exact.

    torch's "medium" precision sends fp32 products to oneDNN. Without matrix units for bf16 that is twice as fast as MKL
    on AMD and still true fp32; with them (AMX) it silently rounds to bf16. So the machine is asked.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium" if medium_is_exact() else "highest")


def medium_is_exact() -> bool:
    """Whether `set_float32_matmul_precision("medium")` keeps fp32 precision on this CPU."""
    generator = torch.Generator().manual_seed(0)
    a_MK, b_KN = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    with rounded_products():
        error = torch.linalg.norm((a_MK @ b_KN).double() - a_MK.double() @ b_KN.double())
    return bool(error / torch.linalg.norm(a_MK.double() @ b_KN.double()) < 1e-5)


@contextmanager
def rounded_products() -> Iterator[None]:
    """fp32 products of factors that are rounded to bf16 or TF32 where the machine has matrix units for these."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device() -> torch.device:
    """The accelerator of this job if it has one, else the CPU; `RLSAE_DEVICE` overrides."""
    chosen = os.environ.get("RLSAE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    say(f"device: {chosen}, {torch.get_num_threads()} threads, fp32 matmul {torch.get_float32_matmul_precision()}")
    return torch.device(chosen)
