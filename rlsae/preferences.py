"""Preference pairs: a chosen and a rejected response to one prompt, written by the grammar or read.

The table has the columns `prompt`, `chosen`, `rejected`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd

from rlsae.errors import RlsaeError
from rlsae.review_grammar import write_contrasts

ASSISTANT = "\n\nAssistant:"
"""Begins an assistant turn in the dialogues of HH-RLHF (Bai et al. 2022, arXiv 2204.05862)."""


def write_pairs(count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Distinct pairs of continuations of one opening of a review; the one with more good words is chosen."""
    return pd.DataFrame(write_contrasts(count, rng), columns=["prompt", "chosen", "rejected"])


def check_pairs(rows: list[dict[str, Any]], source: str) -> pd.DataFrame:
    """The pairs of some rows with the keys prompt, chosen and rejected, or chosen and rejected alone (whole dialogues).

    Raises:
        RlsaeError: names the first document with a missing or non-text field, an empty prompt, or equal responses. A
            response may be empty, as some of real data are: it is the end of the text alone.
    """
    if not rows:
        raise RlsaeError(f"{source} holds no documents")
    pairs = []
    for number, row in enumerate(rows):
        where = f"{source}, document {number}"
        for key in ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected"):
            if not isinstance(row.get(key), str):
                raise RlsaeError(f"{where}: {key}: expected a text, found {row.get(key)!r:.60}")
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if prompt is None:
            prompt, chosen, rejected = split_dialogues(chosen, rejected, where)
        if chosen == rejected:
            raise RlsaeError(f"{where}: chosen and rejected are the same; remove the pair, it prefers nothing")
        if not prompt.strip():
            raise RlsaeError(f"{where}: prompt is empty; remove the pair")
        pairs.append((prompt, chosen, rejected))
    return pd.DataFrame(pairs, columns=["prompt", "chosen", "rejected"])


def split_dialogues(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Prompt and responses of two dialogues: they part after the last assistant turn that both begin alike."""
    before, turn, _ = chosen[: shared_start(chosen, rejected)].rpartition(ASSISTANT)
    if not turn:
        raise RlsaeError(
            f"{where}: no key 'prompt', and the dialogues share no beginning with an assistant turn ({ASSISTANT!r}); "
            "give prompt, chosen and rejected"
        )
    prompt = before + turn
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def shared_start(*sequences: Sequence[Any]) -> int:
    """How many first items the sequences have in common."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))
