"""Which GPU a job sees: none, the one that Slurm gave it, or one that no other job holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsae import gpus

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Function of a number of GPUs: a machine that has so many, where nobody says which to use."""
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def with_gpus(count):
        (tmp_path / "dev").mkdir()
        for name in ["nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(count))]:
            (tmp_path / "dev" / name).touch()

    yield with_gpus
    for file in gpus._held:
        file.close()


def visible():
    return os.environ.get(gpus.VISIBLE)


def test_a_job_that_was_granted_none_sees_none_and_says_how_many_there_are(machine):
    machine(2)
    assert gpus.grant(0) == "GPU: none granted to this job, though 2 can be used here"
    assert visible() == ""


def test_where_there_is_no_gpu_a_grant_changes_nothing(machine):
    machine(0)
    assert gpus.grant(1) == "GPU: one granted to this job, none found here"
    assert visible() is None


def test_the_gpu_that_slurm_gave_is_taken(machine, monkeypatch):
    machine(4)
    monkeypatch.setenv(gpus.VISIBLE, "2")
    assert gpus.grant(1) == "GPU: 2"
    assert visible() == "2"


def test_jobs_side_by_side_take_a_gpu_each_and_share_when_there_are_too_few(machine, monkeypatch):
    machine(2)
    assert gpus.grant(1) == "GPU: 0, chosen from 0, 1"
    monkeypatch.delenv(gpus.VISIBLE)
    assert gpus.grant(1) == "GPU: 1, chosen from 0, 1"
    monkeypatch.delenv(gpus.VISIBLE)
    assert "shared, for all are taken; --resources gpu=2 would wait" in gpus.grant(1)
    assert visible() in ("0", "1")


def test_a_gpu_is_free_again_when_its_job_has_ended(machine, monkeypatch):
    machine(2)
    code = "from rlsae import gpus; print(gpus.grant(1))"
    environment = os.environ | {gpus.VISIBLE: "GPU-a,GPU-b", "TMPDIR": str(Path(gpus.tempfile.gettempdir()))}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.stdout == "GPU: GPU-a, chosen from GPU-a, GPU-b\n"
