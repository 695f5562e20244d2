"""Kill a whole workflow at random moments until it has finished, again and again: `python -m tests.faults.random_kills`.

Each life of a run is ended by SIGKILL, of all its processes or of Snakemake alone, whose jobs then run on and meet the next
life. Rules that no kill has met yet are waited for, so that each is met. In the end the manifests must be those of a run that
nobody disturbed. Prints the table of docs/faults.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.workflow.conftest import REPOSITORY, TINY, clean_environment, write_inputs

LONGER = {
    "models": {"tiny": {"steps": 60}},
    "tunings": {"ppo": {"batches": 12}},
    "dictionaries": {"small": {"epochs": 12}, "big": {"epochs": 12}},
}
"""More work in each stage than the tests of the workflow have, so that kills meet them at work."""
SHORTEST, LONGEST = 3.0, 0.25
"""Seconds of the shortest life, as the first job starts after some two, and share of an undisturbed run of the longest."""
SOON = 2.0
"""Seconds, at most, from the start of a job of a rule that no kill has met yet to its kill."""
ALONE = 0.2
"""Share of the kills that hit Snakemake alone."""
STARTED = re.compile(r"^(?:local)?(?:rule|checkpoint) (\w+):(?:.*\n)+?    jobid: (\d+)", re.MULTILINE)
FINISHED = re.compile(r"^Finished jobid: (\d+)", re.MULTILINE)


@dataclass
class Report:
    """What was killed, and what became of it."""

    kills: int = 0
    by_rule: Counter[str] = field(default_factory=Counter)
    """Jobs that were running at a kill."""
    runs: int = 0
    wrong: list[str] = field(default_factory=list)
    """Runs whose manifests differ, or that ended with an error of their own."""


Life = Callable[[Path, float, random.Random, Report], str]
"""Of a folder, the longest life in seconds, the chance and the report; returns what it said where it ended with an error."""


def main() -> None:
    given = kills_and_seed(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        report = Report()
        with suppress(KeyboardInterrupt):  # tells what has been found so far
            kill_at_random(Path(folder), given.kills, random.Random(given.seed), report, live_and_die)
    tell(report)


def kills_and_seed(description: str | None) -> argparse.Namespace:
    """`--kills` and `--seed` of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def tell(report: Report) -> None:
    """Print the table and what went wrong; exit with 1 where something did."""
    print(f"{report.kills} kills in {report.runs} runs; {len(report.wrong)} runs ended otherwise than an undisturbed one")
    for line in report.wrong:
        print(line)
    print("\n| rule | killed while it ran |\n|---|---|")
    for rule, count in sorted(report.by_rule.items()):
        print(f"| {rule} | {count} |")
    sys.exit(bool(report.wrong))


def kill_at_random(folder: Path, kills: int, rng: random.Random, report: Report, live: Life) -> None:
    """Kill at least so many times; every run goes on to its end.

    Args:
        folder: empty; runs lie in it.
        live: kills a run until it ends.
    """
    whole, started = prepare(folder / "whole"), time.monotonic()
    done = subprocess.run(command(whole), capture_output=True, text=True, env=environment(), cwd=whole)
    assert done.returncode == 0, done.stdout + done.stderr
    expected, longest = manifests(whole), max(2 * SHORTEST, LONGEST * (time.monotonic() - started))
    while report.kills < kills:
        run = prepare(folder / f"run{report.runs}")
        error = live(run, longest, rng, report)
        found = manifests(run)
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if error or differing:
            report.wrong.append(f"run {report.runs}: {error or 'differing: ' + ', '.join(differing)}")
        else:
            shutil.rmtree(run)
        report.runs += 1


def live_and_die(run: Path, longest: float, rng: random.Random, report: Report) -> str:
    """Kill a run until it ends by itself; returns what it said where it ended with an error."""
    log = run / "log.txt"
    while True:
        subprocess.run([*command(run), "--unlock"], capture_output=True, env=environment(), cwd=run, check=True)
        with log.open("w") as output:
            process = subprocess.Popen(
                command(run), stdout=output, stderr=subprocess.STDOUT, env=environment(), cwd=run, start_new_session=True
            )
            wait_for_the_moment(process, log, longest, rng, report)
            if (code := process.poll()) is None:
                alone = rng.random() < ALONE
                (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
                process.wait()
                report.kills += 1
                report.by_rule.update(running(log.read_text()))
                print(f"kill {report.kills}, run {report.runs}", file=sys.stderr, flush=True)
                continue
        if code == 0:
            return ""
        said = log.read_text()
        if "is in use by" in said:  # a job of the life before is still at it, and says so
            time.sleep(1)
            continue
        return said[-2000:]


def wait_for_the_moment(
    process: subprocess.Popen[bytes], log: Path, longest: float, rng: random.Random, report: Report
) -> None:
    """Wait for a random time; a shorter one where a rule is at work that no kill has met yet, or where the run ends."""
    end, met = time.monotonic() + rng.uniform(SHORTEST, longest), set(report.by_rule)
    while process.poll() is None and time.monotonic() < end:
        if unmet := set(running(log.read_text())) - met:
            end, met = min(end, time.monotonic() + rng.uniform(0, SOON)), met | unmet
        time.sleep(0.05)


def running(log: str) -> list[str]:
    """Rules of the jobs that Snakemake had started and not yet seen finish."""
    finished = set(FINISHED.findall(log))
    return [rule for rule, job in STARTED.findall(log) if job not in finished]


def prepare(folder: Path) -> Path:
    """A folder with a configuration and its inputs."""
    import yaml

    write_inputs(folder / "inputs")
    config = copy.deepcopy(TINY)
    for section, entries in LONGER.items():
        for name, changes in entries.items():
            config[section][name] |= changes
    (folder / "study.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def command(folder: Path) -> list[str]:
    arguments = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder)]
    arguments += ["--configfile", str(folder / "study.yaml"), "--cores", "2", "--rerun-incomplete", "--show-failed-logs"]
    return [*arguments, "--set-threads", "dictionary=1", "model=1", "tune=1", "activation_part=1"]


def environment() -> dict[str, str]:
    return clean_environment() | {"RLSAE_SAVE_SECONDS": "0"}


def manifests(run: Path) -> dict[str, str]:
    """Text of every manifest by its path in the results."""
    results = run / "results"
    return {path.relative_to(results).as_posix(): path.read_text() for path in results.rglob("manifest.json")}


if __name__ == "__main__":
    main()
