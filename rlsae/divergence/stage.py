"""Stage `divergence`: measure every layer, now and at the checkpoints on the way, and choose.

`layers.parquet` holds one row per layer × measure × component, `steps.parquet` the same for each published checkpoint,
`agreement.tsv` Kendall's τ between the measures, `chosen.json` the choice and its reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.artifacts import Manifest
from rlsae.compute import device
from rlsae.divergence import figures
from rlsae.divergence.activations import activation_divergence
from rlsae.divergence.choice import choose
from rlsae.divergence.function import Sample, function_divergence
from rlsae.divergence.table import Measured, layer_table, of_whole_layers, rank_agreement
from rlsae.divergence.weights import weight_divergence
from rlsae.layout import check_layers, folder_layer_count
from rlsae.models import load
from rlsae.progress import Progress
from rlsae.resumable import Stage
from rlsae.tuning.fixed_prompts import judged_by


@dataclass(frozen=True)
class Policy:
    """A policy with what is measured on it."""

    artifact: Path
    weights: Path
    """Its transformers folder."""
    survey: Path
    """Artifact of the activations of all its layers."""


def build_divergence(
    settings: dict[str, Any], out: Path, work: Path | None, base: Policy, tuned: Policy, checkpoints: dict[int, Path],
    tokens: Path, corpus: Path, reward_file: Path | None, same_as: Path | None,
) -> None:  # fmt: skip
    """Measure every layer and choose.

    Args:
        settings: `layers` as in the study: a list, `all`, a choice, or `same_as`.
        checkpoints: survey artifact of each published checkpoint of the tuning, by its step.
        tokens: tokens artifact of the surveys.
        corpus: corpus artifact of the tuning's prompts; reward_file: file or folder of its reward, where it has one.
        same_as: divergence artifact of the study whose layers are taken over.
    """
    inputs = {"base": base.artifact, "tuned": tuned.artifact, "tokens": tokens, "corpus": corpus}
    inputs |= {"survey_base": base.survey, "survey_tuned": tuned.survey}
    inputs |= {f"survey_{step}": survey for step, survey in checkpoints.items()}
    inputs |= {name: path for name, path in (("reward", reward_file), ("same_as", same_as)) if path}
    count = folder_layer_count(base.weights)
    check_layers("layers", settings["layers"], count)
    with Stage("divergence", out, settings, inputs, work) as stage:
        recipe = Manifest.read(tuned.artifact).parameters
        entry, reward = judged_by(tuned.artifact, reward_file)
        where = device()
        model, tokenizer = load(base.weights, where)
        sample = Sample(Tokens.open(tokens), tokenizer, corpus, reward, entry)
        base_store = ActivationStore(base.survey)
        progress = Progress("divergence", len(checkpoints) + 1, "policies")

        def measure(policy: Policy) -> list[Measured]:
            found = weight_divergence(base.weights, policy.weights)
            found += activation_divergence(base_store, ActivationStore(policy.survey))
            found += function_divergence(model, load(policy.weights, where)[0], sample)
            progress.update(1)
            return found

        _, rows = stage.load_state() or ({}, {})
        for step, survey in checkpoints.items():
            if str(step) not in rows:
                weights = tuned.artifact / "checkpoints" / str(step)
                rows[str(step)] = layer_table(measure(Policy(tuned.artifact, weights, survey))).to_dict("records")
                stage.save_state({}, rows)
        found = measure(tuned)
        layers, whole = layer_table(found), of_whole_layers(found)
        last = Manifest.read(tuned.survey).parameters["checkpoint"] or recipe["tuning"].get("batches", 0)
        by_step = {int(step): pd.DataFrame(table) for step, table in rows.items()} | {last: layers}
        steps = pd.concat([table.assign(step=step) for step, table in by_step.items()], ignore_index=True)
        steps = steps[["step", *layers.columns]]
        agreement = rank_agreement(found)
        chosen = choose(settings["layers"], whole, count, same_as)
        for name, table in (("layers", layers), ("steps", steps)):
            table.to_parquet(stage.staging / f"{name}.parquet", index=False)
        for name, table in (("layers", layers), ("steps", steps), ("agreement", agreement)):
            table.to_csv(stage.staging / f"{name}.tsv", sep="\t", index=False)
        (stage.staging / "chosen.json").write_text(json.dumps(chosen, indent=1) + "\n")
        figures.save(stage.staging / "figures", layers, steps, agreement, chosen["layers"])
        ranking = {measure: measured.ranking for measure, measured in whole.items()}
        stage.publish({"chosen_layers": chosen["layers"], "ranking": ranking, "choice_stability": chosen["stability"]})
