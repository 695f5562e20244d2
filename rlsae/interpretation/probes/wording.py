"""Words of a corpus and which of them can stand in each other's place.

No language model writes the variants of a triple: a word is replaced by one that the corpus uses alike, by the frequent words
before and after it (distributional classes, Brown et al. 1992, without the clustering). Shapes: W words, N neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsae.rewards import WORD

NEIGHBOURS = 150
"""Frequent words whose places beside a word say how it is used."""
CANDIDATES = 4000
"""Most frequent words that are not in the lexicon, among which neutral words are."""
FUNCTION_WORDS = 100
"""Most frequent words, at most a quarter of all, which are no neutral words."""
SENTENCE_START = ""
RARE = 5
"""Neighbours added to those of each word: a word seen once would otherwise be used exactly like another one."""


@dataclass(frozen=True)
class Wording:
    """Words of a corpus with their frequencies and uses."""

    count: Counter[str]
    """Occurrences, lower-cased."""
    after: dict[str, set[str]]
    """Candidates that the corpus has right after a word."""
    row: dict[str, int]
    """Place of each candidate in `use_WN`."""
    use_WN: NDArray[np.float32]
    """Vectors shorter than 1: square roots of the shares of the neighbours before and after each candidate."""

    @classmethod
    def of(cls, texts: Iterable[str], words: set[str], lexicon: set[str]) -> Wording:
        """Read the texts.

        Args:
            words: those of the lexicon that may be used.
            lexicon: all of its words; the frequent others are candidates for neutral words.
        """
        sentences = [words_of(text) for text in texts]
        count = Counter(word for sentence in sentences for word in sentence if word)
        frequent = [word for word, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
        content = frequent[min(FUNCTION_WORDS, len(frequent) // 4) :]
        neutral = [word for word in content if word not in lexicon and len(word) > 2 and "'" not in word]
        row = {word: place for place, word in enumerate(sorted(words & count.keys()) + neutral[:CANDIDATES])}
        neighbour = {word: place for place, word in enumerate([SENTENCE_START, *frequent[:NEIGHBOURS]])}
        use_WN = np.zeros((len(row), 2 * len(neighbour)), np.float32)
        after: dict[str, set[str]] = {}
        for sentence in sentences:
            for place, word in enumerate(sentence):
                if word not in row:
                    continue
                before = sentence[place - 1] if place else SENTENCE_START
                behind = sentence[place + 1] if place + 1 < len(sentence) else SENTENCE_START
                after.setdefault(before, set()).add(word)
                if before in neighbour:
                    use_WN[row[word], neighbour[before]] += 1
                if behind in neighbour:
                    use_WN[row[word], len(neighbour) + neighbour[behind]] += 1
        use_WN = np.sqrt(use_WN)
        use_WN /= np.sqrt((use_WN**2).sum(1, keepdims=True) + RARE)
        return cls(count, after, row, use_WN)

    def alike(self, word: str, previous: str, among: list[str], number: int) -> list[str]:
        """Up to `number` of the candidates `among`, those used most like a word and, where there are any, after `previous`."""
        seen = self.after.get(previous, set())
        among = [other for other in among if other in seen] or among
        likeness = self.use_WN[[self.row[other] for other in among]] @ self.use_WN[self.row[word]]
        return [among[place] for place in np.argsort(-likeness, kind="stable")[:number]]


def words_of(text: str) -> list[str]:
    """Lower-cased words, with `SENTENCE_START` where the marks between two of them end a clause or a sentence."""
    words, end = [SENTENCE_START], 0
    for match in WORD.finditer(text):
        if any(mark in '.!?;:,()"<>' for mark in text[end : match.start()]) and words[-1]:
            words.append(SENTENCE_START)
        words.append(match[0].lower())
        end = match.end()
    return words
