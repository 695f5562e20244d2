"""Contrastive triples: one context that ends in a good, a bad or a neutral word (arXiv 2310.08164 section 3.3).

The paper has GPT-4 rewrite sentences. Here only the last word differs, and it comes from the corpus: good and bad words from
the outer quartiles of the lexicon, neutral ones from outside it. `triples.parquet` has the columns `COLUMNS`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlsae.config.probes import Probes
from rlsae.errors import RlsaeError
from rlsae.interpretation.probes.spans import Span, target_span
from rlsae.interpretation.probes.wording import SENTENCE_START, Wording, words_of
from rlsae.rewards import WORD

VARIANTS = ("positive", "negative", "neutral")
COLUMNS = [
    "triple", "document", "context", "positive", "negative", "neutral", "polarity_positive", "polarity_negative",
    "tokens_positive", "tokens_negative", "tokens_neutral",
]  # fmt: skip
CONTEXT_WORDS = (3, 40)
"""Words of a context, at least and at most."""
ALIKE = 12
"""Words used most like the original, among which its replacement is drawn."""
FREQUENCY_FACTOR = 4
"""A neutral word is at most so many times as frequent as the word that it stands for, or as rare, where there is one."""
SENTENCE = re.compile(r"[^.!?<>]+")
MARKUP = re.compile(r"<[^<>]*>")


@dataclass(frozen=True)
class Triples:
    """Triples, and what became of the others."""

    table: pd.DataFrame
    split: int
    """Triples in which a word has several tokens; none of them is in the table if these are dropped."""

    @property
    def spans(self) -> list[Span]:
        """Tokens and target of each variant, all of the first triple first."""
        return [span for row in self.table["spans"] for span in row]


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
    outer = outer_quartiles(polarity)
    texts = [MARKUP.sub(". ", text) for text in documents.text]
    wording = Wording.of(texts, set(outer), set(polarity))
    usable = {sign: [w for w, value in outer.items() if w in wording.row and value * sign > 0] for sign in (1, -1)}
    neutral = [word for word in wording.row if word not in outer]
    if not (usable[1] and usable[-1] and neutral):
        return Triples(_table([]), 0)
    held = [(n, text) for n, text, out in zip(documents.document, texts, documents.held_out, strict=True) if out]
    rng = np.random.default_rng([entry.seed, 1])
    rows: list[dict[str, object]] = []
    split = 0
    for target in _spread(filter(None, (first_target(n, text, outer) for n, text in held)), rng):
        if len(rows) == entry.triples:
            break
        word = target.word.lower()
        previous = words_of(target.context)[-1]
        sign = 1 if outer[word] > 0 else -1
        opposite = rng.choice(wording.alike(word, previous, usable[-sign], ALIKE))
        middle = rng.choice(wording.alike(word, previous, _as_frequent(wording, word, neutral), ALIKE))
        words = {"positive": word if sign > 0 else opposite, "negative": opposite if sign > 0 else word, "neutral": middle}
        row = _row(target.document, target.context, {k: _cased(str(w), target.word) for k, w in words.items()}, polarity, tokenizer)
        if row["longest"] > limit:
            continue
        split += row["split"]
        if not (row["split"] and entry.split_targets == "drop"):
            rows.append(row)
    return Triples(_table(rows), split)


def read_triples(
    entry: Probes, path: Path, polarity: dict[str, float], tokenizer: PreTrainedTokenizerBase, limit: int
) -> Triples:
    """The triples of a file of JSON lines with `context`, `positive`, `negative` and `neutral`, the first `entry.triples`.

    Raises:
        RlsaeError: names file and line where one is not a triple, its words do not have the polarity that they are said to
            have, or it is longer than the model's context; or the file cannot be read or holds none.
    """
    rows: list[dict[str, object]] = []
    split = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        content = _checked(line, where, polarity)
        row = _row(-1, content["context"].rstrip(), {k: content[k] for k in VARIANTS}, polarity, tokenizer)
        if row["longest"] > limit:
            raise RlsaeError(f"{where}: {row['longest']} tokens, the model's context holds {limit}; shorten the context")
        split += row["split"]
        if not (row["split"] and entry.split_targets == "drop"):
            rows.append(row)
        if len(rows) == entry.triples:
            break
    if not rows and not split:
        raise RlsaeError(f"{path} holds no triples")
    return Triples(_table(rows), split)


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
        if before[-1:].isspace() and fewest <= len(WORD.findall(before)) <= most and words_of(before + "x")[-2] != SENTENCE_START:
            return Target(document, " ".join(before.split()), match[0])
    return None


def _spread(targets: Iterator[Target | None], rng: np.random.Generator) -> list[Target]:
    """Every word once, then every word a second time, …: a few frequent words would make most triples otherwise."""
    found = [target for target in targets if target]
    seen: Counter[str] = Counter()
    order = []
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


def _row(
    document: int, context: str, words: dict[str, str], polarity: dict[str, float], tokenizer: PreTrainedTokenizerBase
) -> dict[str, object]:
    spans = [target_span(tokenizer, context, words[name]) for name in VARIANTS]
    counts = {f"tokens_{name}": span.last - span.first for name, span in zip(VARIANTS, spans, strict=True)}
    values = {f"polarity_{name}": polarity[words[name].lower()] for name in ("positive", "negative")}
    return {
        "document": document, "context": context, **words, **values, **counts,
        "spans": spans, "longest": max(len(span.ids) for span in spans), "split": int(max(counts.values()) > 1),
    }  # fmt: skip


def _table(rows: list[dict[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=[*COLUMNS, "spans"])
    table["triple"] = np.arange(len(rows))
    return table


def _lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8-sig").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RlsaeError(f"cannot read {path}: {error}") from None


def _checked(line: str, where: str, polarity: dict[str, float]) -> dict[str, str]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise RlsaeError(f"{where}: not valid JSON: {error}") from None
    for key in ("context", *VARIANTS):
        if not isinstance(content, dict) or not isinstance(content.get(key), str):
            raise RlsaeError(f"{where}: expected an object with the texts context, positive, negative and neutral; {key} is none")
        if not content[key].strip() or (key != "context" and len(content[key].split()) != 1):
            raise RlsaeError(f"{where}: {key}: expected {'a text' if key == 'context' else 'one word'}, found {content[key]!r:.60}")
    for key, fits, expected in (
        ("positive", lambda value: value > 0, "a word of positive polarity"),
        ("negative", lambda value: value < 0, "a word of negative polarity"),
        ("neutral", lambda value: value == 0, "a word that is not in the lexicon"),
    ):
        value = polarity.get(content[key].lower(), 0.0)
        if not fits(value):
            raise RlsaeError(f"{where}: {key}: expected {expected}, {content[key]!r} has {value:g} in the lexicon")
    return content
