"""Tables 2 to 12 of arXiv 2310.08164, a row per study or finer, from what the stages have measured.

Every table begins with the columns `study model tuned_on`; intervals are 95 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from rlsae.paper.published import beside
from rlsae.paper.rows import STUDY, Exhibit, evenly, frame, of_studies, probe_scores, probed_words, told
from rlsae.report.content import records
from rlsae.report.study import Study
from rlsae.report.sweep import dictionaries

ENDS = ("highest", "lowest", "first")
"""Choices of layers that Table 12 sets side by side; the paper's lowest layers are taken to be the first ones."""
EXPLAINED = 3
"""Latents of each layer in Table 8."""


def all_tables(studies: Sequence[Study]) -> list[Exhibit]:
    """Tables 2 to 12; one that no study fills holds what is published."""
    return [Exhibit(name, title, note, beside(build(studies), name)) for name, title, note, build in TABLES]


def _tokens(count: int) -> Callable[[Sequence[Study]], pd.DataFrame]:
    """Tables 2 and 9: so many words of each study, evenly spaced by polarity."""

    def build(studies: Sequence[Study]) -> pd.DataFrame:
        rows = [
            {**told(study), "token": row["word"], "vader": row["polarity"], "probe": row["predicted"]}
            for study, words in probed_words(studies)
            for row in records(evenly(words, count))
        ]
        return frame(rows, ["token", "vader", "probe"])

    return build


def _accuracies(studies: Sequence[Study]) -> pd.DataFrame:
    return probe_scores(studies, "logistic", {"accuracy": "accuracy", "auc": "auc"})


def _taus(studies: Sequence[Study]) -> pd.DataFrame:
    table = probe_scores(studies, "ridge", {"tau": "tau"}, by=["target"])
    others = []
    for who, found in of_studies(studies, "probes"):
        found = found[(found.probe == "ridge") & (found.metric == "tau") & (found.status == "scored")]
        for target, scores in found.groupby("target", sort=False):
            by_features = scores.set_index("features")
            others.append(
                {
                    **who,
                    "target": target,
                    "p": by_features.p.get("tuned_sae"),
                    "tau_random_projection": by_features.value.get("random_projection"),
                    "p_random_projection": by_features.p.get("random_projection"),
                    "tau_shuffled": by_features.value.get("shuffled"),
                }
            )
    beside_them = ["p", "tau_random_projection", "p_random_projection", "tau_shuffled"]
    return table.merge(frame(others, ["target", *beside_them]), on=[*STUDY, "target"], how="left")


def _signs(studies: Sequence[Study]) -> pd.DataFrame:
    sides = ("positive", "negative")
    return probe_scores(studies, "ridge", {f"sign_accuracy_{side}": f"{side}_right" for side in sides}, by=["target"])


def _ablations(studies: Sequence[Study]) -> pd.DataFrame:
    rows = []
    for who, table in of_studies(studies, "ablations"):
        for row in records(table):
            after = row["reward"] + row["reward_change"]
            rows.append(
                {**who, **row, "latents_ablated": row["latents"], "reward_before": row["reward"], "reward_after": after}
            )
    shown = ["policy", "layer", "dictionary", "set", "latents_ablated", "reward_before", "reward_after", "reward_change"]
    return frame(rows, [*shown, "ci_low", "ci_high", "random_change", "random_low", "random_high"])


def _overlap(studies: Sequence[Study]) -> pd.DataFrame:
    rows = []
    for who, table in of_studies(studies, "probe_overlap"):
        for row in records(table):
            rows.append({**who, **row, "lift": row["lift_high"]})
    shown = ["layer", "by", "latents", "tagged", "share_tagged_high", "share_all_high", "lift", "share_tagged_low"]
    return frame(rows, [*shown, "share_all_low", "lift_low", "odds_ratio", "ci_low", "ci_high", "p", "status"])


def _explanations(studies: Sequence[Study]) -> pd.DataFrame:
    rows = []
    for who, explained in of_studies(studies, "latents"):
        best = explained[(explained.role == "tuned") & (explained.status == "scored")]
        best = best.sort_values("detection_auc", ascending=False, kind="stable").groupby("layer").head(EXPLAINED)
        rows += [{**who, **row} for row in records(best.sort_values("layer", kind="stable"))]
    return frame(rows, ["layer", "dictionary", "latent", "explanation", "detection_auc", "task_tagged"])


def _negative_taus(studies: Sequence[Study]) -> pd.DataFrame:
    return probe_scores(studies, "ridge", {"tau_negative": "tau"}, by=["target"])


def _reconstruction(studies: Sequence[Study], by: Sequence[str]) -> pd.DataFrame:
    """Means over layers of what each recipe leaves unexplained and of its L0, as the paper scales it."""
    who = {study.name: told(study) for study in studies}
    found = dictionaries(studies)
    keys = ["study", "role", *by]
    means = found.groupby(keys, sort=False, dropna=False)[["fvu", "l0"]].mean().reset_index()
    rows = [{**who[row["study"]], **row, "l0_hundredths": row["l0"] / 100} for row in records(means)]
    return frame(rows, ["role", *by, "fvu", "l0_hundredths"])


def _tied(studies: Sequence[Study]) -> pd.DataFrame:
    table = _reconstruction(studies, ["recipe_architecture", "recipe_expansion", "recipe_l1"])
    return table[table.recipe_architecture.isin(["tied_relu", "relu"])].reset_index(drop=True)


def _ends(studies: Sequence[Study]) -> pd.DataFrame:
    order = {study.name: study.manifests["divergence"].parameters.get("layers") for study in studies}
    chosen = {name: how for name, how in order.items() if isinstance(how, dict) and how.get("order") in ENDS}
    table = _reconstruction([study for study in studies if study.name in chosen], ["dictionary"])
    layers = {study.name: " ".join(str(layer) for layer in study.chosen["layers"]) for study in studies}
    return table.assign(order=[chosen[name]["order"] for name in table.study], layers=[layers[name] for name in table.study])


TABLES: list[tuple[str, str, str, Callable[[Sequence[Study]], pd.DataFrame]]] = [
    (
        "table2",
        "A sample of tokens: polarity and what the probe predicts",
        "Eleven words, evenly spaced by polarity. Each prediction comes from a fold without any inflection of the word.",
        _tokens(11),
    ),
    (
        "table3",
        "Logistic probe: chosen or rejected",
        "Chosen and rejected responses of held-out pairs, split by prompt; the paper's were rewritten by a language model.",
        _accuracies,
    ),
    (
        "table4",
        "Kendall's τ of the probe's predictions and VADER",
        "Target `lexicon`: the word's polarity; `distance`: the paper's, whose sign is given beforehand. p is by permutation "
        "of words. The paper's baseline is an untrained layer; ours are probes of a random projection and of shuffled labels.",
        _taus,
    ),
    (
        "table5",
        "Share of good and of bad words with the right sign",
        "With the target `distance` this is nearly given: its sign is put in beforehand.",
        _signs,
    ),
    (
        "table6",
        "Mean reward before and after latents are ablated",
        "`reward`: the ten latents with the largest reward gradient; `tagged`: those whose write changed; `random_*`: as many "
        "latents as dense. Responses are generated; the dictionary's error stays in.",
        _ablations,
    ),
    (
        "table7",
        "How often task-tagged latents are active where the reward is high",
        "Tagged by a test on the lexicon, not by GPT-4. High is the top quarter by the probe or by the lexicon, not δ > 3.",
        _overlap,
    ),
    (
        "table8",
        "Explanations of latents of the tuned model",
        f"The {EXPLAINED} of each layer that predict held-out windows best; no language model was asked.",
        _explanations,
    ),
    (
        "table9",
        "The sample of Table 2 with thirty tokens",
        "See Table 2.",
        _tokens(30),
    ),
    (
        "table10",
        "Kendall's τ of bad words alone",
        "See Table 4.",
        _negative_taus,
    ),
    (
        "table11",
        "Tied and untied autoencoders",
        "FVU, the share of variance left unexplained on held-out rows, is the normalised reconstruction loss; L0 / 100 as in "
        "the paper. Means over layers and seeds. `tied_relu` is tied, `relu` is not.",
        _tied,
    ),
    (
        "table12",
        "Layers of the highest divergence, and the lowest layers",
        "See Table 11. `order` says how the layers were chosen.",
        _ends,
    ),
]
