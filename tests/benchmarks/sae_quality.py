"""How good dictionaries become, beside the peers, at an equal budget: `python -m tests.benchmarks.sae_quality`.

Every trainer sees the same rows in the same order, with the same width, k (of relu: the same L0, by its weight of L1), learning
rate and schedule; three seeds. `rows`: held-out rows of the same kind, the share of variance left unexplained (fvu) and the
share of dead latents. `plant`: rows made of known directions, and the share of them that some latent writes with a cosine of
at least 0.9.
Needs the peers' environment: `make peers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.external import load_external
from tests.benchmarks.sae_trainers import Options
from tests.interop import peers

SEEDS = (0, 1, 2)
TRUTH = 1
"""Seed of the plant that is scored; settings were chosen on that of seed 0."""
L0_TOLERANCE = 0.05
PEERS = {
    "relu": ["sae_lens", "dictionary_learning"],
    "topk": ["sae_lens", "dictionary_learning", "sparsify"],
    "batchtopk": ["sae_lens", "dictionary_learning"],
    "matryoshka": [],
    "gated": [],
    "jumprelu": [],
    "tied_relu": [],
}


@dataclasses.dataclass(frozen=True)
class Plant:
    """Rows made of known directions: each is active with a small probability, by an amplitude between 0.5 and 1.5."""

    channels: int
    directions: int
    active: float

    def truth(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return normalize(torch.randn(self.directions, self.channels, generator=generator), dim=1)

    def rows(self, count: int, seed: int, truth_GD: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        rows_ND = torch.empty(count, self.channels)
        for first in range(0, count, 8192):
            size = (min(8192, count - first), self.directions)
            active_BG = torch.rand(size, generator=generator) < self.active / self.directions
            rows_ND[first : first + 8192] = (active_BG * (0.5 + torch.rand(size, generator=generator))) @ truth_GD
        return rows_ND


PLANTED = Plant(channels=64, directions=256, active=3)
MIXTURE = Plant(channels=512, directions=4096, active=48)
"""More directions than any dictionary has latents, as in a language model."""


def normalised(rows_ND: torch.Tensor) -> torch.Tensor:
    """Centred, with a mean variance of 1 per channel."""
    centred_ND = rows_ND - rows_ND.mean(0)
    return centred_ND / centred_ND.square().mean().sqrt()


def trained(options: Options, folder: Path) -> SparseAutoencoder:
    """Run a trainer with the interpreter of its library."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "sae"
    python = sys.executable if options.library == "rlsae" else str(peers.PYTHON)
    text = json.dumps(dataclasses.asdict(dataclasses.replace(options, out=str(out))))
    command = [python, "-m", "tests.benchmarks.sae_trainers", text]
    done = subprocess.run(command, cwd=peers.REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{options} failed:\n{done.stderr[-2000:]}")
    return load_external(out)


@torch.inference_mode()
def scores(sae: SparseAutoencoder, rows_ND: torch.Tensor, truth_GD: torch.Tensor) -> dict[str, float]:
    """`fvu`, `l0`, `dead_share` on these rows, and the share of planted directions that are `recovered`."""
    error, active, fired_F = 0.0, 0, torch.zeros(sae.latents, dtype=torch.bool)
    for acts_BD in rows_ND.split(4096):
        latents_BF = sae.encode(acts_BD)
        error += (sae.decode(latents_BF) - acts_BD).double().square().sum().item()
        active += int(torch.count_nonzero(latents_BF))
        fired_F |= (latents_BF > 0).any(0)
    variance = (rows_ND - rows_ND.mean(0)).double().square().sum().item()
    nearest_G = (sae.directions() @ truth_GD.T).max(0).values
    return {
        "fvu": error / variance,
        "l0": active / len(rows_ND),
        "dead_share": 1 - fired_F.double().mean().item(),
        "recovered": (nearest_G >= 0.9).double().mean().item(),
    }


def at_the_wanted_l0(options: Options, rows_ND: torch.Tensor, truth_GD: torch.Tensor, folder: Path) -> Options:
    """The weight of L1 at which held-out L0 is k, found by halving an interval of its logarithm."""
    low, high = 1e-4, 10.0
    for _ in range(12):
        options = dataclasses.replace(options, l1=float(np.sqrt(low * high)))
        l0 = scores(trained(options, folder), rows_ND, truth_GD)["l0"]
        if abs(l0 / options.k - 1) <= L0_TOLERANCE:
            return options
        low, high = (options.l1, high) if l0 > options.k else (low, options.l1)
    raise SystemExit(f"{options.library}: no weight of L1 gives an L0 of {options.k}; the last gave {l0:.1f}")


def compare(plant: Plant, options: Options, rows: int, architectures: list[str], folder: Path) -> None:
    """Train every contender on the plant and print a table of medians over the seeds."""
    truth_GD = plant.truth(TRUTH)
    both_ND = normalised(plant.rows(rows + rows // 10, TRUTH, truth_GD))
    file, held_out_ND = folder / "rows.npy", both_ND[rows:]
    np.save(file, both_ND[:rows].numpy())
    options = dataclasses.replace(options, rows=str(file))
    print("| | fvu | L0 | dead share | recovered | rlsae's fvu over theirs |\n|---|---|---|---|---|---|")
    for architecture in architectures:
        medians: dict[str, float] = {}
        for library in ["rlsae", *PEERS[architecture]]:
            own = dataclasses.replace(options, library=library, architecture=architecture)
            if architecture in ("relu", "tied_relu", "gated"):
                own = at_the_wanted_l0(own, held_out_ND, truth_GD, folder)
            runs = [trained(dataclasses.replace(own, seed=seed), folder) for seed in SEEDS]
            found = [scores(sae, held_out_ND, truth_GD) for sae in runs]
            medians[library] = statistics.median(run["fvu"] for run in found)
            cells = [spread([run[name] for run in found]) for name in ("fvu", "l0", "dead_share", "recovered")]
            print(
                f"| {architecture}, {library} | {' | '.join(cells)} | {medians['rlsae'] / medians[library]:.3f} |", flush=True
            )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--architectures", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--planted-learning-rate", type=float, default=1e-2)
    given = parser.parse_args()
    if not peers.PYTHON.exists():
        raise SystemExit(peers.MISSING)
    with tempfile.TemporaryDirectory() as folder:
        batch_rows = min(1024, given.rows // 8)
        steps = 4 * (given.rows // batch_rows)
        print(f"\n### Plant: {PLANTED}, {given.rows} rows four times, 512 latents\n")
        options = Options("", "", PLANTED.channels, 512, batch_rows, steps, k=3, learning_rate=given.planted_learning_rate)
        compare(PLANTED, options, given.rows, given.architectures, Path(folder))
        print(f"\n### Rows: {MIXTURE}, {given.rows} rows four times, 2048 latents, k = 32\n")
        options = Options("", "", MIXTURE.channels, 2048, batch_rows, steps, k=32, learning_rate=given.learning_rate)
        compare(MIXTURE, options, given.rows, [a for a in given.architectures if PEERS[a]], Path(folder))


if __name__ == "__main__":
    main()
