"""A real Slurm of one node on this machine, with fake GPUs: everything but its programs lies in one folder.

No systemd, no cgroups, no database. The node claims eight cores whatever the machine has, so that jobs run side by side.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests import debian

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "squeue", "munged"]
GPUS = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random"]
"""Any character device will do: jobs get its number in CUDA_VISIBLE_DEVICES, and torch finds no GPU behind it."""
CORES = 8
NAME = "test-node"


def cannot_install() -> str | None:
    """Install Slurm where it is missing; the reason where that cannot be done."""
    return debian.cannot_install(PROGRAMS, PACKAGES)


@dataclass
class Cluster:
    """The daemons of a cluster, between `start` and `stop`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def start(self) -> None:
        """Raises RuntimeError with the daemons' logs where the node does not come up."""
        self._configure()
        # munged refuses files of root unless it is told to, and logs to a terminal unless it is told where.
        self._run("munged", "--force", *(f"--{name}={self.folder / 'munge' / name.split('-')[0]}" for name in
                  ("socket", "key-file", "pid-file", "seed-file", "log-file")))  # fmt: skip
        self._run("slurmctld")
        self._run("slurmd", "-N", NAME)
        for _ in range(120):
            state = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=self._full(), capture_output=True, text=True)
            if state.stdout.strip() == "idle":
                return
            time.sleep(0.25)
        raise RuntimeError(f"the node did not come up: {state.stdout}{state.stderr}{self.logs()}")

    def stop(self) -> None:
        """Cancel what still runs, then end the daemons, whose process ids they noted themselves."""
        subprocess.run(["scancel", "--user", str(os.geteuid())], env=self._full(), capture_output=True)
        for pid_file in (self.folder / "slurmd.pid", self.folder / "slurmctld.pid", self.folder / "munge/pid"):
            if pid_file.exists():
                end(int(pid_file.read_text()))

    def logs(self) -> str:
        return "".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))

    def command(self, *arguments: str) -> str:
        """What one of Slurm's commands says."""
        return subprocess.run(arguments, env=self._full(), capture_output=True, text=True, check=True).stdout

    def _full(self) -> dict[str, str]:
        return os.environ | self.environment

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self._full(), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}{self.logs()}")

    def _configure(self) -> None:
        for name in ("munge", "state", "spool", "bin"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        # The executor takes SLURM_CONF from the environment of srun, which would then look into /etc/slurm.
        srun = self.folder / "bin/srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        host, user = socket.gethostname(), subprocess.check_output(["id", "--user", "--name"], text=True).strip()
        controller, node = free_ports(2)
        (self.folder / "slurm.conf").write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
# finished jobs stay in squeue, which is asked for their state
MinJobAge=3600
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=2
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd.log
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool
NodeName={NAME} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={CORES} RealMemory=64000 Gres=gpu:{len(GPUS)}
PartitionName=test Nodes={NAME} Default=YES
"""
        )
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in GPUS))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def end(pid: int) -> None:
    """End a daemon, and wait until it is gone."""
    for signal_number, tries in ((15, 100), (9, 50)):
        for _ in range(tries):
            try:
                os.kill(pid, signal_number if _ == 0 else 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
