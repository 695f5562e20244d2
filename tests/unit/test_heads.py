"""One Snakemake per results folder, and the Slurm jobs that a lost one left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsae import heads
from rlsae.errors import RlsaeError
from rlsae.heads import cancel, claim_results, left_behind, queued_jobs

REPOSITORY = Path(__file__).parents[2]
RUN = "1f0e6c1a-7c6c-4a39-9d1c-0d8a2f1f7e55"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A working folder with results, which are not in use any more when the test is over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heads, "_held", [])
    (tmp_path / "results").mkdir()
    yield tmp_path
    for file in heads._held:
        file.close()


@pytest.fixture
def slurm(monkeypatch, tmp_path_factory):
    """Function of what squeue prints: a machine with a Slurm that holds these jobs; the file that notes calls of scancel."""
    programs = tmp_path_factory.mktemp("bin")

    def holds(*lines, **commands):
        listed = "\n".join(lines)
        does = {"squeue": f"cat <<'END'\n{listed}\nEND", "scancel": f'echo "$@" >> {programs}/cancelled'} | commands
        for name, command in does.items():
            (programs / name).write_text(f"#!/bin/sh\n{command}\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return programs / "cancelled"

    return holds


def another_claims(folder):
    """A second Snakemake's start, in a process of its own."""
    code = "from rlsae import heads, errors\ntry: heads.claim_results()\nexcept errors.RlsaeError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_second_snakemake_is_refused_also_from_another_folder(folder, tmp_path_factory):
    claim_results()
    other = tmp_path_factory.mktemp("other")
    (other / "results").symlink_to(folder / "results")
    for place in (folder, other):
        assert f"results is in use by process {os.getpid()} on {os.uname().nodename}" in another_claims(place)


def test_only_jobs_that_a_snakemake_submitted_for_these_results_are_found(folder, slurm, tmp_path_factory):
    linked = tmp_path_factory.mktemp("linked")
    (linked / "results").symlink_to(folder / "results")
    slurm(
        f"11|RUNNING|{RUN}|{folder}|rule_tune_wildcards_tiny_ppo",
        f"12_[3-5]|PENDING|mine_{RUN}|{linked}|rule_dictionary",
        f"13|RUNNING|{RUN}|/elsewhere|rule_tune",
        f"14|RUNNING|sbatch|{folder}|the job in which Snakemake runs",
    )
    assert [str(job) for job in queued_jobs()] == [
        "Slurm job 11 (RUNNING): tune tiny_ppo",
        "Slurm job 12_[3-5] (PENDING): dictionary",
    ]


def test_a_snakemake_does_not_start_beside_jobs_of_one_that_is_gone(folder, slurm):
    slurm(f"11|RUNNING|{RUN}|{folder}|rule_tune_wildcards_tiny_ppo")
    with pytest.raises(RlsaeError, match=r"gone still write .*\n  Slurm job 11 .*\n.* rlsae orphans CONFIG --cancel"):
        claim_results()


def test_jobs_of_a_snakemake_that_runs_are_not_left_behind(folder, slurm):
    slurm(f"11|RUNNING|{RUN}|{folder}|rule_tune")
    assert len(left_behind()) == 1
    with heads.hold(heads.LOCK):
        assert left_behind() == []


def test_only_what_was_left_behind_is_cancelled(folder, slurm):
    cancelled = slurm(f"11|RUNNING|{RUN}|{folder}|rule_tune", f"12|RUNNING|{RUN}|{folder}|rule_tune")
    cancel(left_behind())
    assert cancelled.read_text() == "11 12\n"
    cancel([])
    assert cancelled.read_text() == "11 12\n"


def test_a_slurm_that_does_not_answer_holds_nobody_up_but_is_told(folder, slurm, capsys):
    slurm(squeue="echo 'squeue: error: twice' >&2; echo 'squeue: fatal: Unable to contact slurm controller' >&2; exit 1")
    claim_results()
    said = "jobs of an earlier run may still be in Slurm: squeue failed: squeue: fatal: Unable to contact slurm controller\n"
    assert capsys.readouterr().err == said


def test_a_job_that_cannot_be_cancelled_is_an_error(folder, slurm):
    slurm(scancel="echo 'scancel: error: Access denied' >&2; exit 1")
    with pytest.raises(RlsaeError, match="scancel failed: scancel: error: Access denied"):
        cancel([heads.Job("11", "RUNNING", "tune")])


def test_a_machine_without_slurm_has_no_jobs(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    assert left_behind() == []
