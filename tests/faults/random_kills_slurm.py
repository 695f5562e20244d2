"""The same on a real Slurm: `python -m tests.faults.random_kills_slurm`, with the cluster of tests/slurm/.

A kill hits Snakemake alone, whose jobs run on in Slurm, are cancelled with `rlsae orphans --cancel` or waited for, and the same
command goes on; or the process of one stage on its node, whose job Snakemake submits again: of the stages at work the one that
was killed least. Expected are the manifests of a local run that nobody disturbed.
"""

from __future__ import annotations

import functools
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults.random_kills import SHORTEST, SOON, Report, command, environment, kill_at_random, kills_and_seed, tell
from tests.slurm.cluster import Cluster, cannot_install
from tests.slurm.conftest import PROFILE, THREADS

HEADS = 0.4
"""Share of the kills that hit Snakemake."""
AT_WORK = 8.0
"""Seconds from the sight of a stage to its kill, at most; importing torch takes the first two. The first kill comes `SOON`."""
RETRIES = 2
"""Of the profile: a job that was killed more often ends the run, and the same command goes on."""
STAGE = re.compile(r"-m rlsae (\S+)")
STILL_THERE = "jobs of a Snakemake that is gone still write"


def main() -> None:
    given = kills_and_seed(__doc__)
    if reason := cannot_install():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        report, cluster = Report(), Cluster(Path(folder) / "cluster")
        cluster.start()
        try:
            with suppress(KeyboardInterrupt):  # tells what has been found so far
                live = functools.partial(live_and_die, cluster)
                kill_at_random(Path(folder) / "runs", given.kills, random.Random(given.seed), report, live)
        finally:
            cluster.stop()
    tell(report)


def live_and_die(cluster: Cluster, run: Path, longest: float, rng: random.Random, report: Report) -> str:
    """Kill until the run ends; returns what it said where it ended with an error that no kill explains."""
    settings = environment() | cluster.environment
    while True:
        subprocess.run([*command(run), "--unlock"], capture_output=True, env=settings, cwd=run, check=True)
        log, killed = run / "log.txt", 0
        with log.open("w") as output:
            head = subprocess.Popen([*command(run), *through_slurm()], stdout=output, stderr=output, env=settings, cwd=run)
            while not ended_within(rng.uniform(SHORTEST, longest), head, run, report):
                if rng.random() < HEADS and not unmet(run, report):
                    report.by_rule["(Snakemake)"] += 1
                    head.kill()
                elif stage := kill_a_stage(run, rng, head, report):
                    report.by_rule[stage] += 1
                else:
                    break
                killed += 1
                report.kills += 1
                print(f"kill {report.kills}, run {report.runs}", file=sys.stderr, flush=True)
            head.wait()
        if head.returncode == 0:
            return ""
        said = log.read_text()
        if STILL_THERE in said:
            clean_up(run, settings, rng)
        elif head.returncode > 0 and killed <= RETRIES:
            return said[-2000:]


def through_slurm() -> list[str]:
    arguments = ["--workflow-profile", str(PROFILE), "--set-threads", *THREADS, "--latency-wait", "5"]
    return [*arguments, "--slurm-init-seconds-before-status-checks", "1"]


def ended_within(seconds: float, head: subprocess.Popen[bytes], run: Path, report: Report) -> bool:
    """Wait so long, or until a stage is at work that no kill has met yet; whether the run has ended."""
    end = time.monotonic() + seconds
    while head.poll() is None and time.monotonic() < end and not unmet(run, report):
        time.sleep(0.1)
    return head.poll() is not None


def unmet(run: Path, report: Report) -> bool:
    """Whether a stage is at work that no kill has met yet."""
    return any(stage not in report.by_rule for _, stage in stages(run))


def kill_a_stage(run: Path, rng: random.Random, head: subprocess.Popen[bytes], report: Report) -> str:
    """Kill the process of a stage some time after it was first seen; returns its verb, or nothing where the run ends before."""
    while head.poll() is None:
        if found := stages(run):
            process, stage = min(found, key=lambda of: report.by_rule[of[1]])
            time.sleep(rng.uniform(0, AT_WORK if report.by_rule[stage] else SOON))
            with suppress(psutil.Error):
                process.kill()
                return stage
        time.sleep(0.1)
    return ""


def stages(run: Path) -> list[tuple[psutil.Process, str]]:
    """The processes of stages that work in a folder, each with its verb."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            stage = STAGE.search(" ".join(process.cmdline()))
            if stage and process.cwd() == str(run) and process.name().startswith("python"):
                found.append((process, stage[1]))
    return found


def clean_up(run: Path, settings: dict[str, str], rng: random.Random) -> None:
    """What the message says: cancel the jobs of the Snakemake that is gone, or wait for them."""
    if rng.random() < 0.5:
        cancel = [sys.executable, "-m", "rlsae", "orphans", "study.yaml", "--cancel"]
        subprocess.run(cancel, capture_output=True, env=settings, cwd=run, check=True)
    else:
        time.sleep(3)


if __name__ == "__main__":
    main()
