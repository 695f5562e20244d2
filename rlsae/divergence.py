"""Stage `divergence`: how far each layer moved in a tuning, and which layers a study looks into.

    weight_l2_sum           Σ_p ‖θ_p^tuned - θ_p^base‖₂ over the parameters p of a layer (arXiv 2310.08164 section 3.2)
    weight_l2_relative      ‖θ^tuned - θ^base‖₂ / ‖θ^base‖₂ over all weights of a layer
    activation_l2_relative  Σ‖h^tuned - h^base‖ / Σ‖h^base‖ over the rows of the survey, resampled by document

`layers.parquet` holds one row per layer × measure, `chosen.json` the choice and its reason.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import safe_open

from rlsae.activations.store import ActivationStore
from rlsae.config import Choice
from rlsae.errors import RlsaeError
from rlsae.layout import folder_layer_count, positional_layers
from rlsae.resumable import Stage
from rlsae.statistics import RESAMPLES

MEASURES = ["weight_l2_sum", "weight_l2_relative", "activation_l2_relative"]


def build_divergence(
    settings: dict[str, Any], out: Path, work: Path | None, base: Path, tuned: Path, base_weights: Path, tuned_weights: Path,
    survey_base: Path, survey_tuned: Path, same_as: Path | None,
) -> None:  # fmt: skip
    """Measure every layer and choose.

    Args:
        settings: `layers` as in the study: a list, `all`, a choice, or `same_as`.
        base, tuned: artifacts of the policies, with the folders of their weights.
        survey_base, survey_tuned: their survey stores.
        same_as: divergence artifact of the study whose layers are taken over.
    """
    inputs = {"base": base, "tuned": tuned, "survey_base": survey_base, "survey_tuned": survey_tuned}
    if same_as:
        inputs["same_as"] = same_as
    with Stage("divergence", out, settings, inputs, work) as stage:
        sums, relative = weight_divergence(base_weights, tuned_weights)
        shift, resampled_RL = activation_divergence(ActivationStore(survey_base), ActivationStore(survey_tuned))
        tables = {"weight_l2_sum": sums, "weight_l2_relative": relative, "activation_l2_relative": shift}
        intervals = {"activation_l2_relative": np.quantile(resampled_RL, [0.025, 0.975], axis=0)}
        layers = layer_table(tables, intervals)
        chosen = choose(settings["layers"], tables, resampled_RL, same_as, folder_layer_count(base_weights))
        layers.to_parquet(stage.staging / "layers.parquet", index=False)
        layers.to_csv(stage.staging / "layers.tsv", sep="\t", index=False)
        (stage.staging / "chosen.json").write_text(json.dumps(chosen, indent=1) + "\n")
        ranking = {m: [int(i) for i in np.argsort(-np.asarray(tables[m]), kind="stable")] for m in MEASURES}
        stage.publish({"chosen_layers": chosen["layers"], "ranking": ranking, "choice_stability": chosen["stability"]})


def weight_divergence(base: Path, tuned: Path) -> tuple[list[float], list[float]]:
    """Both weight measures of each layer, one parameter in memory at a time.

    Raises:
        RlsaeError: the models differ in their parameters or shapes.
    """
    per_parameter: dict[int, float] = defaultdict(float)
    squares: dict[int, float] = defaultdict(float)
    base_squares: dict[int, float] = defaultdict(float)
    for name, layer, before, after in layer_parameters(base, tuned):
        if before.shape != after.shape:
            raise RlsaeError(f"{name}: shape {before.shape} in {base}, {after.shape} in {tuned}; the models cannot be compared")
        difference = after.astype(np.float64) - before.astype(np.float64)
        per_parameter[layer] += float(np.linalg.norm(difference))
        squares[layer] += float(np.square(difference).sum())
        base_squares[layer] += float(np.square(before.astype(np.float64)).sum())
    layers = range(len(per_parameter))
    return [per_parameter[n] for n in layers], [(squares[n] / base_squares[n]) ** 0.5 for n in layers]


def layer_parameters(base: Path, tuned: Path) -> Iterator[tuple[str, int, NDArray[Any], NDArray[Any]]]:
    """(name, layer, base, tuned) of every parameter that belongs to a layer: its name has the layer's number as a part."""
    before, after = weight_files(base), weight_files(tuned)
    if before.keys() != after.keys():
        differing = sorted(before.keys() ^ after.keys())
        raise RlsaeError(f"{base} and {tuned} differ in their parameters: {', '.join(differing[:5])}")
    for name in sorted(before):
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers:
            yield name, numbers[0], _tensor(before[name], name), _tensor(after[name], name)


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors file that holds each parameter of a transformers folder."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    if not found:
        raise RlsaeError(f"{folder} holds no safetensors weights")
    return found


def _tensor(file: Path, name: str) -> NDArray[Any]:
    with safe_open(file, framework="np") as tensors:
        return tensors.get_tensor(name)


def activation_divergence(base: ActivationStore, tuned: ActivationStore) -> tuple[list[float], NDArray[np.float64]]:
    """The activation measure of each layer, and its values in bootstrap resamples of the documents [resample, layer].

    Raises:
        RlsaeError: the stores hold different tokens.
    """
    if not np.array_equal(base.start, tuned.start) or not np.array_equal(base.group["token"][:], tuned.group["token"][:]):
        raise RlsaeError("the survey stores of base and tuned hold different tokens; both must come from one tokens artifact")
    documents = len(base.start) - 1
    document_of_row = np.repeat(np.arange(documents), np.diff(base.start))
    shift_DL, size_DL = np.zeros((documents, len(base.layers))), np.zeros((documents, len(base.layers)))
    for column, layer in enumerate(base.layers):
        step = base.acts(layer).chunks[0]
        for first in range(0, base.rows, step):
            rows = slice(first, min(first + step, base.rows))
            before, after = (s.read(layer, rows.start, rows.stop).astype(np.float64) for s in (base, tuned))
            shift = np.linalg.norm(after - before, axis=1)
            shift_DL[:, column] += np.bincount(document_of_row[rows], shift, documents)
            size_DL[:, column] += np.bincount(document_of_row[rows], np.linalg.norm(before, axis=1), documents)
    rng = np.random.default_rng(0)
    weights_RD = rng.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)
    resampled_RL = (weights_RD @ shift_DL) / (weights_RD @ size_DL)
    return [float(v) for v in shift_DL.sum(0) / size_DL.sum(0)], resampled_RL


def layer_table(tables: dict[str, list[float]], intervals: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    """One row per layer × measure: value, 95 % interval where one was measured, rank (1 = furthest)."""
    rows = []
    for measure, values in tables.items():
        rank = np.empty(len(values), int)
        rank[np.argsort(-np.asarray(values), kind="stable")] = np.arange(1, len(values) + 1)
        low, high = intervals.get(measure, np.full((2, len(values)), np.nan))
        rows += [
            {"layer": n, "measure": measure, "value": v, "ci_low": low[n], "ci_high": high[n], "rank": int(rank[n])}
            for n, v in enumerate(values)
        ]
    return pd.DataFrame(rows)


def choose(
    layers: Any, tables: dict[str, list[float]], resampled_RL: NDArray[np.float64], same_as: Path | None, count: int
) -> dict[str, Any]:
    """The layers of a study, why, and how stable the choice is (share of resamples that choose each).

    Raises:
        RlsaeError: the model has fewer layers than asked.
    """
    if same_as:
        return {
            "layers": json.loads((same_as / "chosen.json").read_text())["layers"],
            "why": "as in another study",
            "stability": None,
        }
    if layers == "all":
        return {"layers": list(range(count)), "why": "all layers", "stability": None}
    if isinstance(layers, list):
        if max(layers) >= count:
            raise RlsaeError(f"layers: layer {max(layers)} is asked for, the model has layers 0 to {count - 1}")
        return {"layers": sorted(set(layers)), "why": "listed in the configuration", "stability": None}
    choice = Choice.model_validate(layers)
    if choice.count > count:
        raise RlsaeError(f"layers.count: {choice.count} layers are asked for, the model has {count}")
    if choice.order in ("first", "last"):
        return {
            "layers": positional_layers(choice, count),
            "why": f"the {choice.order} {choice.count}",
            "stability": None,
        }
    sign = -1 if choice.order == "highest" else 1
    values = np.asarray(tables[choice.by])
    chosen = sorted(int(i) for i in np.argsort(sign * values, kind="stable")[: choice.count])
    why = f"{choice.order} {choice.by}"
    if not values.any():
        why = f"undetermined: {choice.by} is 0 in every layer; the first {choice.count} are taken"
    stability = None
    if choice.by == "activation_l2_relative":
        picked_RC = np.argsort(sign * resampled_RL, axis=1, kind="stable")[:, : choice.count]
        stability = {str(layer): float((picked_RC == layer).any(1).mean()) for layer in chosen}
    return {"layers": chosen, "why": why, "stability": stability}
