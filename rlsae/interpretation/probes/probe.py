"""Probes and what they are worth: `probes.parquet` and the held-out predictions behind it.

A ridge probe predicts the reward of a triple's good or bad word. Its words are in training or in test, with their inflections,
never in both; it is scored against the lexicon, beside what should do as well if the dictionary adds nothing. A logistic probe
tells chosen from rejected responses. Shapes: N rows, F features, P permutations.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kendalltau
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rlsae.interpretation.probes.features import Features
from rlsae.interpretation.probes.ridge import folds, held_out_predictions
from rlsae.interpretation.probes.scores import Array, Estimate, Groups, auc, kendall_tau, permuted_p, r_squared, share

COLUMNS = ["probe", "features", "target", "metric", "value", "ci_low", "ci_high", "p", "rows", "groups", "status"]
PREDICTIONS = ["probe", "features", "target", "row", "triple", "word", "group", "polarity", "label", "prediction"]
SCORED = "scored"
PERMUTATIONS = 199
SWAPS = 999
MIN_WORDS = 10
"""Words, or prompts, below which nothing is scored."""
TARGETS = ("lexicon", "distance")
"""Polarity of the word, or the paper's ±‖A(x±) − A(x0)‖, which is made from the features and the sign that it then predicts."""
C = 1e-3
"""Inverse penalty of the logistic probe: with more features than rows, much is needed."""
SUFFIX = re.compile(r"(?:ing|ingly|edly|ed|(?<!b)ly|ies|es|s|er|est|e|y|i|ful|fully|ness|less)$")


def stem(word: str) -> str:
    """What inflections of a word share: lower-cased, English endings cut while three letters are left."""
    word = word.lower()
    while len(shorter := SUFFIX.sub("", word)) >= 3 and shorter != word:
        word = shorter
    return re.sub(r"(.)\1$", r"\1", word)


def distances(features_MF: NDArray[np.floating]) -> Array:
    """Δ+ = ‖A(x+) − A(x0)‖ and Δ− = −‖A(x−) − A(x0)‖ of each triple, one after the other [2N].

    Args:
        features_MF [3N, F]: positive, negative and neutral word of each triple, one triple after the other.
    """
    rows = features_MF.reshape(len(features_MF) // 3, 3, -1).astype(np.float64)
    signed = np.linalg.norm(rows[:, :2] - rows[:, 2:], axis=2) * [1, -1]
    return signed.ravel()


def ridge_probes(features: Features, triples: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The ridge probe of every feature set and target: rows of `COLUMNS`, held-out predictions in `PREDICTIONS`.

    Args:
        features: [3N, F] by name, positive, negative and neutral word of each triple.
        triples: `triple positive negative polarity_positive polarity_negative` [N].

    The probe of `shuffled` is that of `tuned_sae` on labels which words have exchanged. Intervals resample words, with the
    fitted probes as they are; p permutes the labels of words and fits anew. Without enough words: one row with its status.
    """
    words = triples[["positive", "negative"]].to_numpy(str).ravel().tolist()
    names = [stem(word) for word in words]
    groups = len(set(names))
    if groups < MIN_WORDS:
        why = f"{len(triples)} triples with {groups} different words; a probe needs {MIN_WORDS}"
        return _unscored("ridge", "lexicon", len(words), groups, why), pd.DataFrame(columns=PREDICTIONS)
    triple_N = np.repeat(triples.triple.to_numpy(np.int64), 2)
    if min(len({names[n] for n in train}) for train, _ in folds(names, triple_N, seed)) < 2:
        why = "a few words stand in nearly all triples: without their triples, no words are left to train on"
        return _unscored("ridge", "lexicon", len(words), groups, why), pd.DataFrame(columns=PREDICTIONS)
    polarity_N = triples[["polarity_positive", "polarity_negative"]].to_numpy(float).ravel()
    exchanged_PN = exchanges(names, PERMUTATIONS + 1, seed)
    units = Groups.of(names, seed)
    rows: list[dict[str, Any]] = []
    predictions, tables = [], []
    for target in TARGETS:
        taus: dict[str, Estimate] = {}
        for name, values in features.items():
            label_N = polarity_N if target == "lexicon" else distances(values)
            if len(np.unique(label_N)) < 2:
                tables.append(_unscored("ridge", target, len(words), groups, "all labels are equal", name))
                continue
            # The last labelling is not part of the permutations: it is the feature set `shuffled`.
            labels_NP = np.stack([label_N, *label_N[exchanged_PN]], 1)
            predicted_NP = held_out_predictions(_words_of_triples(values), labels_NP, names, triple_N, seed)
            permuted = [kendalltau(predicted_NP[:, p + 1], polarity_N[exchanged_PN[p]]).statistic for p in range(PERMUTATIONS)]
            runs = [(name, predicted_NP[:, 0], label_N, polarity_N)]
            if name == "tuned_sae":
                runs.append(("shuffled", predicted_NP[:, -1], labels_NP[:, -1], polarity_N[exchanged_PN[-1]]))
            for run, prediction_N, true_N, value_N in runs:
                scores = _scores(prediction_N, true_N, value_N, units)
                taus[run] = scores["tau"]
                for metric, score in scores.items():
                    p = permuted_p(score.value, np.array(permuted)) if metric == "tau" else float("nan")
                    rows.append(_scored_row("ridge", run, target, metric, score, p, len(words), groups))
                about = {"probe": "ridge", "features": run, "target": target, "row": range(len(words)), "triple": triple_N}
                predictions.append(
                    pd.DataFrame(
                        {
                            **about,
                            "word": words,
                            "group": names,
                            "polarity": value_N,
                            "label": true_N,
                            "prediction": prediction_N,
                        }
                    )
                )
        for name in taus if "tuned_sae" in taus else ():
            if name != "tuned_sae":
                pair = (f"tuned_sae - {name}", target, "tau_difference", taus["tuned_sae"] - taus[name])
                rows.append(_scored_row("ridge", *pair, float("nan"), len(words), groups))
    found = pd.concat(predictions, ignore_index=True) if predictions else pd.DataFrame(columns=PREDICTIONS)
    return pd.concat([pd.DataFrame(rows, columns=COLUMNS), *tables], ignore_index=True), found


def logistic_probes(features: Features, prompts: list[str], seed: int = 0) -> pd.DataFrame:
    """The logistic probe, chosen or rejected, of every feature set: AUC and accuracy of held-out rows, in rows of `COLUMNS`.

    Args:
        features: [2N, F] by name, chosen and rejected response of each pair.
        prompts: of each pair; a prompt is in training or in test.

    Intervals resample prompts; p swaps chosen and rejected within pairs under the scores as they are, without fitting anew.
    """
    groups = len(set(prompts))
    if groups < MIN_WORDS:
        why = f"{groups} different prompts; a probe needs {MIN_WORDS}"
        return _unscored("logistic", "preference", 2 * len(prompts), groups, why)
    names = np.repeat(prompts, 2).tolist()
    chosen_N = np.tile([True, False], len(prompts))
    pair_N = np.repeat(np.arange(len(prompts)), 2)
    units = Groups.of(names, seed)
    rng = np.random.default_rng([seed, 4])
    swapped_P = rng.random((SWAPS, len(prompts))) < 0.5
    rows = []
    shuffled_N = chosen_N ^ np.repeat(rng.random(len(prompts)) < 0.5, 2)
    runs = [(name, values, chosen_N) for name, values in features.items()]
    if "tuned_sae" in features:
        runs.append(("shuffled", features["tuned_sae"], shuffled_N))
    scores: dict[str, Estimate] = {}
    for name, values, label_N in runs:
        score_N = np.empty(len(label_N))
        for train, test in folds(names, pair_N, seed):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
            score_N[test] = model.fit(values[train], label_N[train]).decision_function(values[test])
        scores[name] = auc(score_N, label_N, units)
        p = permuted_p(scores[name].value, _swapped_auc(score_N, label_N, swapped_P))
        rows.append(_scored_row("logistic", name, "preference", "auc", scores[name], p, len(label_N), groups))
        accuracy = share((score_N > 0) == label_N, units)
        rows.append(_scored_row("logistic", name, "preference", "accuracy", accuracy, float("nan"), len(label_N), groups))
    for name in scores if "tuned_sae" in scores else ():
        if name != "tuned_sae":
            pair = (f"tuned_sae - {name}", "preference", "auc_difference", scores["tuned_sae"] - scores[name])
            rows.append(_scored_row("logistic", *pair, float("nan"), len(chosen_N), groups))
    return pd.DataFrame(rows, columns=COLUMNS)


def exchanges(names: list[str], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Rows whose labels each row takes over [P, N]: every group takes those of another one, in turn where it has more rows."""
    rng = np.random.default_rng([seed, 3])
    unique, number_N = np.unique(names, return_inverse=True)
    members = [np.flatnonzero(number_N == group) for group in range(len(unique))]
    found = np.empty((count, len(names)), np.int64)
    for row in found:
        for own, other in zip(members, rng.permutation(len(members)), strict=True):
            row[own] = np.resize(members[other], len(own))
    return found


def _words_of_triples(features_MF: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.delete(features_MF, np.s_[2::3], axis=0)


def _scores(prediction_N: Array, label_N: Array, polarity_N: Array, units: Groups) -> dict[str, Estimate]:
    """τ against the lexicon, of all words and of good and bad ones alone; R² of the label; shares of right signs."""
    found = {"tau": kendall_tau(prediction_N, polarity_N, units), "r2": r_squared(prediction_N, label_N, units)}
    for side, sign in (("positive", 1), ("negative", -1)):
        of_side_N = polarity_N * sign > 0
        alone = Groups(units.number_N[of_side_N], units.weights_RG)
        found[f"tau_{side}"] = kendall_tau(prediction_N[of_side_N], polarity_N[of_side_N], alone)
        found[f"sign_accuracy_{side}"] = share(prediction_N * sign > 0, units, of_side_N)
    return found


def _swapped_auc(score_N: Array, label_N: NDArray[np.bool_], swapped_PN: NDArray[np.bool_]) -> Array:
    """AUC with chosen and rejected of some pairs swapped [P]."""
    _, place, count = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count) - (count - 1) / 2)[place]
    positive_PN = np.repeat(swapped_PN, 2, axis=1) ^ label_N
    pairs = len(label_N) / 2
    return (positive_PN @ rank_N - pairs * (pairs + 1) / 2) / pairs**2


def _scored_row(
    probe: str, features: str, target: str, metric: str, score: Estimate, p: float, rows: int, groups: int
) -> dict[str, Any]:
    status = SCORED if np.isfinite(score.value) else "predictions or labels are all equal"
    return dict(zip(COLUMNS, (probe, features, target, metric, score.value, *score.ci95, p, rows, groups, status), strict=True))


def _unscored(probe: str, target: str, rows: int, groups: int, why: str, features: str = "tuned_sae") -> pd.DataFrame:
    nan, metric = float("nan"), "tau" if probe == "ridge" else "auc"
    return pd.DataFrame([(probe, features, target, metric, nan, nan, nan, nan, rows, groups, why)], columns=COLUMNS)
