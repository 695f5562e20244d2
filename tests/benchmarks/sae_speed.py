"""How fast dictionaries train, beside the peers and the machine's limit: `python -m tests.benchmarks.sae_speed`.

Whole training steps on rows in memory, fed to each library's own trainer. The trainers of one shape and architecture take
turns, so that a busy moment of the machine meets all of them; ratios are of the times of one round. Peers run as shipped,
and again with the setting of matrix products that rlsae finds to be exact (`rlsae.compute`). The limit is the time of the
matrix products alone that a dense step needs, in the same rounds. Needs the peers' environment: `make peers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys

import torch

from rlsae import compute
from tests.benchmarks.sae_trainers import Options
from tests.interop import peers

LATENTS = {512: 2048, 128: 512}
"""By channels."""
STEPS = {"relu": {512: 8, 128: 40}, "topk": {512: 4, 128: 10}, "batchtopk": {512: 4, 128: 10}}
"""Of a round, by architecture and channels: about a second of the slowest peer."""
PEERS = {
    "relu": ["sae_lens", "dictionary_learning"],
    "topk": ["sae_lens", "dictionary_learning", "sparsify"],
    "batchtopk": ["sae_lens", "dictionary_learning"],
}


class Worker:
    """A trainer that waits for its turn."""

    def __init__(self, options: Options) -> None:
        self.options = options
        ours = options.library in ("rlsae", "products")
        command = [sys.executable if ours else str(peers.PYTHON), "-m", "tests.benchmarks.sae_trainers"]
        self.process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=peers.REPOSITORY,
        )

    def seconds(self) -> float:
        """Take a round; returns the seconds of a step."""
        assert self.process.stdin
        assert self.process.stdout
        print("go", file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line[0].isdigit():
                return float(line) / self.options.round_steps
        raise SystemExit(f"{self.options} ended before its turn; run it by hand to see why")

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def contenders(architecture: str, options: Options, given: str) -> dict[str, Options]:
    """Who takes turns, by name. `given`: the setting of matrix products that rlsae finds to be exact."""
    ours = dataclasses.replace(options, library="rlsae")
    with_library = {"rlsae": ours, "rlsae, bfloat16": dataclasses.replace(ours, precision="bfloat16")}
    for peer in PEERS[architecture]:
        with_library[peer] = dataclasses.replace(options, library=peer)
        with_library[f"{peer}, same products"] = dataclasses.replace(options, library=peer, precision=given)
    products = dataclasses.replace(options, library="products")
    with_library["five products"] = products
    with_library["five products in bfloat16"] = dataclasses.replace(products, precision="bfloat16")
    with_library["the encoder's product"] = dataclasses.replace(products, architecture="encoder")
    return with_library


def measure(found: dict[str, Options], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by contender and round; the first round of each warms up and is left out."""
    workers = {name: Worker(options) for name, options in found.items()}
    try:
        for worker in workers.values():
            worker.seconds()
        times: dict[str, list[float]] = {name: [] for name in workers}
        turns = random.Random(0)
        for _ in range(rounds):
            for name in turns.sample(list(workers), len(workers)):
                times[name].append(workers[name].seconds())
        return times
    finally:
        for worker in workers.values():
            worker.stop()


def ratio(times: dict[str, list[float]], name: str, ours: str = "rlsae") -> float:
    """How many times faster rlsae is than another, as the median over the rounds."""
    return statistics.median(other / own for other, own in zip(times[name], times[ours], strict=True))


def table(times: dict[str, list[float]], batch_rows: int, ours: str = "rlsae") -> None:
    print(f"| | thousand rows/s, median [slowest, fastest] | {ours} is so many times as fast |\n|---|---|---|")
    for name, seconds in times.items():
        rates = [batch_rows / value / 1e3 for value in seconds]
        print(
            f"| {name} | {statistics.median(rates):.1f} [{min(rates):.1f}, {max(rates):.1f}] | {ratio(times, name, ours):.2f} |"
        )


def report(times: dict[str, list[float]], batch_rows: int) -> None:
    table(times, batch_rows)
    shipped, given = (
        min(ratio(times, name) for name in times if name.startswith(tuple(PEERS["topk"])) and ("same" in name) == same)
        for same in (False, True)
    )
    print(f"\nAgainst the best peer as shipped {shipped:.2f}, with the same products {given:.2f}.")
    share = ratio(times, "five products in bfloat16", "rlsae, bfloat16")
    print(f"In bfloat16 {share:.2f} times the speed of its five products.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-rows", type=int, default=4096)
    parser.add_argument("--architectures", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--channels", nargs="+", type=int, default=list(LATENTS), choices=list(LATENTS))
    given = parser.parse_args()
    if not peers.PYTHON.exists():
        raise SystemExit(peers.MISSING)
    exact = "medium" if compute.medium_is_exact() else "highest"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, matrix products {exact}")
    for channels in given.channels:
        for architecture in given.architectures:
            steps = STEPS[architecture][channels]
            options = Options("", architecture, channels, LATENTS[channels], given.batch_rows, 1_000_000, round_steps=steps)
            print(f"\n### {architecture}, {channels} channels, {options.latents} latents, ", end="")
            print(f"batches of {given.batch_rows} rows, k = {options.k}, load average {os.getloadavg()[0]:.1f}\n", flush=True)
            report(measure(contenders(architecture, options, exact), given.rounds), given.batch_rows)


if __name__ == "__main__":
    main()
