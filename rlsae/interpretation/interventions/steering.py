"""Dose and response: what becomes of the behaviour when what some latents write is scaled while the model generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from rlsae.beside import AnySae
from rlsae.interpretation.interventions.edit import Edit, edited
from rlsae.interpretation.interventions.effects import Place, effects
from rlsae.statistics import bootstrap_ci95
from rlsae.tuning.fixed_prompts import FixedPrompts

COLUMNS = [
    "policy", "layer", "dictionary", "seed", "set", "gain", "reward", "reward_low", "reward_high", "reward_change", "ci_low",
    "ci_high", "kl", "perplexity", "distinct_2",
]  # fmt: skip


def dose_response(
    key: dict[str, Any],
    place: Place,
    sae: AnySae,
    prompts: FixedPrompts,
    base: PreTrainedModel,
    sets: dict[str, list[int]],
    gains: Sequence[float],
) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for each set of latents and gain, 1 (the model as it is) among them.

    Args:
        key: `policy` to `seed` of the rows.
        base: model under which the perplexity of the responses is taken.

    `kl` is in nats per response, from the model as it is.
    """
    doses = sorted({*gains, 1.0})
    at = [(name, gain) for name in sets for gain in doses]
    edits = [Edit(tuple(sets[name]), gain) if gain != 1 else Edit() for name, gain in at]
    found = effects(place, lambda some: edited(sae, edits[some]), len(edits), prompts, base)
    plain_N = found.reward_EN[doses.index(1.0)]
    return [
        {
            **key,
            "set": name,
            "gain": gain,
            "reward": found.reward_EN[e].mean(),
            **dict(zip(("reward_low", "reward_high"), bootstrap_ci95(found.reward_EN[e]), strict=True)),
            "reward_change": (found.reward_EN[e] - plain_N).mean(),
            **dict(zip(("ci_low", "ci_high"), bootstrap_ci95(found.reward_EN[e] - plain_N), strict=True)),
            "kl": found.kl_EN[e].mean(),
            "perplexity": found.perplexity(e),
            "distinct_2": found.distinct_2(e),
        }
        for e, (name, gain) in enumerate(at)
    ]
