"""The chain through Slurm: the same artifacts as on one machine, also after what clusters do to jobs."""

from __future__ import annotations

import copy
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.slurm.conftest import Head, jobs, wait_until
from tests.workflow.conftest import TINY, Run, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

TUNING = {"method": "ppo", "corpus": "reviews", "batches": 20, "batch_size": 8, "minibatch_size": 8, "evaluation_prompts": 16}
STUDY = {"model": "tiny", "corpus": "texts", "activation": "mlp", "layers": [0], "dictionaries": ["small"]}
FAULTY = TINY | {
    "rewards": {
        "pausing": {"kind": "python", "path": "inputs/pausing.py"},
        "hungry": {"kind": "python", "path": "inputs/hungry.py"},
    },
    "tunings": {name: TUNING | {"reward": name} for name in ("pausing", "hungry")},
    "studies": {name: STUDY | {"tuning": name} for name in ("pausing", "hungry")},
}
REWARD = """
import os
import time

BALLAST = b"x" * int(os.environ.get("{name}_BYTES", 0))


def reward(prompts, responses):
    if len(set(prompts)) > 1 and time.time() < float(os.environ.get("{name}_PAUSES_UNTIL", 0)):
        time.sleep(5)
    return [float(len(response)) / 10 for response in responses]
"""
"""What a reward costs comes from outside: its file, which counts as an input, is the same in every run. It pauses for batches,
not for the many calls that score one response by its words."""
LIMITS = ["--set-resources", "tune:runtime=10 ** (attempt - 1)", "tune:mem_mb=1000 * attempt"]


def soon(seconds: float) -> str:
    return str(time.time() + seconds)


def copied(finished: Run, folder, *, results: bool) -> Run:
    """The code, inputs and configuration of the local run, with its results or without."""
    run = Run(folder)
    left_out = None if results else shutil.ignore_patterns("results", "logs", "benchmarks", ".snakemake")
    shutil.copytree(finished.folder, run.folder, ignore=left_out, symlinks=True, copy_function=shutil.copy2)
    return run


def with_faulty_tunings(finished: Run, folder) -> Run:
    """Two tunings to make, of a model that is there."""
    run = copied(finished, folder, results=True)
    run.write_config(copy.deepcopy(FAULTY))
    for name in FAULTY["rewards"]:
        (run.workdir / f"inputs/{name}.py").write_text(REWARD.format(name=name.upper()))
    return run


@pytest.fixture(scope="module")
def expected(finished, tmp_path_factory) -> Run:
    """The two tunings made on this machine without Slurm, undisturbed."""
    run = with_faulty_tunings(finished, tmp_path_factory.mktemp("expected") / "copy")
    done = run.snakemake("--", "policies")
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope="module")
def heads(finished, expected, cluster, tmp_path_factory) -> dict[str, Head]:
    """A Snakemake that runs the whole study, and one whose jobs need more than they ask for; both run at the same time."""
    whole = copied(finished, tmp_path_factory.mktemp("whole") / "copy", results=False)
    faulty = with_faulty_tunings(finished, tmp_path_factory.mktemp("faulty") / "copy")
    started = {
        "faulty": Head(faulty, cluster, *LIMITS, "--", "policies", PAUSING_PAUSES_UNTIL=soon(120), HUNGRY_BYTES="700000000"),
        "whole": Head(whole, cluster, "--groups", "activation_part=dump", "activation_store=dump"),
    }
    yield started
    for head in started.values():
        head.process.kill()


@pytest.fixture(scope="module")
def whole(heads) -> Run:
    heads["whole"].finish()
    return heads["whole"].run


@pytest.fixture(scope="module")
def faulty(heads) -> Run:
    heads["faulty"].finish()
    return heads["faulty"].run


def manifest(run: Run, policy: str) -> str:
    return manifests(run)[f"policies/{policy}/manifest.json"]


def manifests(run: Run) -> dict[str, str]:
    results = run.workdir / "results"
    return {path.relative_to(results).as_posix(): path.read_text() for path in results.rglob("manifest.json")}


def log(run: Run, path: str) -> str:
    return (run.workdir / "logs" / path).read_text()


def test_a_study_through_slurm_has_the_manifests_of_the_local_run(finished, whole):
    local = {path: text for path, text in manifests(finished).items() if "own-ppo" not in path and "models/local" not in path}
    assert manifests(whole) == local


def test_every_job_ran_in_slurm_but_the_assembly_and_the_parts_of_a_dump_in_one(whole, cluster):
    ran = Counter(comment.removeprefix("rule_").split("_wildcards_")[0] for _, _, comment in jobs(cluster, whole))
    once = ["model", "tune", "tokens", "rank_layers", "compare", "interpret", "report_study"]
    assert ran == dict.fromkeys(once, 1) | {"corpus": 2, "dump_activation_part_activation_store": 5, "dictionary": 4}


def test_jobs_side_by_side_get_a_gpu_each_and_say_which(whole):
    logs = list((whole.workdir / "logs/dictionaries").rglob("*.log"))
    assert len(logs) == 4
    assert {re.search(r"^GPU: (.*)$", path.read_text(), re.MULTILINE)[1] for path in logs} == {"0", "1", "2", "3"}


def test_a_job_that_runs_out_of_time_continues_on_the_next_attempt(faulty, expected, cluster):
    states = [state for _, state, comment in jobs(cluster, faulty) if comment.endswith("pausing")]
    assert states == ["TIMEOUT", "COMPLETED"]
    assert "continuing from the partial state" in log(faulty, "policies/tiny.pausing.log")
    assert (
        manifests(faulty)["policies/tiny.pausing/manifest.json"] == manifests(expected)["policies/tiny.pausing/manifest.json"]
    )


def test_a_job_that_runs_out_of_memory_asks_for_more_on_the_next_attempt(faulty, expected, cluster):
    tried = [(number, state) for number, state, comment in jobs(cluster, faulty) if comment.endswith("hungry")]
    assert [state for _, state in tried] == ["FAILED", "COMPLETED"]
    memory = [re.search(r"MinMemoryNode=(\w+)", cluster.command("scontrol", "show", "job", number))[1] for number, _ in tried]
    assert memory == ["1000M", "2000M"]
    assert manifest(faulty, "tiny.hungry") == manifest(expected, "tiny.hungry")


def test_after_the_head_was_lost_its_jobs_are_cancelled_and_a_new_one_continues(finished, expected, cluster, tmp_path):
    run = with_faulty_tunings(finished, tmp_path / "copy")
    target = ("--", "results/policies/tiny.pausing/manifest.json")
    state = run.workdir / "results/.work/policies/tiny.pausing/state.safetensors"
    first = Head(run, cluster, *target, PAUSING_PAUSES_UNTIL=soon(600))
    wait_until(state.exists, "a partial state")
    first.process.kill()
    first.process.wait()

    assert "--unlock" in Head(run, cluster, *target).fail()
    Head(run, cluster, "--unlock").finish()
    ((number, _, _),) = jobs(cluster, run)
    refused = Head(run, cluster, *target).fail()
    assert f"Slurm job {number} (RUNNING): tune tiny_pausing" in refused
    assert "rlsae orphans CONFIG --cancel" in refused
    assert "Traceback" not in refused

    listed = orphans(run, cluster)
    assert f"Slurm job {number} (RUNNING)" in listed
    assert orphans(run, cluster, "--cancel") == listed
    wait_until(lambda: "Slurm job" not in orphans(run, cluster), "no job left")
    Head(run, cluster, *target).finish()
    assert "continuing from the partial state" in log(run, "policies/tiny.pausing.log")
    assert manifest(run, "tiny.pausing") == manifest(expected, "tiny.pausing")


def orphans(run: Run, cluster, *arguments: str) -> str:
    environment = clean_environment() | cluster.environment | {"PYTHONPATH": str(run.repository)}
    command = [sys.executable, "-m", "rlsae", "orphans", "study.yaml", *arguments]
    return subprocess.run(command, cwd=run.workdir, env=environment, capture_output=True, text=True, check=True).stdout


def test_jobs_of_a_running_snakemake_are_no_orphans_and_go_with_it_on_ctrl_c(finished, cluster, tmp_path):
    run = with_faulty_tunings(finished, tmp_path / "copy")
    head = Head(run, cluster, "--", "results/policies/tiny.pausing/manifest.json", PAUSING_PAUSES_UNTIL=soon(600))
    wait_until(lambda: jobs(cluster, run), "a job")
    assert "Slurm job" not in orphans(run, cluster)
    head.process.send_signal(signal.SIGINT)
    head.fail()
    wait_until(lambda: jobs(cluster, run)[0][1] == "CANCELLED", "the job to be cancelled")
