"""Rewards: a number for each response, computed from texts alone."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Protocol

import torch

from rlsae.compute import device
from rlsae.config import AnyReward, ClassifierReward, LexiconReward
from rlsae.config.tunings import Scope
from rlsae.errors import RlsaeError
from rlsae.models import load_classifier

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
"""Letters of any script, with apostrophes inside."""


class Reward(Protocol):
    """Scores responses to prompts, one number each."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]: ...


class Lexicon:
    """R(text) = clip(scale · Σ polarity(word), ± clip), words lower-cased, unknown ones 0 (arXiv 2310.08164 section 3.1)."""

    def __init__(self, entry: LexiconReward, path: Path | None = None) -> None:
        self.entry = entry
        self.polarity = read_lexicon(path) if path else vader_lexicon()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self.score(text) for text in scored_texts(prompts, responses, self.entry.scope)]

    def score(self, text: str) -> float:
        total = sum(self.polarity.get(word, 0.0) for word in WORD.findall(text.lower()))
        return max(-self.entry.clip, min(self.entry.clip, self.entry.scale * total))


class Classifier:
    """scale · logit or probability of one label of a sequence-classification model."""

    def __init__(self, entry: ClassifierReward, path: Path | None = None) -> None:
        self.entry = entry
        source = path or entry.repository
        assert source is not None
        self.name = str(source)
        self.model, self.tokenizer = load_classifier(source, entry.revision, device())
        names = {str(name): number for number, name in self.model.config.id2label.items()}
        labels = {str(number): number for number in names.values()} | names
        if entry.label not in labels:
            raise RlsaeError(f"rewards.*.label: {self.name} has no label {entry.label!r}; it has: {', '.join(names)}")
        if entry.output == "probability" and len(names) == 1:
            raise RlsaeError(f"rewards.*.output: {self.name} has one label, whose probability is always 1; use logit")
        self.label = labels[entry.label]
        self.blank = "" if self.tokenizer("")["input_ids"] else self.tokenizer.eos_token

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [text or self.blank for text in scored_texts(prompts, responses, self.entry.scope)]
        scores: list[float] = []
        for start in range(0, len(texts), self.entry.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.entry.batch_size], padding=True, truncation=True, return_tensors="pt"
            ).to(self.model.device)
            with torch.no_grad():
                logits_BC = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            outputs_BC = logits_BC.softmax(-1) if self.entry.output == "probability" else logits_BC
            scores += (self.entry.scale * outputs_BC[:, self.label]).tolist()
        return scores


class Checked:
    """A function of texts, with what it returns checked."""

    def __init__(self, function: Callable[[list[str], list[str]], Sequence[float]], name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        try:
            scores = list(self.function(list(prompts), list(responses)))
        except Exception as error:
            raise RlsaeError(
                f"the reward {self.name} failed: {type(error).__name__}: {error}; first sample: {responses[0]!r}"
            ) from error
        if len(scores) != len(responses):
            raise RlsaeError(f"the reward {self.name} returned {len(scores)} numbers for {len(responses)} responses")
        for score, prompt, response in zip(scores, prompts, responses, strict=True):
            if not isinstance(score, Real) or not math.isfinite(score):
                raise RlsaeError(f"the reward {self.name} returned {score!r} for prompt {prompt!r}, response {response!r}")
        return [float(score) for score in scores]


def scored_texts(prompts: Sequence[str], responses: Sequence[str], scope: Scope) -> list[str]:
    """The responses, or prompts and responses."""
    if scope == "response":
        return list(responses)
    return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]


def word_rewards(reward: Reward, prompt: str, response: str) -> tuple[list[str], list[float]]:
    """The words of a response, each with the space before it, and what each adds to the reward of the text up to it.

    The numbers add up to the reward of the response less that of an empty one.
    """
    words = re.findall(r"\s*\S+|\s+$", response)
    texts = ["", *itertools.accumulate(words)]
    rewards = reward([prompt] * len(texts), texts)
    return words, [after - before for before, after in itertools.pairwise(rewards)]


def load_reward(entry: AnyReward, path: Path | None = None) -> Reward:
    """The reward of a configuration entry; `path` is its file where it has one."""
    if isinstance(entry, LexiconReward):
        return Lexicon(entry, path)
    if isinstance(entry, ClassifierReward):
        classifier = Classifier(entry, path)
        return Checked(classifier, classifier.name)
    if path is None:
        return Checked(_import_function(entry.function), entry.function)
    return Checked(_load_function(path, entry.function), f"{path}:{entry.function}")


def vader_lexicon() -> dict[str, float]:
    """Mean valence of VADER's words in [-4, 4] (Hutto and Gilbert 2014)."""
    import vaderSentiment

    return read_lexicon(Path(vaderSentiment.__file__).parent / "vader_lexicon.txt")


def read_lexicon(path: Path) -> dict[str, float]:
    """Word → polarity of a tab-separated file; further columns are ignored.

    Raises:
        RlsaeError: names the first line that is not `word<TAB>number`.
    """
    polarity = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            word, value = line.split("\t")[:2]
            polarity[word.lower()] = float(value)
            if not math.isfinite(float(value)):
                raise ValueError
        except ValueError:
            raise RlsaeError(f"{path}, line {number}: expected word<TAB>polarity, found {line!r:.60}") from None
    if not polarity:
        raise RlsaeError(f"{path} holds no words")
    return polarity


def _import_function(name: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RlsaeError(f"rewards.*.function: cannot import {name}: {error}; expected package.module:function") from None


def _load_function(path: Path, name: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise RlsaeError(f"{path}: expected a Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise RlsaeError(f"the reward file {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise RlsaeError(f"{path} defines no function {name!r}; set rewards.*.function")
    return getattr(module, name)
