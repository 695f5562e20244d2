"""Labels of positions: what rules about a latent may say of a token and its place. Shapes: N rows, K labels of a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.positions import CASINGS, Positions, Vocabulary

STARTS = 3
"""Places at the start of a document that have a label of their own."""

Numbers = NDArray[np.int64]


class Kind(NamedTuple):
    """One way to label positions."""

    of: Callable[[Positions], Numbers]
    """Label of each position [N]; 0 for none."""
    named: Callable[[int], str]


def kinds_of(vocabulary: Vocabulary) -> dict[str, Kind]:
    """All kinds of labels; of equally good rules the first kind's is taken."""
    size = len(vocabulary) + 1
    by_table = {
        "word": (vocabulary.word_V, "‹{}›"),
        "ending in": (vocabulary.ending_V(3), "words ending in ‹{}›"),
        "ending in two": (vocabulary.ending_V(2), "words ending in ‹{}›"),
        "beginning with": (vocabulary.beginning_V(3), "words beginning with ‹{}›"),
    }
    kinds = {"token": Kind(lambda rows: rows.token_N + 1, lambda label: f"‹{vocabulary.texts[label - 1]}›")}
    for name, ((number_V, names), text) in by_table.items():
        kinds[name] = _table_kind(number_V, names, text)
    kinds["bigram"] = Kind(
        lambda rows: (rows.before_N + 1) * size + rows.token_N + 1,
        lambda label: f"‹{vocabulary.texts[label % size - 1]}› after {_before(vocabulary, label // size)}",
    )
    kinds["after"] = Kind(lambda rows: rows.before_N + 2, lambda label: f"what follows {_before(vocabulary, label - 1)}")
    kinds["casing"] = _table_kind(vocabulary.casing_V, list(CASINGS), "tokens that are {}")
    kinds["place"] = Kind(
        lambda rows: np.where(rows.place_N < STARTS, rows.place_N + 1, 0), lambda label: f"token {label} of a document"
    )
    return kinds


def _table_kind(number_V: Numbers, names: list[str], text: str) -> Kind:
    return Kind(lambda rows: number_V[rows.token_N], lambda label: text.format(names[label]))


def _before(vocabulary: Vocabulary, number: int) -> str:
    return f"‹{vocabulary.texts[number - 1]}›" if number else "the start"


@dataclass(frozen=True)
class Labelled:
    """The labels of some positions, counted."""

    code_N: Numbers
    """Place in `labels` of the label of each position."""
    labels: Numbers
    """[K]"""
    count_K: Numbers
    """Positions with each label; 0 for the label 0, which is none."""

    @classmethod
    def by_kind(cls, kinds: dict[str, Kind], positions: Positions) -> dict[str, Labelled]:
        found = {}
        for name, kind in kinds.items():
            labels, code_N, count_K = np.unique(kind.of(positions), return_inverse=True, return_counts=True)
            found[name] = cls(code_N, labels, np.where(labels > 0, count_K, 0))
        return found
