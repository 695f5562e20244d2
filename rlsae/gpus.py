"""The GPU of a job: none, or one that no other job of this user on this machine was granted."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

from rlsae.errors import RlsaeError
from rlsae.resumable import hold

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")
_held: list[IO[str]] = []


def grant(gpus: int) -> str:
    """Show torch no GPU, or one; call it before torch looks. Returns what to say about it.

    Slurm tells each job which GPU is its own. Where nobody does, the first one is taken that no other job was granted, and
    held until this process ends; where all are, this job shares one.
    """
    present = _present()
    if gpus == 0:
        os.environ[VISIBLE] = ""
        return "GPU: none granted to this job" + (f", though {len(present)} can be used here" if present else "")
    if not present:
        return "GPU: one granted to this job, none found here"
    if len(present) == 1:
        os.environ[VISIBLE] = present[0]
        return f"GPU: {present[0]}"
    free = next(filter(_take, present), None)
    os.environ[VISIBLE] = chosen = free or present[os.getpid() % len(present)]
    if free:
        return f"GPU: {chosen}, chosen from {', '.join(present)}"
    return f"GPU: {chosen}, shared, for all are taken; --resources gpu={len(present)} would wait"


def _present() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if VISIBLE in os.environ:
        return [name for name in os.environ[VISIBLE].split(",") if name]
    return [str(number) for number, _ in enumerate(DEVICES.glob("nvidia[0-9]*"))]


def _take(name: str) -> bool:
    """Whether this GPU was free; it is this process's from now on."""
    folder = Path(tempfile.gettempdir()) / f"rlsae-gpus-{os.getuid()}"
    try:
        _held.append(hold(folder / f"{name.replace('/', '-')}.lock"))
    except RlsaeError:
        return False
    return True
