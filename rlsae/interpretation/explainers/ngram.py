"""`ngram`: rules about a token and the one before it, chosen one after the other until they cover where the latent fires.

A rule is a label that positions may have: this token, this word in any case, this token after that one, after that token, an
ending or a beginning, a casing, a place at the start of a document. Each step adds the rule with the largest F1 of all rules
together, as long as F1 grows (after Neuron to Graph; Foote et al., arXiv 2305.19911). Shapes: N rows, T positions, K labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.evidence import Evidence
from rlsae.interpretation.explanation import Explanation
from rlsae.interpretation.labels import Labelled
from rlsae.interpretation.positions import Positions
from rlsae.interpretation.windows import Window

RULES = 8
MIN_GAIN = 0.01
"""Of F1, by which a rule must improve on those before it."""
MIN_FIRINGS = 5
"""At which a rule must hold."""
FIRES = 0.1
"""Share of the largest activation from which a latent counts as firing: a rule for whispers says little."""


class Rule(NamedTuple):
    kind: str
    label: int
    value: float
    """Mean activation where it holds and no earlier rule does."""


def explain(evidence: Evidence) -> Explanation:
    """Names the rules, and predicts the mean activation of the first that holds."""
    kinds, acts_N = evidence.kinds, evidence.acts_N
    rules = choose(evidence.labels, acts_N > FIRES * acts_N.max(initial=0), acts_N)
    if not rules:
        return Explanation.none("no rule covers where it fires")

    def predict(window: Window) -> NDArray[np.floating]:
        positions = Positions.of_window(window)
        predicted_T = np.zeros(len(positions))
        for rule in reversed(rules):  # the first rule has the last word
            predicted_T[kinds[rule.kind].of(positions) == rule.label] = rule.value
        return predicted_T

    return Explanation("fires on " + "; ".join(kinds[rule.kind].named(rule.label) for rule in rules), predict=predict)


def choose(kinds: dict[str, Labelled], fires_N: NDArray[np.bool_], acts_N: NDArray[np.floating]) -> list[Rule]:
    """Rules that together tell where a latent fires from where it does not; of equally good ones, the first kind's."""
    rules: list[Rule] = []
    open_N = np.ones(len(fires_N), bool)
    held = {name: labelled.count_K.copy() for name, labelled in kinds.items()}
    fired = {name: np.bincount(kind.code_N[fires_N], minlength=len(kind.labels)) for name, kind in kinds.items()}
    hits = claims = 0
    wanted, reached = int(fires_N.sum()), 0.0
    while len(rules) < RULES:
        best, best_f1 = None, reached + MIN_GAIN
        for name in kinds:
            able_K = (fired[name] >= MIN_FIRINGS) & (held[name] > 0)
            f1_K = np.where(able_K, 2 * (hits + fired[name]) / np.maximum(wanted + claims + held[name], 1), 0)
            if f1_K.max(initial=0) > best_f1 + 1e-12:
                best, best_f1 = (name, int(np.argmax(f1_K))), float(f1_K.max())
        if best is None:
            break
        name, code = best
        hits, claims, reached = hits + fired[name][code], claims + held[name][code], best_f1
        covered = np.flatnonzero(open_N & (kinds[name].code_N == code))
        open_N[covered] = False
        rules.append(Rule(name, int(kinds[name].labels[code]), float(acts_N[covered].mean())))
        for other, kind in kinds.items():
            held[other] = np.where(
                kind.labels > 0, held[other] - np.bincount(kind.code_N[covered], minlength=len(kind.labels)), 0
            )
            fired[other] -= np.bincount(kind.code_N[covered[fires_N[covered]]], minlength=len(kind.labels))
    return rules
