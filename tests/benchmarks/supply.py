"""How fast a store feeds the training of a dictionary: `python -m tests.benchmarks.supply`.

A store of 262,144 random rows in the page cache, a tenth of them held out. First its shuffled batches alone; then whole
training steps fed from it, in turn with steps fed with one batch that stays in memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

# As the verbs of rlsae do, before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor

from rlsae import compute
from rlsae.activations import store as store_module
from rlsae.activations.store import ActivationStore
from rlsae.config import TiedReluDictionary
from rlsae.sae import train
from rlsae.sae.tied_relu import TiedRelu
from tests.unit.small_artifacts import random_documents, tokens_of, write_store

ROWS, DOCUMENT = 262_144, 64
CHANNELS = (512, 128)
BATCHES = (1024, 4096)
DICTIONARIES = ((512, 1), (512, 4), (128, 4))
"""Channels and expansion."""
WINDOWS = 2
"""Windows of the store that a round of training reads."""


def new_store(folder: Path, channels: int) -> ActivationStore:
    """A store of one layer, read once, so that it lies in the page cache."""
    tokens = tokens_of(random_documents([DOCUMENT] * (ROWS // DOCUMENT)), np.arange(ROWS // DOCUMENT) % 10 == 9)
    rows_ND = np.random.default_rng(0).standard_normal((ROWS, channels), np.float32).astype(np.float16)
    store = ActivationStore(write_store(folder / str(channels), tokens, {0: rows_ND}, rows_per_part=ROWS, dtype="float16"))
    store.read(0, 0, store.rows)
    return store


def streamed(yes: bool) -> Any:
    """Within the context layers do not stay in memory, as those do that are too large."""
    return mock.patch.object(store_module, "RESIDENT_BYTES", 0) if yes else nullcontext()


def rows_per_second(store: ActivationStore, batch_rows: int, seed: int) -> float:
    order = store.row_order(0, batch_rows, seed, epochs=1)
    start = time.perf_counter()
    rows = sum(len(batch) for batch in order.batches())
    return rows / (time.perf_counter() - start)


class Trainer:
    """One member of a dictionary and its optimizer."""

    def __init__(self, channels: int, entry: TiedReluDictionary, where: torch.device) -> None:
        self.member = TiedRelu(channels, round(entry.expansion * channels), entry, 0, where)
        self.optimizer = train._adam(self.member.parameters(), entry.learning_rate)

    def seconds(self, batches: Iterator[Tensor]) -> float:
        """What getting a batch and a step on it take."""
        start = time.perf_counter()
        self.member.backward(next(batches))
        self.optimizer.step()
        self.member.constrain()
        return time.perf_counter() - start


def step_times(store: ActivationStore, expansion: float, where: torch.device, seed: int) -> tuple[float, float]:
    """Mean seconds of a step fed from the store and of one fed from memory, which alternate."""
    entry = TiedReluDictionary(expansion=expansion)
    channels = store.acts(0).shape[1]
    mean_D, scale = train.centre_and_scale(store, 0, entry, where)
    order = store.row_order(0, entry.batch_rows, seed, epochs=3)
    from_store = train._normalised(order, 0, mean_D, scale, where)
    first = sum(batches for epoch, _, batches in order.windows if epoch == 0)
    for _ in islice(from_store, first):  # what stays in memory lies there after the first epoch
        pass
    fixed_BD = torch.randn(entry.batch_rows, channels, device=where)
    from_memory = iter(lambda: fixed_BD, None)
    fed, unfed = Trainer(channels, entry, where), Trainer(channels, entry, where)
    for trainer in (fed, unfed):
        trainer.seconds(from_memory)
    steps = sum(batches for _, _, batches in order.windows[:WINDOWS])
    times = np.array([(fed.seconds(from_store), unfed.seconds(from_memory)) for _ in range(steps)])
    return tuple(times.mean(0))


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = range(parser.parse_args().rounds)
    compute.configure()
    where = compute.device()
    with tempfile.TemporaryDirectory() as folder:
        stores = {channels: new_store(Path(folder), channels) for channels in CHANNELS}
        rates: dict[tuple[int, int], list[float]] = {(c, b): [] for c in CHANNELS for b in BATCHES}
        for seed in rounds:
            for (channels, batch_rows), values in rates.items():
                with streamed(True):
                    values.append(rows_per_second(stores[channels], batch_rows, seed))
        print(
            f"\n{torch.get_num_threads()} threads, torch {torch.__version__} on {where}, load average {os.getloadavg()[0]:.1f}"
        )
        print("\n| channels | rows of a batch | million rows/s, median [slowest, fastest] | GB/s |\n|---|---|---|---|")
        for (channels, batch_rows), values in rates.items():
            gigabytes = statistics.median(values) * channels * 2 / 1e9
            print(f"| {channels} | {batch_rows} | {spread([v / 1e6 for v in values], '.2f')} | {gigabytes:.2f} |")

        shapes = [(*shape, way) for shape in DICTIONARIES for way in ("in memory", "streamed")]
        times: dict[tuple[int, int, str], list[tuple[float, float]]] = {shape: [] for shape in shapes}
        for seed in rounds:
            for (channels, expansion, way), values in times.items():
                with streamed(way == "streamed"):
                    values.append(step_times(stores[channels], expansion, where, seed))
    print(f"\nfp32 matmul {torch.get_float32_matmul_precision()}, {load()}")
    print(
        "\n| dictionary | layer | ms per step from the store | one batch | store / one batch, by round |\n|---|---|---|---|---|"
    )
    for (channels, expansion, way), values in times.items():
        fed, unfed = ([1e3 * value[place] for value in values] for place in (0, 1))
        ratios = [one / other for one, other in values]
        print(f"| {channels} × {expansion} | {way} | {spread(fed, '.1f')} | {spread(unfed, '.1f')} | {spread(ratios, '.2f')} |")


if __name__ == "__main__":
    main()
