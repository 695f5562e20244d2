"""Stage `policies`: tune a base model, or take a tuned one, and publish it with its checkpoints, history and evaluation."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from torch import OutOfMemoryError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.compute import device
from rlsae.config import AnyReward, AnyTuning, DPOTuning, ExternalTuning, OnPolicyTuning, PPOTuning, Training
from rlsae.corpora import PAIRS
from rlsae.errors import RlsaeError
from rlsae.models import check_same_shape, check_same_tokenizer, context_limit, load, save
from rlsae.resumable import Stage
from rlsae.rewards import Reward, load_reward
from rlsae.tuning.evaluate import evaluate
from rlsae.tuning.policy import CHECKPOINTS
from rlsae.tuning.preference_accuracy import preference_accuracy
from rlsae.tuning.rollout import Prompts


def build_policy(
    entry: AnyTuning,
    reward_entry: AnyReward,
    settings: dict[str, Any],
    out: Path,
    work: Path | None,
    base: Path,
    corpus: Path,
    reward_file: Path | None,
    tuned: Path | None,
) -> None:
    """Tune `base` on the reward or the preferences, with the prompts of `corpus`.

    Args:
        reward_file: file or folder of the reward, where it has one.
        tuned: folder of an external model, where it is no repository of the hub.

    Writes `model/`, `checkpoints/{batch}/`, `history.parquet` and `samples.parquet`.
    """
    inputs = {"base": base, "corpus": corpus, "reward": reward_file, "tuned": tuned}
    with Stage("policies", out, settings, {name: path for name, path in inputs.items() if path}, work) as stage:
        reward = load_reward(reward_entry, reward_file)
        reference, tokenizer = load(base / "model", device())
        prompts = Prompts(corpus, tokenizer, reference, entry, held_out=True)
        prompts.require(entry.evaluation_prompts)
        started = time.monotonic()
        with explained_memory(entry):
            lm, history = tuned_model(entry, reference, tokenizer, base / "model", corpus, reward, tuned, stage)
            stage.details |= {"device": str(reference.device), "tuning_seconds": round(time.monotonic() - started, 2)}
            metrics, samples = evaluate(lm, reference, tokenizer, prompts, reward, entry)
            if (corpus / PAIRS).exists():
                longest = (isinstance(entry, DPOTuning) and entry.max_tokens) or context_limit(reference)
                metrics |= preference_accuracy(lm, reference, tokenizer, pd.read_parquet(corpus / PAIRS), longest)
        save(lm, tokenizer, stage.staging / "model")
        history.to_parquet(stage.staging / "history.parquet", index=False)
        samples.to_parquet(stage.staging / "samples.parquet", index=False)
        checkpoints = stage.staging / CHECKPOINTS
        checkpoints.mkdir()
        for step in entry.checkpoint_steps():
            shutil.copytree(stage.work / CHECKPOINTS / str(step), checkpoints / str(step))
        stage.publish({**metrics, "checkpoints": entry.checkpoint_steps()})


def tuned_model(
    entry: AnyTuning,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    corpus: Path,
    reward: Reward,
    tuned: Path | None,
    stage: Stage,
) -> tuple[PreTrainedModel, pd.DataFrame]:
    """The model that the entry's method makes of the base, and the history of its training."""
    if isinstance(entry, ExternalTuning):
        return external(entry, reference, tokenizer, tuned), pd.DataFrame({"batch": pd.Series(dtype="int64")})
    if isinstance(entry, PPOTuning):
        from rlsae.tuning import ppo

        lm, _ = load(base, reference.device)
        return ppo.tune(lm, reference, tokenizer, corpus, reward, entry, stage)
    from rlsae.tuning import trl_trainers

    return trl_trainers.tune(base, tokenizer, corpus, reward, entry, stage)


def external(
    entry: ExternalTuning, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | None
) -> PreTrainedModel:
    """A tuned model from elsewhere.

    Raises:
        RlsaeError: it cannot be a tuning of the base.
    """
    source = folder or entry.repository
    assert source is not None
    lm, its_tokenizer = load(source, base.device, entry.revision)
    check_same_shape(base, lm, str(source))
    check_same_tokenizer(tokenizer, its_tokenizer, str(source))
    return lm


@contextmanager
def explained_memory(entry: AnyTuning) -> Iterator[None]:
    """
    Raises:
        RlsaeError: memory ran out within the context; says which setting to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        of_the_cpu = any(words in str(error) for words in ("can't allocate memory", "not enough memory"))
        if not isinstance(error, MemoryError | OutOfMemoryError) and not of_the_cpu:
            raise
        advice = "use a smaller model or a larger machine"
        if isinstance(entry, Training):
            key = "minibatch_size" if isinstance(entry, OnPolicyTuning) else "batch_size"
            advice = (
                f"raise gradient_accumulation (now {entry.gradient_accumulation}) or lower {key} (now {entry.rows_per_step}); "
                "precision: bfloat16 and lora take less too"
            )
        raise RlsaeError(f"out of memory: {advice}\n{str(error).splitlines()[0] if str(error) else ''}") from None
