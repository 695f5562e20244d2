"""Every long stage survives being killed: the artifact is that of an uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlsae.resumable import LOCK, hold
from tests.workflow.verbs import STAGES, command, dump_options, environment, extraction, run_to_the_end


def kill_after_progress(arguments: list[str], work: Path, with_signal: int, delay: float) -> None:
    """Start a stage, wait until it has saved a partial state, and kill it a moment later."""
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
    state = work / "state.safetensors"
    before = state.stat().st_mtime_ns if state.exists() else 0
    while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns != before):
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(with_signal)
    process.wait()


@pytest.mark.parametrize("verb", STAGES)
def test_a_killed_stage_continues_and_ends_as_if_never_killed(finished, tmp_path, verb):
    rng = random.Random(verb)
    uninterrupted, _ = command(finished, verb, tmp_path / "whole")
    run_to_the_end(uninterrupted)
    killed, work = command(finished, verb, tmp_path / "killed")
    for with_signal in (signal.SIGKILL, signal.SIGTERM):
        kill_after_progress(killed, work, with_signal, delay=rng.uniform(0, 0.1))
    assert not (tmp_path / "killed/manifest.json").exists()
    assert "continuing from the partial state" in run_to_the_end(killed)
    assert not work.exists()
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("whole", "killed")]
    assert manifests[0] == manifests[1]


def test_a_killed_dump_recomputes_only_its_missing_shards(finished, tmp_path):
    def dump(out: Path, kill: bool) -> None:
        work = out.with_name(out.name + ".work")
        for part in range(3):
            arguments = extraction(finished, part, out / f"part-{part}.json", work, rows_per_part=1024)
            if kill:
                process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
                while process.poll() is None and not (work / "created").exists():
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
                process.wait()
            run_to_the_end(arguments)
        options = ["--work", work, "--out", out]
        options += [option for part in range(3) for option in ("--stamp", out / f"part-{part}.json")]
        shared = dump_options(finished, rows_per_part=1024)
        run_to_the_end([sys.executable, "-m", "rlsae", "consolidate", *map(str, options), *shared])

    dump(tmp_path / "whole", kill=False)
    dump(tmp_path / "killed", kill=True)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("whole", "killed")]
    assert manifests[0] == manifests[1]


def test_other_settings_wipe_the_partial_state_and_say_so(finished, tmp_path):
    arguments, work = command(finished, "model", tmp_path / "model")
    kill_after_progress(arguments, work, signal.SIGKILL, delay=0)
    changed = [argument.replace('"seed": 0', '"seed": 1') for argument in arguments]
    assert changed != arguments
    said = run_to_the_end(changed)
    assert "wiping" in said
    assert "continuing" not in said


def test_a_second_runner_is_refused_with_the_name_of_the_first(finished, tmp_path):
    arguments, work = command(finished, "model", tmp_path / "model")
    with hold(work / LOCK):
        second = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert second.returncode == 1
    assert f"process {os.getpid()} on {os.uname().nodename}, started" in second.stderr
    assert "Traceback" not in second.stderr
    run_to_the_end(arguments)  # a lock file that nobody holds is no lock


def test_two_runs_with_one_seed_give_identical_manifests(finished, tmp_path):
    for name in ("one", "two"):
        run_to_the_end(command(finished, "tune", tmp_path / name)[0])
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two")]
    assert manifests[0] == manifests[1]
