"""A full disk, a folder that cannot be written, a damaged artifact, a second head: what is said, and that nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from rlsae.resumable import LOCK, hold
from tests.workflow.conftest import Run, clean_environment, finished, run
from tests.workflow.verbs import STAGES, command, environment, extraction, run_to_the_end

pytestmark = pytest.mark.slow
__all__ = ["finished", "run"]
"""Fixtures of the workflow's tests."""
ARTIFACTS = [
    "corpora/reviews", "models/tiny", "policies/tiny.ppo", "tokens/tiny.texts", "activations/tiny.texts/mlp/layers-*",
    "divergence/main", "dictionaries/tiny.texts/mlp/layers-*/layer*/small", "comparison/main", "interpretation/main",
    "reports/main",
]  # fmt: skip


@contextmanager
def small_disk(folder, size):
    """A file system of its own, which `resize` makes larger or read-only."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def attempt(arguments):
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True)


@pytest.mark.parametrize("verb", [*STAGES, "extract"])
def test_a_full_disk_is_told_and_a_larger_one_continues(finished, tmp_path, verb):
    def stage(folder):
        folder.mkdir(exist_ok=True)
        if verb == "extract":  # its shards are what fills a disk
            return extraction(finished, 0, folder / "stamp.json", folder / "work")
        return command(finished, verb, folder / "out")[0]

    run_to_the_end(stage(tmp_path / "whole"))
    made = "stamp.json" if verb == "extract" else "out/manifest.json"
    with small_disk(tmp_path / "small", "24k") as resize:
        failed = attempt(stage(tmp_path / "small"))
        assert failed.returncode == 1, failed.stderr
        assert "No space left on device" in failed.stderr or "does not fit" in failed.stderr or "free" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not (tmp_path / "small" / made).exists()
        resize("size=200m")
        run_to_the_end(stage(tmp_path / "small"))
        assert (tmp_path / "small" / made).read_bytes() == (tmp_path / "whole" / made).read_bytes()


@pytest.mark.parametrize("verb", STAGES)
def test_a_disk_that_cannot_be_written_is_told(finished, tmp_path, verb):
    with small_disk(tmp_path / "small", "1m") as resize:
        resize("ro")
        failed = attempt(command(finished, verb, tmp_path / "small" / "out")[0])
        assert failed.returncode == 1
        assert "cannot write" in failed.stderr
        assert "Traceback" not in failed.stderr


def test_a_results_folder_that_cannot_be_written_is_told_before_anything_runs(run):
    shutil.rmtree(run.workdir / "results")
    with small_disk(run.workdir / "results", "1m") as resize:
        resize("ro")
        refused = run.snakemake()
        assert refused.returncode == 1
        said = refused.stdout + refused.stderr
        assert "cannot write results: Read-only file system" in said
        assert "Traceback" not in said
        assert "Error in rule" not in said


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_a_damaged_artifact_is_named_and_made_again_as_it_was(run, artifact):
    (folder,) = run.workdir.glob(f"results/{artifact}")
    before = (folder / "manifest.json").read_bytes()
    data = max(
        (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"), key=lambda p: p.stat().st_size
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    verified = run.rlsae("verify", str(folder))
    assert verified.returncode == 1
    assert data.name in verified.stdout + verified.stderr or folder.name in verified.stdout + verified.stderr
    shutil.rmtree(folder)
    again = run.snakemake("--rerun-triggers", "mtime", "--", str((folder / "manifest.json").relative_to(run.workdir)))
    assert again.returncode == 0, again.stdout + again.stderr
    assert (folder / "manifest.json").read_bytes() == before


def test_a_second_head_in_the_same_folder_is_refused(run):
    shutil.rmtree(run.workdir / "results/models/tiny")
    arguments = [sys.executable, "-m", "snakemake", "-s", str(run.repository / "Snakefile"), "--directory", str(run.workdir)]
    arguments += ["--configfile", str(run.workdir / "study.yaml"), "--cores", "1"]
    first = subprocess.Popen(arguments, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list((run.workdir / ".snakemake/locks").glob("*")):
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run(arguments, env=clean_environment(), capture_output=True, text=True)
        assert second.returncode == 1
        assert "cannot be locked" in second.stdout + second.stderr
    finally:
        first.terminate()
        first.wait()


def test_a_second_head_in_another_folder_on_the_same_results_is_refused_by_the_stage(run, tmp_path):
    elsewhere = Run(tmp_path / "elsewhere")
    elsewhere.workdir.mkdir(parents=True)
    elsewhere.repository.symlink_to(run.repository)
    for name in ("results", "inputs"):
        (elsewhere.workdir / name).symlink_to(run.workdir / name)
    shutil.copy(run.workdir / "study.yaml", elsewhere.workdir)
    shutil.rmtree(run.workdir / "results/policies/tiny.ppo")
    with hold(run.workdir / "results/.work/policies/tiny.ppo" / LOCK):  # as the job of the first head does
        second = elsewhere.snakemake("--show-failed-logs", "--", "policies")
    assert second.returncode == 1
    assert f"is in use by process {os.getpid()}" in second.stdout + second.stderr
    assert elsewhere.snakemake("--", "policies").returncode == 0
