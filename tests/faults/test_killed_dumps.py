"""A dump that is killed again and again, in one part or in several at once, ends with the store of an uninterrupted one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rlsae.activations.store import STORE, Geometry
from rlsae.cli import app
from rlsae.resumable import OUTPUTS
from tests.faults.artifacts import differing_files
from tests.unit.small_artifacts import DUMP, random_documents, tokens_of, write_policy, write_tokens
from tests.workflow.conftest import clean_environment

SHARD_ROWS, SHARDS, CHANNELS = 128, 63, 32
ROWS = SHARDS * SHARD_ROWS - 50
"""The last shard is shorter."""
CPU = {"RLSAE_DEVICE": "cpu"}


@dataclass
class Dump:
    """The work folder of a dump in some parts, each of them a process of its own."""

    inputs: Path
    folder: Path
    parts: int

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def out(self) -> Path:
        return self.folder / "activations"

    def stamp(self, part: int) -> Path:
        return self.folder / f"part-{part}.json"

    def log(self, part: int) -> Path:
        return self.folder / f"part-{part}.log"

    def shared(self) -> list[str | Path]:
        rows_per_part = SHARDS // self.parts * SHARD_ROWS
        assert Geometry.of(CHANNELS, 2, rows_per_part).shard_rows == SHARD_ROWS
        settings = json.dumps(DUMP | {"rows": ROWS, "rows_per_part": rows_per_part})
        options = ["--settings", settings, "--policy", self.inputs / "models/tiny", "--tokens", self.inputs / "tokens/random"]
        return [*options, "--work", self.work]

    def extract(self, part: int) -> list[str]:
        options = ["--part", part, "--stamp", self.stamp(part), "--weights", self.inputs / "models/tiny/model", "--threads", 1]
        return ["extract", *map(str, [*self.shared(), *options])]

    def publish(self) -> Path:
        stamps = [option for part in range(self.parts) for option in ("--stamp", self.stamp(part))]
        run_here(["consolidate", *map(str, [*self.shared(), *stamps, "--out", self.out])])
        return self.out

    def start(self, part: int) -> subprocess.Popen[bytes]:
        environment = clean_environment() | CPU | {"PYTHONPATH": str(Path(__file__).parents[2])}
        with self.log(part).open("wb") as file:
            command = [sys.executable, "-m", "rlsae", *self.extract(part)]
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def unfinished(self) -> list[int]:
        return [part for part in range(self.parts) if not self.stamp(part).exists()]

    def part_of(self, first: int) -> int:
        return first // SHARD_ROWS // (SHARDS // self.parts)

    def done(self) -> set[int]:
        """First rows of the shards that count as done."""
        return {int(path.name) for path in (self.work / "done").glob("*") if path.name.isdigit()}

    def done_of(self, part: int) -> int:
        return sum(self.part_of(first) == part for first in self.done())

    def written(self) -> dict[int, list[tuple[int, int]]]:
        """When the files of each shard were written, by its first row."""
        found: dict[int, list[tuple[int, int]]] = {}
        for path in sorted(self.work.glob(f"{OUTPUTS}/{STORE}/layer/*/acts/c/*/0")):
            status = path.stat()
            found.setdefault(int(path.parent.name) * SHARD_ROWS, []).append((status.st_ino, status.st_mtime_ns))
        return found


def run_here(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments, env=CPU)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, random_model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_policy(folder / "models/tiny", random_model("gpt_neox"), tokenizer)
    lengths = np.random.default_rng(0).integers(1, 65, 300)
    assert sum(lengths) > ROWS
    write_tokens(folder / "tokens/random", tokens_of(random_documents(lengths)))
    return folder


def uninterrupted(inputs: Path, parts: int) -> Path:
    """The artifact of a dump whose parts ran in this process, one after the other."""
    dump = Dump(inputs, inputs / f"uninterrupted-{parts}", parts)
    if not dump.out.exists():
        for part in range(parts):
            run_here(dump.extract(part))
        dump.publish()
    return dump.out


def killed(dump: Dump, part: int, process: subprocess.Popen[bytes], shards: int, delay: float) -> bool:
    """`kill -9` a part some time after it has begun and has marked so many shards as done; False if it ended before."""
    while process.poll() is None and not ("device:" in dump.log(part).read_text() and dump.done_of(part) >= shards):
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    code = process.wait()
    assert code in (0, -signal.SIGKILL), dump.log(part).read_text()
    return code != 0


def run_and_kill(dump: Dump, rng: random.Random, kills: int) -> int:
    """Start all unfinished parts and kill up to so many of them; returns how many were killed."""
    processes = {part: dump.start(part) for part in dump.unfinished()}
    victims = rng.sample(sorted(processes), min(kills, len(processes)))
    moments = {part: (dump.done_of(part) + rng.randrange(3), rng.choice([0, rng.uniform(0, 0.1)])) for part in victims}
    with ThreadPoolExecutor(len(processes)) as pool:
        results = list(pool.map(lambda part: killed(dump, part, processes[part], *moments[part]), victims))
    for part in processes.keys() - set(victims):
        assert processes[part].wait() == 0, dump.log(part).read_text()
    return sum(results)


@pytest.mark.parametrize(
    ("parts", "kills"),
    [(1, 1), (3, 2), pytest.param(1, 10, marks=pytest.mark.slow), pytest.param(3, 10, marks=pytest.mark.slow)],
)
def test_a_dump_killed_at_random_moments_ends_as_if_never_killed(inputs, tmp_path, parts, kills):
    rng = random.Random(f"{parts} {kills}")
    dump = Dump(inputs, tmp_path, parts)
    left = kills
    while dump.unfinished():
        done, before = dump.done(), dump.written()
        left -= run_and_kill(dump, rng, left)
        after = dump.written()
        assert [first for first in done if after[first] != before[first]] == [], "shards that were done are written again"
        unmarked = [dump.part_of(first) for first in after.keys() - dump.done()]
        assert len(unmarked) == len(set(unmarked)), "more than one shard of a part has to be written again"
    assert left < kills
    assert dump.done() == set(range(0, ROWS, SHARD_ROWS))
    assert differing_files(uninterrupted(inputs, parts), dump.publish()) == []
