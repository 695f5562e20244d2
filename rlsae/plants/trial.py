"""One trial: plant known changes, train the dictionaries, tag in several ways, and count what is right."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from rlsae.activations.store import ActivationStore
from rlsae.comparison.members import ROLES
from rlsae.comparison.paired_rows import PairedRows
from rlsae.compute import device
from rlsae.plants.plant import OLD, TRUTH, Plant, read_truth, write_plant
from rlsae.plants.score import score
from rlsae.plants.training import train_method
from rlsae.plants.trials import NULL, RECIPES, STAGEWISE, VARIATIONS, Trial
from rlsae.plants.ways import CROSSCODER_WAYS, TEST, tag
from rlsae.resumable import Stage

SCORES, DIRECTIONS = "scores.parquet", "directions.parquet"


def run_trial(trial: Trial, out: Path, work: Path | None) -> None:
    """Write `scores.parquet`, one row per way to tag, and `directions.parquet`, the truth with what each way found."""
    with Stage("plants", out, asdict(trial), {}, work) as stage:
        where = device()
        folder = stage.work / "plant"
        if not (folder / TRUTH).exists():
            plant = Plant(trial.seed, documents=trial.documents, **VARIATIONS[trial.variation.removeprefix(NULL)])
            plant = plant.without_changes() if trial.variation.startswith(NULL) else plant
            write_plant(plant, folder, old=trial.method == STAGEWISE)
        stores = {role: ActivationStore(folder / "activations" / role) for role in ROLES}
        old = {role: ActivationStore(folder / OLD / role) for role in ROLES if (folder / OLD).exists()}
        trained = train_method(trial.method, stores, old, folder)
        truth = read_truth(folder)
        if RECIPES[trial.method].get("reads") == "difference":
            truth = truth.of_difference()
        tagged = tag(trained, PairedRows(stores["base"], stores["tuned"], 0), where)
        scores, directions = [], []
        for way, latents in tagged.ways.items():
            found, table = score(truth, latents, tagged.directions)
            scores.append({**asdict(trial), "way": way, **asdict(found), "rank": tagged.rank})
            if not (way.startswith(TEST) or way == CROSSCODER_WAYS[0]):
                scores[-1]["kind_accuracy"] = float("nan")  # it tells no kinds
            directions.append(table.assign(**asdict(trial), way=way))
        pd.DataFrame(scores).to_parquet(stage.staging / SCORES, index=False)
        pd.concat(directions).to_parquet(stage.staging / DIRECTIONS, index=False)
        stage.details["device"] = str(where)
        stage.publish({entry["way"]: {key: _number(entry[key]) for key in asdict(found)} for entry in scores})


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
