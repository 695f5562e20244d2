"""Programs that tests run and Python's packages do not bring: Debian's, installed where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

LOCK = Path(tempfile.gettempdir()) / "rlsae-tests-apt.lock"


def cannot_install(programs: list[str], packages: list[str]) -> str | None:
    """Install `packages` where one of `programs` is missing; the reason where that cannot be done."""
    with FileLock(LOCK):  # test processes side by side
        if all(map(shutil.which, programs)):
            return None
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            return f"{', '.join(packages)} (Debian) not installed, and installing takes root and apt-get"
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", *packages]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                return f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}"
    return None
