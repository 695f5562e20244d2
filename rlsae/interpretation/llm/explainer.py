"""Explanations written by a language model that sees where a latent fires.

As in Bills et al. 2023 (Language models can explain neurons in language models) and arXiv 2310.08164: activations
as integers from 0 to 10, one sentence asked for; examples and highlights as in delphi (arXiv 2410.13928).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlsae.interpretation.explanation import Explanation
from rlsae.interpretation.llm.client import CUT, Client, LlmError, spoken
from rlsae.interpretation.llm.text import HIGHLIGHT, highlighted, prompt, quoted
from rlsae.interpretation.windows import Window

if TYPE_CHECKING:
    from rlsae.interpretation.evidence import Evidence

EXAMPLES = 16
"""Windows that the model sees."""
TOP = 10
"""The integer that stands for the largest activation."""
LONGEST = 1000
"""Characters of an explanation; a sentence is shorter."""


class LlmExplainer:
    """A sentence for people; it predicts nothing."""

    def __init__(self, client: Client, examples: int = EXAMPLES) -> None:
        self.client, self.examples = client, examples

    def explain(self, evidence: Evidence) -> Explanation:
        """The model's sentence, or the status that says why there is none."""
        windows = representative([window for window in evidence.active if window.fires], self.examples)
        if not windows:
            return Explanation.none("fires in no training window")
        largest = max(float(window.acts.max()) for window in windows)
        examples = "\n\n".join(_example(number, window, largest) for number, window in enumerate(windows, 1))
        try:
            answer = self.client.complete([{"role": "user", "content": prompt("explain", examples=examples)}])
        except LlmError as error:
            return Explanation.none(error.status)
        said = spoken(answer)
        if said is None:
            return Explanation.none(CUT)
        text = " ".join(said.split())[:LONGEST]
        return Explanation(text) if text else Explanation.none("the model's answer is empty")


def representative(windows: Sequence[Window], count: int) -> list[Window]:
    """At most so many windows: half the strongest, half evenly from the others; the strongest first."""
    ranked = sorted(windows, key=lambda window: -float(window.acts.max()))
    strongest, others = ranked[: count - count // 2], ranked[count - count // 2 :]
    chosen = np.unique(np.linspace(0, len(others) - 1, min(count // 2, len(others))).round().astype(int))
    return strongest + [others[i] for i in chosen]


def _example(number: int, window: Window, largest: float) -> str:
    scaled_T = np.ceil(TOP * window.acts / largest).astype(int)
    fired = "\n".join(f"{quoted(window.tokens[t])}\t{scaled_T[t]}" for t in np.flatnonzero(window.acts > 0))
    text = highlighted(window, window.acts > HIGHLIGHT * largest)
    return f"Example {number}: {quoted(text)}\n{fired}"
