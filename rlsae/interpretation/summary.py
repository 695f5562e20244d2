"""The figures of an interpretation that one would quote, as plain numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from rlsae.statistics import bootstrap_ci95


def summarise(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Plain values are the metrics of the manifest, groups of values are in `summary.json` alone.

    `detection_auc` is the mean of the ensemble's explanations; `ablation_*` that of the set of latents of the tuned model whose
    ablation costs most reward; `scores` the mean of each explainer by judge, `controls` the same with another latent's
    explanation, and of latents whose activations are shuffled, each with its 95 % interval over latents.
    """
    latents, explanations = tables["latents"], tables["explanations"]
    detection = latents.detection_auc.dropna()
    summary: dict[str, Any] = {
        "latents_explained": int((latents.explanation != "").sum()),
        "latents_scored": len(detection),
        "detection_auc": float(detection.mean()) if len(detection) else None,
        "task_tagged": int(tables["reward_links"].task_tagged.sum()),
    }
    summary |= strongest(tables["ablations"])
    groups = {"": "scores", "other_latent": "other_latents_explanation", "shuffled": "shuffled_activations"}
    for control, name in groups.items():
        scored = explanations[(explanations.control == control) & explanations.score.notna()]
        summary[name] = {
            f"{explainer} {judge}": {"mean": float(of.mean()), "ci95": bootstrap_ci95(of.to_numpy()), "latents": len(of)}
            for (explainer, judge), of in scored.groupby(["explainer", "judge"]).score
        }
    transplants = tables["transplants"]
    summary["transplant_share"] = {
        f"layer {row.layer} {row.dictionary} {row.level}": [row.share, row.share_low, row.share_high]
        for row in transplants.itertuples()
    }
    return summary


def strongest(ablations: pd.DataFrame) -> dict[str, Any]:
    """Metrics of the set of latents of the tuned model whose ablation costs most reward."""
    tuned = ablations[ablations.policy == "tuned"]
    if tuned.empty:
        return {"ablation_set": None, "ablation_reward_change": None, "ablation_random_quantile": None}
    row = tuned.sort_values("reward_change").iloc[0]
    return {
        "ablation_set": f"layer {row.layer}, {row.dictionary}, {row.set}",
        "ablation_reward_change": float(row.reward_change),
        "ablation_random_quantile": float(row.random_quantile),
    }
