"""Whether the order of the layers repeats over seeds of a tuning: `python -m tests.benchmarks.divergence_seeds PREFIX...`.

A method is the studies whose names begin with a prefix and differ in the seed. τ is the mean of Kendall's τ-b between the
orders of the layers by each two seeds; "furthest" the layer furthest from 0 in each seed; "spread" the largest distance over
the smallest, mean of the seeds. Made for the prefixes tunings-tuning-ppo and tunings-tuning-dpo of studies/tunings-imdb.yaml.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from rlsae.divergence.figures import whole_layers
from rlsae.divergence.table import MEASURES


def distances(folder: Path) -> pd.DataFrame:
    """How far each layer (column) is from 0 by each measure (row)."""
    layers = whole_layers(pd.read_parquet(folder / "layers.parquet"))
    return layers.pivot_table(index="measure", columns="layer", values="value").abs()


def summary(seeds_SL: np.ndarray) -> str:
    """τ, furthest layers and spread of one measure, as cells: S seeds, L layers."""
    tau = np.mean([kendalltau(one_L, other_L).statistic for one_L, other_L in combinations(seeds_SL, 2)])
    furthest = ", ".join(str(layer) for layer in seeds_SL.argmax(axis=1))
    spread = (seeds_SL.max(axis=1) / seeds_SL.min(axis=1)).mean()
    return f"{tau:.2f} | {furthest} | {spread:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("methods", nargs="+", metavar="PREFIX")
    options = parser.parse_args()
    studies = options.results / "divergence"
    found = {}
    for method in options.methods:
        folders = sorted(studies.glob(f"{method}*"))
        if len(folders) < 2:
            parser.error(f"{method}: {len(folders)} studies in {studies} begin with it; expected two or more")
        found[method] = [distances(folder) for folder in folders]
    print("| measure |", " | ".join(f"{method}: τ | furthest | spread" for method in found), "|")
    print("|---" * (1 + 3 * len(found)) + "|")
    for measure in MEASURES:
        cells = [summary(np.stack([seed.loc[measure] for seed in seeds])) for seeds in found.values()]
        print(f"| `{measure}` |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
