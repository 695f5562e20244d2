"""Contrastive triples: one context that ends in a good, a bad or a neutral word (arXiv 2310.08164 section 3.3).

The paper has GPT-4 rewrite sentences. Here only the last word differs, and it comes from the corpus: good and bad words from
the outer quartiles of the lexicon, neutral ones from outside it, all chosen by how the corpus uses them. `triples.parquet` has
the columns `COLUMNS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlsae.config.probes import Probes
from rlsae.interpretation.probes.spans import Span, target_span
from rlsae.interpretation.probes.wording import SENTENCE_START, Wording, words_of
from rlsae.rewards import WORD

VARIANTS = ("positive", "negative", "neutral")
"""In the order of a triple's spans."""
COLUMNS = [
    "triple", "document", "context", "positive", "negative", "neutral", "polarity_positive", "polarity_negative",
    "tokens_positive", "tokens_negative", "tokens_neutral",
]  # fmt: skip
"""Of `triples.parquet`. `document` is that of the context, -1 in triples of one's own; `tokens_*` those of the word."""
CONTEXT_WORDS = (3, 40)
"""Words of a context, at least and at most."""
ALIKE = 12
"""Words used most like the original, among which its replacement is drawn."""
FREQUENCY_FACTOR = 4
"""A neutral word is at most so many times as frequent as the word that it stands for, or as rare, where there is one."""
SENTENCE = re.compile(r"[^.!?<>]+")
MARKUP = re.compile(r"<[^<>]*>")


class Triple(NamedTuple):
    """One row of the table, and the tokens of its variants."""

    row: dict[str, object]
    spans: list[Span]

    @property
    def longest(self) -> int:
        return max(len(span.ids) for span in self.spans)

    @property
    def split(self) -> bool:
        """Whether a word has several tokens."""
        return any(span.last - span.first > 1 for span in self.spans)


@dataclass(frozen=True)
class Triples:
    """Triples, and how many have a word of several tokens."""

    table: pd.DataFrame
    spans: list[Span]
    """Tokens and target of each variant, all of the first triple first."""
    split: int
    """None of them is in the table if they are dropped."""

    @classmethod
    def of(cls, triples: Iterable[Triple], entry: Probes) -> Triples:
        """The first `entry.triples`, without those of split words where the entry says so."""
        kept: list[Triple] = []
        split = 0
        for triple in triples:
            split += triple.split
            if not (triple.split and entry.split_targets == "drop"):
                kept.append(triple)
            if len(kept) == entry.triples:
                break
        table = pd.DataFrame([{"triple": n, **triple.row} for n, triple in enumerate(kept)], columns=COLUMNS)
        return cls(table, [span for triple in kept for span in triple.spans], split)


class Target(NamedTuple):
    """A word of the lexicon's outer quartiles in a document."""

    document: int
    context: str
    word: str


def build_triples(
    entry: Probes,
    documents: pd.DataFrame,
    polarity: dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
) -> Triples:
    """Triples from held-out documents, at most one of each.

    Args:
        documents: `document text held_out`; the words and their uses are those of all, the contexts of the held-out ones.
        polarity: polarity of the lexicon's words, lower-cased.
        limit: longest sequence of the model, in tokens.
    """
    found = _built(documents, polarity, tokenizer, np.random.default_rng([entry.seed, 1]))
    return Triples.of((triple for triple in found if triple.longest <= limit), entry)


def _built(
    documents: pd.DataFrame, polarity: dict[str, float], tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator
) -> Iterator[Triple]:
    outer = outer_quartiles(polarity)
    texts = [MARKUP.sub(". ", text) for text in documents.text]
    wording = Wording.of(texts, set(outer), set(polarity))
    usable = {sign: [word for word, value in outer.items() if word in wording.row and value * sign > 0] for sign in (1, -1)}
    neutral = [word for word in wording.row if word not in outer]
    if not (usable[1] and usable[-1] and neutral):
        return
    held_out = ((n, text) for n, text, held in zip(documents.document, texts, documents.held_out, strict=True) if held)
    for target in _spread([first_target(n, text, outer) for n, text in held_out], rng):
        word, previous = target.word.lower(), words_of(target.context)[-1]
        side, other = ("positive", "negative") if outer[word] > 0 else ("negative", "positive")
        opposite = wording.alike(word, previous, usable[-1 if side == "positive" else 1], ALIKE)
        middle = wording.alike(word, previous, _as_frequent(wording, word, neutral), ALIKE)
        words = {side: word, other: str(rng.choice(opposite)), "neutral": str(rng.choice(middle))}
        cased = {name: _cased(words[name], target.word) for name in VARIANTS}
        yield variants(target.document, target.context, cased, polarity, tokenizer)


def outer_quartiles(polarity: dict[str, float]) -> dict[str, float]:
    """Good words of the lexicon's top quarter and bad ones of its bottom quarter, with their polarity."""
    low, high = np.quantile(list(polarity.values()), [0.25, 0.75])
    words = {word: value for word, value in polarity.items() if WORD.fullmatch(word)}
    return {word: value for word, value in words.items() if (value > 0 and value >= high) or (value < 0 and value <= low)}


def first_target(document: int, text: str, outer: dict[str, float]) -> Target | None:
    """The first word of `outer` in the first sentence that has one after a context of allowed length."""
    fewest, most = CONTEXT_WORDS
    for sentence in SENTENCE.finditer(text):
        match = next((m for m in WORD.finditer(sentence[0]) if m[0].lower() in outer), None)
        if match is None:
            continue
        before = sentence[0][: match.start()]
        # After a hyphen or a bracket a word is no token of its own and has other neighbours.
        if (
            before[-1:].isspace()
            and fewest <= len(WORD.findall(before)) <= most
            and words_of(before + "x")[-2] != SENTENCE_START
        ):
            return Target(document, " ".join(before.split()), match[0])
    return None


def _spread(targets: list[Target | None], rng: np.random.Generator) -> list[Target]:
    """Every word once, then every word a second time, …: a few frequent words would make most triples otherwise."""
    found = [target for target in targets if target]
    seen: Counter[str] = Counter()
    order: list[tuple[int, int, Target]] = []
    for place in rng.permutation(len(found)):
        word = found[place].word.lower()
        order.append((seen[word], len(order), found[place]))
        seen[word] += 1
    return [target for *_, target in sorted(order, key=lambda item: item[:2])]


def _as_frequent(wording: Wording, word: str, among: list[str]) -> list[str]:
    """Those of about the frequency of a word, or the nearest in frequency."""
    distance: NDArray[np.float64] = np.abs(np.log([wording.count[other] / wording.count[word] for other in among]))
    near = np.flatnonzero(distance <= np.log(FREQUENCY_FACTOR))
    chosen = near if len(near) >= ALIKE else np.argsort(distance, kind="stable")[:ALIKE]
    return [among[place] for place in chosen]


def _cased(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word.capitalize() if like[0].isupper() else word


def variants(
    document: int, context: str, words: dict[str, str], polarity: dict[str, float], tokenizer: PreTrainedTokenizerBase
) -> Triple:
    """A triple of these words, by `VARIANTS`, after this context."""
    spans = [target_span(tokenizer, context, words[name]) for name in VARIANTS]
    counts = {f"tokens_{name}": span.last - span.first for name, span in zip(VARIANTS, spans, strict=True)}
    values = {f"polarity_{name}": polarity[words[name].lower()] for name in ("positive", "negative")}
    return Triple({"document": document, "context": context, **words, **values, **counts}, spans)
