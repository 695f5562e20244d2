"""One Snakemake per results folder, and the Slurm jobs that one left behind when it was killed.

Snakemake locks the folder that it runs in, which says nothing to one that runs in another folder and writes the same results.
A Snakemake that is killed cannot cancel its Slurm jobs: they run on and write what its successor would write too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import IO, NamedTuple

from rlsae.errors import RlsaeError
from rlsae.layout import RESULTS
from rlsae.progress import say
from rlsae.resumable import hold

LOCK = RESULTS / ".lock"
RUN_ID = re.compile(r"(.+_)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""How Snakemake's Slurm executor names its jobs: an optional prefix and a UUID, the same for all jobs of a run."""
SECONDS = 30
_held: list[IO[str]] = []


class Job(NamedTuple):
    """A job in Slurm that works on these results."""

    number: str
    """What scancel takes; of an array, `12_3` or `12_[4-9]`."""
    state: str
    """As squeue calls it: PENDING, RUNNING, ..."""
    what: str
    """Rule and wildcards, as far as Slurm was told."""

    def __str__(self) -> str:
        return f"Slurm job {self.number} ({self.state}): {self.what}"


def claim_results() -> None:
    """Let this process alone run the workflow on `results/`, until it ends.

    Raises:
        RlsaeError: another one does, or jobs of one that is gone are still in Slurm.
    """
    _held.append(hold(LOCK))
    if jobs := queued_jobs():
        listed = "\n".join(f"  {job}" for job in jobs)
        raise RlsaeError(
            f"jobs of a Snakemake that is gone still write {RESULTS.resolve()}:\n{listed}\n"
            "Wait until they end, or cancel them: rlsae orphans CONFIG --cancel"
        )


def left_behind() -> list[Job]:
    """Jobs in Slurm that write `results/` and that no Snakemake waits for."""
    if not RESULTS.exists():
        return []
    try:
        hold(LOCK).close()
    except RlsaeError:  # a Snakemake runs: these jobs are its own
        return []
    return queued_jobs()


def queued_jobs() -> list[Job]:
    """This user's jobs in Slurm that a Snakemake submitted and that write `results/`.

    None where there is no Slurm. One that does not answer holds nobody up, who may not even use it: it is said, no more.
    """
    if not shutil.which("squeue"):
        return []
    try:
        listed = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%T|%j|%Z|%k")
    except RlsaeError as error:
        say(f"jobs of an earlier run may still be in Slurm: {error}")
        return []
    found, results = [], RESULTS.resolve()
    for line in listed.splitlines():
        number, state, name, folder, comment = line.split("|", 4)
        if RUN_ID.fullmatch(name) and (Path(folder) / RESULTS).resolve() == results:
            found.append(Job(number, state, comment.removeprefix("rule_").replace("_wildcards_", " ")))
    return found


def cancel(jobs: list[Job]) -> None:
    """Cancel jobs.

    Raises:
        RlsaeError: Slurm does not answer.
    """
    if jobs:
        _ask("scancel", *(job.number for job in jobs))


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    except subprocess.TimeoutExpired:
        raise RlsaeError(f"{command[0]} has not answered for {SECONDS} seconds; try again when Slurm does") from None
    except subprocess.CalledProcessError as error:
        last_line = error.stderr.strip().rpartition("\n")[2]
        raise RlsaeError(f"{command[0]} failed: {last_line}") from None
