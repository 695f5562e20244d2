"""How well changes that are known are found: `python -m tests.benchmarks.plant`.

For each plant and architecture, dictionaries of base and tuned are trained and compared. The test of write changes stands
beside what is often used instead: the cosine of matched decoder rows, and one-dimensional latent scaling.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rlsae import compute
from rlsae.activations.store import ActivationStore
from rlsae.cli.options import as_text
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.matching import match
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.plant import Plant, read_truth, write_plant
from rlsae.comparison.plant_score import by_density, score
from rlsae.comparison.tags import tag_pair
from rlsae.comparison.write_change import MIN_FIRINGS, write_changes
from rlsae.config import AnyDictionary
from rlsae.expand import parse_settings
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import ROW_ORDER_SEED, centre_and_scale, new_members, train

PLANTS = {
    "at rest": {},
    "bulk 15°": {"drift": 15.0},
    "map of rank 4": {"linear_share": 0.1},
    "map of rank 8, bulk 8°": {"linear_share": 0.1, "linear_rank": 8, "drift": 8.0},
    "map of rank 16, bulk 15°": {"linear_share": 0.1, "linear_rank": 16, "drift": 15.0},
}
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"k": 8, "learning_rate": 1e-2},
    "batchtopk": {"k": 8, "learning_rate": 1e-2},
    "relu": {"l1": 0.02, "learning_rate": 1e-2},
    "tied_relu": {"l1": 0.02, "learning_rate": 1e-2},
}
SHARED = {"expansion": 8.0, "epochs": 4, "seeds": [0]}


def train_dictionary(recipe: dict[str, Any], activations: Path, where: torch.device) -> SparseAutoencoder:
    """A dictionary of a plant's rows, trained as the stage trains it."""
    entry = parse_settings(AnyDictionary, as_text(recipe))
    store = ActivationStore(activations)
    order = store.row_order(0, entry.batch_rows, ROW_ORDER_SEED, entry.epochs)
    mean_D, scale = centre_and_scale(store, 0, entry.normalize, where)
    members = new_members(entry, order.shape[1], activations.name, where)
    with Stage("dictionaries", activations / "dictionary", recipe, {}) as stage:
        train(members, order, entry, mean_D, scale, stage)
    return members[0].export().reading_raw_rows(mean_D, scale)


def compare(folder: Path, recipe: dict[str, Any], where: torch.device) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of each way to tag, and the truth with what the test covered and found."""
    rows = PairedRows(*(ActivationStore(folder / "activations" / role) for role in ("base", "tuned")), layer=0)
    saes = {role: train_dictionary(recipe, folder / "activations" / role, where) for role in ("base", "tuned")}
    maps = fit_linear_maps(rows, where)
    changes, rank = write_changes(saes, rows, maps, where)
    tags, _ = tag_pair(changes)
    decoders = {role: sae.directions().cpu().numpy() for role, sae in saes.items()}
    testable = {role: found.firings >= MIN_FIRINGS for role, found in changes.items()}
    ways = {
        "write change": {role: tags[role].tag for role in tags},
        "decoder cosine < 0.7": {
            role: _tag(testable[role], match(decoders[role], decoders[other], testable[role], testable[other]).cosine >= 0.7)
            for role, other in (("base", "tuned"), ("tuned", "base"))
        },
        "scale error < 0.5": {role: _tag(testable[role], found.scale_error >= 0.5) for role, found in changes.items()},
    }
    truth, scores = read_truth(folder), []
    for way, tag in ways.items():
        latents = pd.concat([pd.DataFrame({"role": role, "tag": tag[role]}) for role in tag], ignore_index=True)
        found, table = score(truth, latents, decoders)
        scores.append({"way": way, **asdict(found), "rank": rank})
        if way == "write change":
            tested = table
        else:
            scores[-1]["kind_accuracy"] = np.nan  # it tells no kinds
    return pd.DataFrame(scores), tested


def _tag(testable: np.ndarray, same: np.ndarray) -> np.ndarray:
    return np.where(testable, np.where(same, "unchanged", "changed"), "untestable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7], help="Seeds of the truth.")
    parser.add_argument("--architectures", nargs="+", default=["topk"], choices=list(RECIPES))
    parser.add_argument("--documents", type=int, default=2000, help="Documents of 100 rows.")
    parser.add_argument("--null", action="store_true", help="Plant no change of single directions.")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    compute.configure(given.threads)
    where = compute.device()
    scores, tables = [], []
    for name, options in PLANTS.items():
        for seed in given.seeds:
            plant = Plant(seed, documents=given.documents, **options)
            for architecture in given.architectures:
                with tempfile.TemporaryDirectory() as folder:
                    write_plant(plant.without_changes() if given.null else plant, Path(folder))
                    recipe = SHARED | RECIPES[architecture] | {"architecture": architecture}
                    found, table = compare(Path(folder), recipe, where)
                scores.append(found.assign(plant=name, architecture=architecture))
                tables.append(table.assign(architecture=architecture))
    groups = pd.concat(scores).groupby(["architecture", "plant", "way"], sort=False)
    print(groups.mean().join(groups.false_discovery.max().rename("worst_false_discovery")).round(3).to_string())
    for architecture, table in pd.concat(tables, ignore_index=True).groupby("architecture"):
        print(f"\n{architecture}, all plants\n{by_density(table).round(3).to_string()}")


if __name__ == "__main__":
    main()
