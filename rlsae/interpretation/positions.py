"""Tokens in their documents, and what a vocabulary says of them. Shapes: N rows, V tokens, T positions."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlsae.activations.store import ActivationStore
from rlsae.interpretation.windows import Window

CASINGS = ("", "capitalised", "in capitals", "a number", "punctuation")


class Vocabulary:
    """What the text of every token of a tokenizer tells: tables over its ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, polarity: Mapping[str, float]) -> None:
        self.texts = [tokenizer.decode([token]) for token in range(size)]
        self.words = [text.strip().lower() for text in self.texts]
        self.polarity_V = np.array([polarity.get(word, 0.0) for word in self.words])
        """Of the token's word in the lexicon; 0 where it is not there."""
        self.in_lexicon_V = np.array([word in polarity for word in self.words])

    def __len__(self) -> int:
        return len(self.texts)

    def named(self, tokens: NDArray[np.int64] | list[int]) -> str:
        """Tokens for people: ‹ good› ‹ bad›."""
        return " ".join(f"‹{self.texts[token]}›" for token in tokens)

    @cached_property
    def casing_V(self) -> NDArray[np.int64]:
        """Index into `CASINGS`."""
        return np.array([_casing(text.strip()) for text in self.texts])

    def ending_V(self, letters: int) -> tuple[NDArray[np.int64], list[str]]:
        """The last letters of tokens that have more, as numbers, 0 for the others; and what the numbers stand for."""
        return _numbered([word[-letters:] if word.isalpha() and len(word) > letters else "" for word in self.words])

    def beginning_V(self, letters: int) -> tuple[NDArray[np.int64], list[str]]:
        return _numbered([word[:letters] if word.isalpha() and len(word) > letters else "" for word in self.words])

    @cached_property
    def word_V(self) -> tuple[NDArray[np.int64], list[str]]:
        """Tokens that differ in case and spaces alone have one number; 0 for those without a letter."""
        return _numbered([word if any(map(str.isalpha, word)) else "" for word in self.words])


def _casing(text: str) -> int:
    if text.isalpha():
        return 2 if text.isupper() and len(text) > 1 else int(text[0].isupper())
    return 3 if text.isdigit() else 4 * int(bool(text) and all(letter in string.punctuation for letter in text))


def _numbered(texts: list[str]) -> tuple[NDArray[np.int64], list[str]]:
    names = ["", *sorted({text for text in texts if text})]
    number = {text: index for index, text in enumerate(names)}
    return np.array([number[text] for text in texts]), names


@dataclass(frozen=True)
class Positions:
    """Some tokens in documents."""

    token_N: NDArray[np.int64]
    before_N: NDArray[np.int64]
    """The token before; -1 at the start of a document."""
    place_N: NDArray[np.int64]
    """Place in the document."""
    document_N: NDArray[np.int64]

    @classmethod
    def of_store(cls, store: ActivationStore) -> Positions:
        token_N = store.group["token"][:].astype(np.int64)
        document_N = np.repeat(np.arange(len(store.start) - 1), np.diff(store.start))
        place_N = np.arange(len(token_N)) - store.start[document_N]
        before_N = np.where(place_N > 0, np.roll(token_N, 1), -1)
        return cls(token_N, before_N, place_N, document_N)

    @classmethod
    def of_window(cls, window: Window) -> Positions:
        count = len(window.ids)
        before_N = np.concatenate([[window.before], window.ids[:-1]])
        return cls(window.ids, before_N, window.position + np.arange(count), np.full(count, window.document))

    def __getitem__(self, rows: NDArray[np.bool_]) -> Positions:
        return Positions(self.token_N[rows], self.before_N[rows], self.place_N[rows], self.document_N[rows])

    def __len__(self) -> int:
        return len(self.token_N)
