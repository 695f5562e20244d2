"""Token spans whose mean feature is one row of a probe."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from transformers import PreTrainedTokenizerBase

from rlsae.preferences import shared_start


class Span(NamedTuple):
    """A text's token ids, of which `first` … `last` − 1 are averaged."""

    ids: list[int]
    first: int
    last: int


def target_span(tokenizer: PreTrainedTokenizerBase, context: str, word: str) -> Span:
    """A context, a space and a word: the tokens that hold a letter of the word."""
    text = f"{context} {word}"
    encoded = tokenizer(text, return_offsets_mapping=True)
    inside = [place for place, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(context) + 1]
    return Span(encoded["input_ids"], inside[0], inside[-1] + 1)


def response_spans(tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, limit: int) -> tuple[pd.DataFrame, list[Span]]:
    """Responses to prompts that leave room in a context of `limit` tokens, cut there, ended by the end-of-text token.

    Returns:
        the pairs that are left; spans, chosen and rejected of the first pair first.
    """
    kept, spans = [], []
    for prompt, chosen, rejected in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True):
        ids = [tokenizer(prompt + text)["input_ids"] for text in ("", chosen, rejected)]
        start = shared_start(*ids)
        kept.append(start < limit)
        if kept[-1]:
            for response in ids[1:]:
                whole = [*response, tokenizer.eos_token_id][:limit]
                spans.append(Span(whole, start, len(whole)))
    return pairs[kept], spans
