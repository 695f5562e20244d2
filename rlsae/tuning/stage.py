"""Stage `policies`: tune a base model and publish the result with its checkpoints, history and evaluation."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rlsae.compute import device
from rlsae.config import AnyReward, PPOTuning
from rlsae.models import load, save
from rlsae.resumable import Stage
from rlsae.rewards import load_reward
from rlsae.tuning import ppo
from rlsae.tuning.evaluate import evaluate
from rlsae.tuning.rollout import Prompts


def build_policy(
    entry: PPOTuning,
    reward_entry: AnyReward,
    settings: dict[str, Any],
    out: Path,
    work: Path | None,
    base: Path,
    corpus: Path,
    reward_file: Path | None,
) -> None:
    """Tune `base` on the reward with the prompts of `corpus`.

    Writes `model/`, `checkpoints/{step}/`, `history.parquet` and `samples.parquet`.
    """
    inputs = {"base": base, "corpus": corpus} | ({"reward": reward_file} if reward_file else {})
    with Stage("policies", out, settings, inputs, work) as stage:
        reward = load_reward(reward_entry, reward_file)
        where = device()
        lm, tokenizer = load(base / "model", where)
        reference, _ = load(base / "model", where)
        prompts = Prompts(corpus, tokenizer, reference, entry.query_tokens, entry.response_tokens, held_out=True)
        prompts.require(entry.evaluation_prompts)
        started = time.monotonic()
        history = ppo.tune(lm, reference, tokenizer, corpus, reward, entry, stage)
        stage.details = {"device": str(where), "tuning_seconds": round(time.monotonic() - started, 2)}
        metrics, samples = evaluate(lm, reference, tokenizer, prompts, reward, entry)
        save(lm, tokenizer, stage.staging / "model")
        history.to_parquet(stage.staging / "history.parquet", index=False)
        samples.to_parquet(stage.staging / "samples.parquet", index=False)
        checkpoints = stage.staging / "checkpoints"
        checkpoints.mkdir()
        for step in entry.checkpoint_steps():
            shutil.copytree(stage.work / "checkpoints" / str(step), checkpoints / str(step))
        stage.publish({**metrics, "checkpoints": entry.checkpoint_steps()})
