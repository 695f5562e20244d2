"""Disjoint documents of one model, which differ in nothing but chance: `python -m tests.benchmarks.halves STORE SAES...`.

STORE is an activations artifact, SAES are dictionaries artifacts on it. The documents are dealt into two halves; the rows
of each are regressed on their own code, and the writes compared by the test of write changes. Expected: no tags, and a mean
square of the changes as large as the variance over documents promises (ratio 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from rlsae import compute
from rlsae.activations.store import ActivationStore
from rlsae.comparison.code import encode
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.tags import benjamini_hochberg, minimum_effect
from rlsae.comparison.write_change import (
    MIN_FIRINGS,
    Batches,
    CodedBatch,
    Regression,
    cluster_variance,
    p_values,
    regress,
)
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import load_members


def coded(sae: SparseAutoencoder, rows: PairedRows, half: int, mean_D: torch.Tensor) -> Batches:
    """The rows of every second group of documents, with their code."""

    def batches() -> Iterator[CodedBatch]:
        for group, acts_BD, _, _ in rows.batches(torch.device("cpu")):
            if group % 2 == half:
                yield CodedBatch(group, encode(sae, acts_BD), acts_BD - mean_D)

    return batches


@torch.inference_mode()
def compare_halves(sae: SparseAutoencoder, rows: PairedRows) -> dict[str, float]:
    """Tags and calibration of one dictionary between two halves of the documents."""
    mean_D = torch.from_numpy(rows.base.statistics(rows.layer)[0]).float()
    identity_DD = torch.eye(rows.channels, dtype=torch.float64)
    fits: list[Regression] = []
    variance_F = torch.zeros(sae.latents, dtype=torch.float64)
    for half in range(2):
        batches = coded(sae, rows, half, mean_D)
        fits.append(regress(batches))
        of_half_F, freedom = cluster_variance(batches, fits[half], identity_DD)
        variance_F += of_half_F
    own, other = fits
    tested_F = (torch.minimum(own.firings_F, other.firings_F) >= MIN_FIRINGS).numpy()
    length_F = own.writes_FE.norm(dim=1)
    change = ((other.writes_FE - own.writes_FE).norm(dim=1) / length_F).numpy()[tested_F]
    variance = (variance_F / length_F.square()).numpy()[tested_F]
    tolerance = minimum_effect(change)
    q = benjamini_hochberg(p_values(change, variance, freedom, tolerance))
    return {
        "tested": int(tested_F.sum()),
        "tagged": int((q <= 0.05).sum()),
        "median_change": float(np.median(change)),
        "minimum_effect": tolerance,
        "ratio": float(np.square(change).mean() / variance.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("dictionaries", type=Path, nargs="+")
    given = parser.parse_args()
    compute.configure()
    store = ActivationStore(given.store)
    print(
        "| dictionary | seed | tested | tagged | median change | τ | mean square over variance |\n|---|---|---|---|---|---|---|"
    )
    for folder in given.dictionaries:
        layer = int(folder.parent.name.removeprefix("layer"))
        rows = PairedRows(store, store, layer)
        for seed, path in load_members(folder).items():
            found = compare_halves(SparseAutoencoder.load(path), rows)
            numbers = [f"{found[key]:.3f}" for key in ("median_change", "minimum_effect", "ratio")]
            print(f"| layer {layer}, {folder.name} | {seed} | {found['tested']} | {found['tagged']} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
