"""A cluster of one node, and studies that run on it from the profile that users get."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cannot_install
from tests.workflow.conftest import Run, clean_environment, finished

__all__ = ["finished"]

PROFILE = Path(__file__).parents[2] / "workflow/profiles/slurm"
THREADS = ["dictionary=1", "model=1", "tune=1", "activation_part=1", "compare=2", "interpret=2"]
"""As many as the local run has on its two cores: equal threads are what equal manifests are promised for."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    pytest.importorskip("snakemake_executor_plugin_slurm")
    if reason := cannot_install():
        pytest.skip(reason)
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


class Head:
    """A Snakemake on the cluster's login node, which here is this machine."""

    def __init__(self, run: Run, cluster: Cluster, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "snakemake", "-s", str(run.repository / "Snakefile"), "--directory", str(run.workdir)]
        command += ["--configfile", str(run.workdir / "study.yaml"), "--workflow-profile", str(PROFILE)]
        command += ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5", "--set-threads", *THREADS]
        self.run, self.cluster, self.output = run, cluster, run.workdir / "head.log"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *arguments],
                env=clean_environment() | cluster.environment | {"RLSAE_SAVE_SECONDS": "0"} | environment,
                stdout=file,
                stderr=file,
                # A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def said(self) -> str:
        return self.output.read_text()

    def finish(self) -> str:
        """Wait for the end, which must be a good one; what it said."""
        assert self.process.wait(timeout=1200) == 0, self.said() + self.cluster.logs()
        return self.said()

    def fail(self) -> str:
        """Wait for the end, which must be a bad one; what it said."""
        assert self.process.wait(timeout=300) == 1, self.said()
        return self.said()


def jobs(cluster: Cluster, run: Run) -> list[tuple[str, str, str]]:
    """Number, state and rule with wildcards of all jobs that Slurm was ever given from a folder, in that order."""
    listed = cluster.command("squeue", "--noheader", "--states=all", "--sort=i", "--format=%i|%T|%Z|%k").splitlines()
    found = [line.split("|", 3) for line in listed]
    return [(number, state, comment) for number, state, folder, comment in found if Path(folder) == run.workdir]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} seconds"
        time.sleep(0.2)
