"""A finished study of two layers with few numbers, and its report, for the tests of the report."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from rlsae.artifacts import MANIFEST, Manifest, digest, input_digests
from rlsae.comparison.kinds import KEY
from rlsae.report.build import build_report
from rlsae.report.study import Study

MEASURES = ("weight_l2_sum", "activation_l2_relative", "kl_swap_out", "reward_swap_out")
TAGS = {"unchanged": 90, "removed": 1, "added": 2, "rotated": 3, "rescaled": 4, "untestable": 20, "dead": 8}
LEVEL = {"layer": 1, "dictionary": "small", "difference": 0.05, "mean_shift": 0.2, "linear_map": 0.6, "tagged": 0.1}
LEVEL |= {"diffuse": False, "moved": 0.25, "minimum_effect": 0.35}
DIRECTION = {"layer": 1, "direction": 0, "share": 0.4, "lowers": "‹ bad›", "written_at": "‹ is›", "reward_correlation": 0.31}
DIRECTION |= {"reward_correlation_low": 0.25, "reward_correlation_high": 0.37}
TRANSFER = {
    f"{score}_{role}_{where}_{policy}": 0.05 if role == policy else 0.2
    for score, where in [("fvu", "on"), ("ce_recovered", "in"), ("kl_recovered", "in")]
    for role in ("base", "tuned")
    for policy in ("base", "tuned")
}
TRANSFER |= {f"{measure}_ci95": [value - 0.01, value + 0.01] for measure, value in TRANSFER.items()}
TRANSFER |= {"ce_recovered_base_in_tuned": None, "ce_recovered_base_in_tuned_ci95": None}
ABLATION = {
    "policy": "tuned",
    "set": "reward",
    "layer": 1,
    "dictionary": "small",
    "seed": 0,
    "latents": 3,
    "reward": 1.5,
    "reward_change": -0.41,
}
ABLATION |= {"ci_low": -0.52, "ci_high": -0.31, "random_change": -0.02, "random_low": -0.06, "random_high": 0.01}
ABLATION |= {"random_quantile": 0.97}
DOSE = {"policy": "tuned", "layer": 1, "dictionary": "small", "set": "reward", "gain": 2.0, "reward": 1.7}
DOSE |= {"reward_low": 1.6, "reward_high": 1.8}
CARRIED = {"layer": 1, "dictionary": "small", "seed": 0, "reads": "own", "set": "reward", "latents": 3, "ablated": 0.4}
CARRIED |= {"ablated_low": 0.3, "ablated_high": 0.5, "transplanted": 0.1, "transplanted_low": 0.0, "transplanted_high": 0.2}
TRANSPLANT = {"layer": 1, "dictionary": "small", "level": "map", "latents": 0, "reward": 0.4, "share": 0.21}
TRANSPLANT |= {"share_low": 0.17, "share_high": 0.26, "kl": 0.5}
PROBE = {"probe": "ridge", "target": "lexicon", "metric": "tau", "p": 0.005, "status": "scored"}
PROBES = [
    PROBE | {"features": features, "metric": metric, "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
    for features, metric, value in [
        ("tuned_sae", "tau", 0.3),
        ("tuned_sae", "sign_accuracy_positive", 0.8),
        ("tuned_sae", "sign_accuracy_negative", 0.6),
        ("tuned_sae - tuned_raw", "tau_difference", -0.2),
        ("tuned_sae - bag_of_words", "tau_difference", 0.25),
    ]
]
NO_PROBE = PROBE | {"features": "tuned_sae", "value": np.nan, "ci_low": np.nan, "ci_high": np.nan, "status": "too few triples"}
PREDICTED = [{"word": "a|b", "polarity": float(n), "prediction": float(n)} for n in (-2, -2, 1)]
PREDICTED += [{"word": f"w{n}", "polarity": float(n), "prediction": n / 2} for n in range(20)]
SCORE = {"mean": 0.9, "ci95": [0.87, 0.93], "latents": 4}
SUMMARY = {"scores": {"ensemble detection": SCORE}, "other_latents_explanation": {}, "shuffled_activations": {}}
PPO = {
    "evaluation_prompts": 512,
    "reward_base": 0.0256,
    "reward_tuned": 1.7552,
    "reward_gain": 1.7296,
    "reward_gain_ci95": [1.648, 1.811],
    "reward_base_ci95": [-0.03, 0.08],
    "reward_tuned_ci95": [1.69, 1.82],
    "kl": 6.4,
    "kl_ci95": [6.18, 6.63],
    "kl_per_token": 0.478,
    "response_length_base": 13.1,
    "response_length_tuned": 13.4,
    "perplexity_base": 5.13,
    "perplexity_tuned": 6.49,
    "checkpoints": [],
}
DETAILS = {
    "p": 0.001,
    "q": 0.004,
    "write_ratio": 1.2,
    "scale_error": 0.9,
    "density_shift": -0.1,
    "mean_active": 1.0,
    "max_active": 2.0,
}
DETAILS |= {
    "match_cosine_encoder": 0.7,
    "match_jaccard": 0.5,
    "match_pearson": 0.6,
    "match_size_latent": 4,
    "match_size_cosine": 0.5,
}


def artifact(folder, metrics, parameters, tables=None, inputs=None):
    """A finished artifact with the given tables."""
    folder.mkdir(parents=True)
    for name, rows in (tables or {}).items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(rows))
        else:
            pd.DataFrame(rows).to_parquet(folder / name, index=False)
    stage = folder.relative_to(next(p for p in folder.parents if p.name == "results")).parts[0]
    outputs = {name: digest(folder / name) for name in (tables or {})}
    (folder / MANIFEST).write_text(Manifest(stage, parameters, inputs or {}, outputs, metrics).to_json())
    return folder


def cosines(seeds, sizes):
    """Rows of `aggregates.parquet`; a figure that needs two seeds is missing with one."""
    two = len(seeds) > 1
    figures = [("mmcs_base_tuned", 0.78, True), ("mmcs_base_tuned_other_seed", 0.31, two), ("mmcs_floor", 0.33, two)]
    rows = [("small", *figure) for figure in figures]
    if sizes:
        rows += [("small→big", f"mmcs_small_big_{role}{end}", 0.35, True) for role in ("base", "tuned") for end in ("", "_max")]
    return [
        {"layer": 1, "dictionary": name, "measure": measure, "value": value if known else np.nan}
        | {"ci_low": value - 0.03 if known else np.nan, "ci_high": value + 0.03 if known else np.nan, "latents": 9 * known}
        for name, measure, value, known in rows
    ]


def build_small_report(
    folder, seeds=(0, 1), sizes=True, metrics=None, latents=2, evil="a film", step=None, name="demo", model="tiny"
):
    """Write the artifacts of a small study under a folder, build its report, and return the report's folder."""
    results = folder / "results"
    history = {c: [0.1, 0.2, 0.3] for c in ("reward", "kl", "kl_coefficient", "entropy", "response_length")}
    samples = [{"prompt": evil, "response_base": evil, "reward_base": 0.5, "response_tuned": evil, "reward_tuned": 2.0}]
    samples[0] |= {f"words_{role}": [evil] for role in ("base", "tuned")} | {
        "word_rewards_base": [0.5],
        "word_rewards_tuned": [2.0],
    }
    measured = {"value": [1.0, 2.0], "ci_low": [np.nan, 1.9], "ci_high": [np.nan, 2.1], "rank": [2, 1]}
    layers = [
        {"layer": n, "measure": measure, "component": component, **{k: v[n] for k, v in measured.items()}}
        for measure, component in zip(MEASURES, ("layer", "mlp", "layer", "layer"), strict=True)
        for n in (0, 1)
    ]
    keys = [
        {"role": role, "layer": 1, "dictionary": "small", "seed": 0, "latent": i}
        for role in ("base", "tuned")
        for i in range(latents)
    ]
    told = [
        {
            "selected_for": "least changed",
            "reward_correlation": 0.2,
            "reward_gradient": 0.01,
            "histogram": [3, 0, 1],
            "explanation": f"fires on ‹ {evil}›",
            "raises": f"‹ {evil}›",
            "lowers": "‹ x›",
        }
        | {"ablation_reward_change": -0.13 if i else np.nan}
        | ({"detection_auc": np.nan, "status": "not scored"} if i % 2 else {"detection_auc": 0.9, "status": "scored"})
        for i in range(len(keys))
    ]
    changed = {"write_change": 0.8, "write_angle": 40.0, "tag": "rotated", "replicated": True, "firings": 500, **DETAILS}
    matched = changed | {
        "density": 0.01,
        "match_cosine_decoder": 0.8,
        "norm_ratio": np.nan,
        "floor_percentile": np.nan if len(seeds) == 1 else 90.0,
    }
    tags = TAGS | {"replicated": 3 if len(seeds) > 1 else None}
    score = {"layer": 1, "dictionary": "small", "measure": "fvu_base_on_tuned", "value": 0.2}
    window = {"document": 3, "held_out": True, "peak": 1, "tokens": [evil, " film\n", " x"], "activations": [0.5, 2.0, 0.0]}
    window |= {"activations_other": [0.0, 1.0, 0.0]}
    said = [
        {"explainer": explainer, "judge": judge, "control": "", "explanation": f"fires on ‹ {evil}›", "score": 0.9}
        | {"ci_low": 0.8, "ci_high": 0.97, "status": "scored"}
        for explainer in ("tokens", "ensemble")
        for judge in ("detection", "fuzzing")
    ]
    said.append(said[-1] | {"judge": "llm_detection", "score": 0.75})
    failure = {"explainer": "tokens", "failure": "missed", "document": 9, "tokens": [evil, " ends"]}
    failure |= {"activations": [0.0, 1.5], "predictions": [0.5, 0.0]}
    tuning = {"method": "ppo", "reward": "vader", "kl_target": None}
    scores = {"fvu": 0.05, "explained_variance": 0.95, "l0": 6.0, "dead_share": 0.01, "ce_recovered": None}
    scores |= {"rows_trained": 350208, "rows_held_out": 13787}
    curve = [{"seed": s, "step": t, "mse": 1 / t, "l1": 1.0, "l0": 9 / t} for s in seeds for t in (1, 2, 3)]
    stores = {
        role: artifact(
            results / "activations" / f"{policy}.reviews" / "mlp" / "layers-1",
            {"rows": 131072, "channels": 8, "layers": [1], "bytes": 68746025},
            {"checkpoint": step if role == "tuned" else None},
            inputs={"tokens/tiny.reviews": "sha256:" + "ab" * 32},
        )
        for role, policy in (("base", model), ("tuned", f"{model}.ppo@{step}" if step else f"{model}.ppo"))
    }
    dictionaries = {
        (role, 1, "small"): artifact(
            results / "dictionaries" / stores[role].parts[-3] / "mlp" / "layers-1" / "layer1" / "small",
            {f"seed{s}": scores for s in seeds},
            {"architecture": "tied_relu", "l1": 0.01},
            {"metrics.parquet": curve},
        )
        for role in ("base", "tuned")
    }
    divergence = artifact(
        results / "divergence" / name,
        {"chosen_layers": [1]},
        {},
        {
            "layers.parquet": layers,
            "steps.parquet": [{"step": 3, **row} for row in layers],
        },
    )
    taus = [{"measure": a, "other": b, "kendall_tau": 1.0} for a in MEASURES for b in MEASURES]
    pd.DataFrame(taus).to_csv(divergence / "agreement.tsv", sep="\t", index=False)
    chosen = {"layers": [1], "why": "highest weight_l2_sum", "stability": {"1": 0.97}}
    (divergence / "chosen.json").write_text(json.dumps(chosen))
    base = artifact(results / "models" / model, {"parameters": 1044224, "layers": 2}, {})
    tuned = artifact(
        results / "policies" / f"{model}.ppo",
        PPO | (metrics or {}),
        {"tuning": tuning, "reward": {"kind": "lexicon"}},
        {"history.parquet": {"batch": [0, 1, 2], **history}, "samples.parquet": samples},
        inputs={"corpora/reviews": "sha256:" + "cd" * 32},
    )
    comparison = artifact(
        results / "comparison" / name,
        {"layers": {"1": {"dictionaries": {"small": TRANSFER | {"tags": tags}}}}},
        {"dictionaries": ["small"]},
        {
            "levels.parquet": [LEVEL | {"role": role, "seed": seed} for role in ("base", "tuned") for seed in seeds],
            "aggregates.parquet": [*cosines(seeds, sizes), score],
            "latents.parquet": [{**key, **matched, "match_latent": key["latent"]} for key in keys]
            or [{"role": "base", "layer": 1, "dictionary": "small", "seed": 0, "latent": 0, **matched}],
        },
    )
    made_from = enumerate([comparison, base, tuned, *stores.values(), *dictionaries.values()])
    artifact(
        results / "interpretation" / name,
        {"latents_explained": len(keys), "detection_auc": 0.9 if keys else None},
        {},
        {
            "latents.parquet": [key | row for key, row in zip(keys, told, strict=True)],
            "examples.parquet": rows_of([{**key, **window, "rank": 0} for key in keys], [*KEY, *window]),
            "explanations.parquet": rows_of([{**key, **row} for key in keys for row in said], [*KEY, *said[0]]),
            "failures.parquet": rows_of([{**key, **failure} for key in keys], [*KEY, *failure]),
            "summary.json": SUMMARY if keys else {name: {} for name in SUMMARY},
            "ablations.parquet": rows_of([ABLATION] if keys else [], [*ABLATION]),
            "probes.parquet": PROBES if keys else [NO_PROBE],
            "probe_predictions.parquet": [{"features": "tuned_sae", "target": "lexicon", **word} for word in PREDICTED],
            "probe_overlap.parquet": rows_of([], ["layer"]),
            "probe_components.parquet": rows_of([], ["pair"]),
            "steering.parquet": rows_of([DOSE] if keys else [], [*DOSE]),
            "transplants.parquet": rows_of([TRANSPLANT] if keys else [], [*TRANSPLANT]),
            "carried.parquet": rows_of([CARRIED] if keys else [], [*CARRIED]),
            "map_directions.parquet": [DIRECTION | {"raises": f"‹ {evil}›"}] if keys else [],
        },
        input_digests({str(label): made for label, made in made_from}),
    )
    out = results / "reports" / name
    build_report(Study.find(results, name), out, None)
    return out


def rows_of(rows, columns):
    """A table that has its columns also without rows."""
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
