"""How fast crosscoders train, beside a published one and the limit: `python -m tests.benchmarks.crosscoder_speed FOLDER`.

FOLDER holds crosscoder.py and utils.py of ckkissane/crosscoder-model-diff-replication. Rounds and the limit as in
`tests.benchmarks.sae_speed`; the limit's products are those of rows of both models side by side. Needs `make peers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

import torch

from rlsae import compute
from tests.benchmarks.sae_speed import LATENTS, measure, ratio, table
from tests.benchmarks.sae_trainers import Options
from tests.interop import peers

ARCHITECTURES = ("relu", "topk", "batchtopk")
STEPS = {512: 4, 128: 20}
"""Of a round, by channels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the published implementation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-rows", type=int, default=4096)
    given = parser.parse_args()
    if not peers.PYTHON.exists():
        raise SystemExit(peers.MISSING)
    exact = "medium" if compute.medium_is_exact() else "highest"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, matrix products {exact}")
    for channels, latents in LATENTS.items():
        options = Options("", "relu", channels, latents, given.batch_rows, 1_000_000, crosscoder=given.folder)
        options = dataclasses.replace(options, round_steps=STEPS[channels])
        found = {name: dataclasses.replace(options, library="rlsae", architecture=name, k=32) for name in ARCHITECTURES}
        found["published"] = dataclasses.replace(options, library="crosscoder")
        found["five products"] = dataclasses.replace(options, library="products", precision=exact)
        print(f"\n### two models of {channels} channels, {latents} latents, batches of {given.batch_rows} rows, ", end="")
        print(f"k = {options.k}, load average {os.getloadavg()[0]:.1f}\n", flush=True)
        times = measure(found, given.rounds)
        table(times, given.batch_rows, ours="relu")
        for name in ARCHITECTURES:
            limit, published = ratio(times, "five products", name), ratio(times, "published", name)
            print(f"{name}: {limit:.2f} of the products alone, {published:.2f} times as fast as the published one")


if __name__ == "__main__":
    main()
