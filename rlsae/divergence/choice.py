"""Which layers a study looks into, why, and how sure that choice is. Shapes: L layers, R resamples, C chosen layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlsae.config import Choice
from rlsae.divergence.table import Measured
from rlsae.layout import positional_layers


def choose(layers: Any, found: Mapping[str, Measured], count: int, same_as: Path | None) -> dict[str, Any]:
    """The content of `chosen.json`.

    Args:
        layers: as in the study: a list, `all`, a choice, or `same_as`.
        found: what was measured of whole layers, by measure.
        count: layers of the model.
        same_as: divergence artifact of the study whose layers are taken over.

    Returns:
        `layers`; `why`; `determined`: whether the measure tells them from those that were not chosen; `stability`: share of
        bootstrap resamples that choose each, None where nothing was sampled.
    """
    if same_as:
        taken = json.loads((same_as / "chosen.json").read_text())
        return {"layers": taken["layers"], "why": "as in another study", "determined": True, "stability": None}
    if layers == "all":
        return _given(list(range(count)), "all layers")
    if isinstance(layers, list):
        return _given(sorted(set(layers)), "listed in the configuration")
    choice = Choice.model_validate(layers)
    if choice.order in ("first", "last"):
        return _given(positional_layers(choice, count), f"the {choice.order} {choice.count}")
    return by_measure(choice, found[choice.by])


def _given(layers: list[int], why: str) -> dict[str, Any]:
    return {"layers": layers, "why": why, "determined": True, "stability": None}


def by_measure(choice: Choice, measured: Measured) -> dict[str, Any]:
    """The layers that moved furthest, or least."""
    sign = -1 if choice.order == "highest" else 1
    order = np.argsort(sign * measured.distance_L, kind="stable")
    chosen = sorted(order[: choice.count].tolist())
    why, determined = f"{choice.order} {choice.by}", True
    last = measured.distance_L[order[choice.count - 1]]
    tied = np.flatnonzero(measured.distance_L == last).tolist()
    if set(tied) - set(chosen):
        determined = False
        alike = ", ".join(map(str, tied))
        why = f"undetermined: {choice.by} is {last:.3g} in layers {alike} alike; the first of them are taken"
    stability = None
    if measured.draws_RL is not None:
        picked_RC = np.argsort(sign * np.abs(measured.draws_RL), axis=1, kind="stable")[:, : choice.count]
        stability = {str(layer): float((picked_RC == layer).any(1).mean()) for layer in chosen}
    return {"layers": chosen, "why": why, "determined": determined, "stability": stability}
