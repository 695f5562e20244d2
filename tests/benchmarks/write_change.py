"""What the comparison of one layer and pair of dictionaries takes: `python -m tests.benchmarks.write_change`.

Random float16 rows of base and tuned in the page cache, 64 per document, and a pair of random TopK dictionaries: the linear
map, the changes of both, and the columns that describe them, step by step, with the peak memory of the process.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

# As the verbs of rlsae do, before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from rlsae import compute
from rlsae.activations.store import ActivationStore
from rlsae.comparison.agreement import agreement
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.matching import match
from rlsae.comparison.members import ROLES, measure
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.tags import tag_pair
from rlsae.comparison.write_change import write_changes
from rlsae.plants.plant import write_activations
from rlsae.sae.activation_functions import TopK
from rlsae.sae.dictionary import SparseAutoencoder

DOCUMENT = 64
BLOCK = 65_536
STEPS = ["linear map", "changes of both dictionaries", "firings of both on held-out rows, match", "agreement of the matched"]


def random_stores(folder: Path, rows: int, channels: int) -> dict[str, ActivationStore]:
    """Two stores of random rows that differ by a little noise."""
    rng = np.random.default_rng(0)
    base_ND = rng.standard_normal((rows, channels), np.float32)
    write_activations(folder / "base", base_ND, rows // DOCUMENT, {"role": "base"})
    for first in range(0, rows, BLOCK):
        base_ND[first : first + BLOCK] += 0.1 * rng.standard_normal(base_ND[first : first + BLOCK].shape, np.float32)
    write_activations(folder / "tuned", base_ND, rows // DOCUMENT, {"role": "tuned"})
    return {role: ActivationStore(folder / role) for role in ("base", "tuned")}


def random_dictionary(channels: int, latents: int, active: int, seed: int) -> SparseAutoencoder:
    directions_FD = torch.randn(latents, channels, generator=torch.Generator().manual_seed(seed)) / channels**0.5
    zeros = torch.zeros(latents), torch.zeros(channels)
    return SparseAutoencoder(directions_FD.T.contiguous(), zeros[0], directions_FD, zeros[1], activation=TopK(active))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000 // DOCUMENT * DOCUMENT)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--active", type=int, default=32, help="Active latents per row.")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    compute.configure(given.threads)
    where = compute.device()
    with tempfile.TemporaryDirectory() as folder:
        stores = random_stores(Path(folder), given.rows, given.channels)
        before = peak_gib()
        rows = PairedRows(stores["base"], stores["tuned"], 0)
        saes = {
            role: random_dictionary(given.channels, given.latents, given.active, seed).to(where)
            for seed, role in enumerate(stores)
        }
        times = [time.perf_counter()]
        maps = fit_linear_maps(rows, where)
        times.append(time.perf_counter())
        tag_pair(write_changes(saes, rows, maps, where)[0])
        times.append(time.perf_counter())
        base, tuned = (measure(saes[role], stores[role], 0, where) for role in ROLES)
        partners = match(base.decoder_FD, tuned.decoder_FD, base.alive, tuned.alive).partner
        times.append(time.perf_counter())
        agreement(saes, rows, {"base": partners, "tuned": np.argsort(partners)}, where)
        times.append(time.perf_counter())
    print(f"{given.rows:,} rows × {given.channels} channels, {given.latents} latents, {given.active} active, {where}")
    for step, seconds in zip(STEPS, np.diff(times), strict=True):
        print(f"{step:38}{seconds:7.1f} s")
    print(f"{'together':38}{times[-1] - times[0]:7.1f} s")
    print(f"peak memory {peak_gib():.2f} GiB (writing the rows: {before:.2f} GiB)")


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
