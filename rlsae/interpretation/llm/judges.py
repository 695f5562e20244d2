"""Judgements by a language model that reads an explanation: detection and fuzzing (Paulo et al. 2024, arXiv 2410.13928).

Both ask for a 0 or 1 per held-out window and give balanced accuracy: 0.5 is chance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.explanation import EXPLAINED, Explanation, Score
from rlsae.interpretation.llm.client import Client, LlmError, ask, spoken
from rlsae.interpretation.llm.text import HIGHLIGHT, highlighted, numbered, plain, prompt, quoted
from rlsae.interpretation.windows import Window
from rlsae.statistics import bootstrap_weights

BATCH = 10
"""Most windows of one request; batches are equally large, so that none has fewer than five unless there are fewer."""
Example = tuple[str, bool]
"""A text, and whether 1 is right."""


class _Judge:
    prompt_name: ClassVar[str]

    def __init__(self, client: Client) -> None:
        self.client = client

    def _score(self, explanation: Explanation, examples: Sequence[Example], seed: int) -> Score:
        """Balanced accuracy over the examples whose batch was answered; a status where more than half were not."""
        order = np.random.default_rng(seed).permutation(len(examples))
        batches = np.array_split(order, -(-len(order) // BATCH))
        truth, said, status, failed = [], [], "", 0
        for batch in batches:
            try:
                said += self._answers(explanation, [examples[i][0] for i in batch])
                truth += [examples[i][1] for i in batch]
            except LlmError as error:
                status, failed = error.status, failed + 1
        if 2 * failed > len(batches):
            return Score.none(f"{failed} of {len(batches)} requests failed: {status}")
        return balanced_accuracy(np.array(truth, bool), np.array(said, bool), seed)

    def _answers(self, explanation: Explanation, texts: list[str]) -> list[int]:
        wanted = len(texts)
        filled = prompt(self.prompt_name, explanation=quoted(explanation.text), examples=numbered(texts), count=wanted)
        return ask(self.client, filled, prompt("remind_list", count=wanted), lambda answer: read_list(answer, wanted))


class LlmDetection(_Judge):
    """Does a window hold what the explanation says?"""

    prompt_name = "detection"

    def score(self, explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], seed: int) -> Score:
        """Of windows in which the latent fires and in which it does not."""
        if explanation.status != EXPLAINED:
            return Score.none(explanation.status)
        if not active or not silent:
            return Score.none(f"{len(active)} activating and {len(silent)} silent windows: not scored")
        examples = [(plain(window), True) for window in active] + [(plain(window), False) for window in silent]
        return self._score(explanation, examples, seed)


class LlmFuzzing(_Judge):
    """Are the highlighted tokens of an activating window the ones that the explanation speaks of?

    Every other window has as many other tokens highlighted, where the latent does not fire.
    """

    prompt_name = "fuzzing"

    def score(self, explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], seed: int) -> Score:
        """Of the activating windows alone, those left out that have too few silent tokens to highlight."""
        if explanation.status != EXPLAINED:
            return Score.none(explanation.status)
        rng = np.random.default_rng(seed)
        pairs = [(window, strong_tokens(window), other_tokens(window, rng)) for window in active if window.fires]
        usable = [(window, right_T, wrong_T) for window, right_T, wrong_T in pairs if wrong_T is not None]
        if len(usable) < 2:
            return Score.none(f"{len(usable)} activating windows with enough silent tokens: not scored")
        right_W = rng.permutation(np.arange(len(usable)) % 2 == 0)
        examples = [
            (highlighted(window, right_T if right else wrong_T), bool(right))
            for (window, right_T, wrong_T), right in zip(usable, right_W, strict=True)
        ]
        return self._score(explanation, examples, seed)


def strong_tokens(window: Window) -> NDArray[np.bool_]:
    """Tokens [T] to highlight in an activating window."""
    return window.acts > HIGHLIGHT * window.acts.max()


def other_tokens(window: Window, rng: np.random.Generator) -> NDArray[np.bool_] | None:
    """As many silent tokens [T], shifted as a whole where that is possible, so that their pattern gives nothing away."""
    strong_T, silent_T = strong_tokens(window), window.acts <= 0
    shifted = [np.roll(strong_T, shift) for shift in range(1, len(strong_T))]
    able = [mark_T for mark_T in shifted if silent_T[mark_T].all()]
    if able:
        return able[rng.integers(len(able))]
    if silent_T.sum() < strong_T.sum():
        return None
    chosen = rng.choice(np.flatnonzero(silent_T), strong_T.sum(), replace=False)
    return np.isin(np.arange(len(strong_T)), chosen)


def balanced_accuracy(truth: NDArray[np.bool_], said: NDArray[np.bool_], seed: int) -> Score:
    """Mean of the shares of both classes that were told rightly; each class is resampled by itself for the interval."""
    classes = [(said == truth)[truth == label].astype(float) for label in (True, False)]
    if not all(len(hits) for hits in classes):
        return Score.none("the requests that were answered hold windows of one kind alone: not scored")
    value = float(np.mean([hits.mean() for hits in classes]))
    resampled = [bootstrap_weights(len(hits), seed=2 * seed + k) @ hits / len(hits) for k, hits in enumerate(classes)]
    low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
    return Score(value, float(low), float(high))


def read_list(answer: str, count: int) -> list[int] | None:
    """The last list of zeros and ones in an answer; None where there is none or it has another length."""
    lists = re.findall(r"\[[01,\s]*\]", spoken(answer) or "")
    try:
        found = json.loads(lists[-1]) if lists else None
    except ValueError:
        return None
    return found if found is not None and len(found) == count and set(found) <= {0, 1} else None
