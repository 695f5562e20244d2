"""DPO, RLOO and GRPO by TRL's trainers, with the artifacts, the resume and the checkpoints of every other method.

What TRL leaves to its caller. A resumed Trainer loads the model's head under its stored name and so loses it
silently (GPT-NeoX: `embed_out` on disk, `lm_head` in memory), hence the policy itself is loaded from the checkpoint
before training goes on. Rollouts are not part of a checkpoint, hence one is only made where a rollout batch is used up.
Its scoring passes no positions, wrong for models that learn them (GPT-2, GPT-Neo) when prompts are padded on the left,
hence they are derived from the mask.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import safe_globals
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlsae.compute import device
from rlsae.config import DPOTuning, GroupTuning, GRPOTuning
from rlsae.corpora import PAIRS
from rlsae.errors import RlsaeError
from rlsae.models import context_limit, load
from rlsae.progress import say
from rlsae.resumable import Stage
from rlsae.rewards import Reward
from rlsae.tuning.history import History
from rlsae.tuning.policy import keep_checkpoint, lora_config, merged
from rlsae.tuning.rollout import Prompts

COLUMNS = {
    "reward": "reward",
    "kl": "kl_per_token",
    "completions/mean_length": "response_length",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_fraction",
    "rewards/accuracies": "preference_accuracy",
    "rewards/margins": "margin",
    "loss": "loss",
    "learning_rate": "learning_rate",
}
"""TRL's name of a figure → our column of the history."""
COMPLETE = "complete"
"""Marks a checkpoint folder of the trainer that was written to its end."""
Entry = DPOTuning | GroupTuning


def tune(
    base: Path, tokenizer: PreTrainedTokenizerBase, corpus: Path, reward: Reward, entry: Entry, stage: Stage
) -> tuple[PreTrainedModel, pd.DataFrame]:
    """Tune the model of the folder `base`; publish checkpoints under `stage.work`.

    Returns:
        The tuned model, and one row per batch: of rloo and grpo reward, kl (nats per response, estimated on the samples,
        where it is penalised), response_length (tokens), entropy (nats per token), clip_fraction; of dpo
        preference_accuracy and margin on the batch, entropy; loss and learning_rate of all.
    """
    for noisy in ("transformers", "trl", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft|accelerate")
    folder = stage.work / "trainer"
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        check_state(checkpoint)
    lm, _ = load(checkpoint if checkpoint and not entry.lora else base, device())
    lm.config._name_or_path = lm.name_or_path = str(base)  # where TRL takes the reference of rloo and grpo from
    lm.generation_config = GenerationConfig()  # what TRL leaves open it would fill from the model's own
    bookkeeping = Bookkeeping(stage, entry, tokenizer, base)
    tokenizer = copy.deepcopy(tokenizer)  # the trainers set its padding token
    if isinstance(entry, DPOTuning):
        reference = None if entry.lora else load(base, device())[0]
        trainer = dpo_trainer(lm, reference, tokenizer, corpus, entry, folder, bookkeeping)
    else:
        trainer = group_trainer(lm, tokenizer, corpus, reward, entry, folder, bookkeeping)
    for model in filter(None, (trainer.model, trainer.ref_model)):
        model.register_forward_pre_hook(positions_from_mask, with_kwargs=True)
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        say(f"policies: continuing from the partial state in {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return bookkeeping.published(trainer.model), bookkeeping.history.table()


def dpo_trainer(
    lm: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    entry: DPOTuning,
    folder: Path,
    bookkeeping: Bookkeeping,
) -> DPOTrainer:
    """Minimise -log σ(β (log π/π₀(chosen) - log π/π₀(rejected))) on the pairs that are not held out."""
    pairs = pd.read_parquet(corpus / PAIRS)
    rows = pairs.loc[~pairs.held_out, ["prompt", "chosen", "rejected"]]
    if len(rows) < entry.batch_size:
        raise RlsaeError(f"batch_size: {entry.batch_size} pairs per step are asked for, the corpus trains on {len(rows)}")
    longest = max_tokens(entry, lm)
    arguments = DPOConfig(**shared_arguments(entry, folder, steps_per_batch=1), beta=entry.beta, max_length=longest)
    use_one_device(arguments)
    trainer = DPOTrainer(
        lm,
        reference,
        args=arguments,
        train_dataset=Dataset.from_pandas(rows, preserve_index=False),
        processing_class=tokenizer,
        peft_config=lora_config(entry),
        callbacks=[bookkeeping],
    )
    kept = len(trainer.train_dataset)
    if kept < entry.batch_size:
        raise RlsaeError(
            f"max_tokens: only {kept} of {len(rows)} training prompts are shorter than {longest} tokens; raise it, or use "
            "a model with a longer context"
        )
    bookkeeping.stage.details["pairs_trained_on"] = kept
    return trainer


def group_trainer(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    reward: Reward,
    entry: GroupTuning,
    folder: Path,
    bookkeeping: Bookkeeping,
) -> RLOOTrainer | GRPOTrainer:
    """Sample `group_size` responses to each prompt; the others of the group are each one's baseline."""
    prompts = Prompts(corpus, tokenizer, lm, entry, held_out=False)
    count = entry.batch_size // entry.group_size
    ids = [i for batch in range(entry.batches) for i in prompts.sample(count, np.random.default_rng([entry.seed, batch]))]

    def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return reward(prompts, completions)

    group: dict[str, Any] = {
        "num_generations": entry.group_size,
        "generation_batch_size": entry.batch_size,
        "num_iterations": entry.epochs,
        "max_completion_length": entry.response_tokens[1],
        "beta": entry.kl_coefficient,
        "epsilon": entry.clip,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "shuffle_dataset": False,
        "disable_dropout": True,
    }
    steps_per_batch = entry.epochs * entry.batch_size // entry.minibatch_size
    kind, config = (GRPOTrainer, GRPOConfig) if isinstance(entry, GRPOTuning) else (RLOOTrainer, RLOOConfig)
    arguments = config(**shared_arguments(entry, folder, steps_per_batch), **group)
    use_one_device(arguments)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    trainer = kind(
        lm,
        score,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        peft_config=lora_config(entry),
        callbacks=[bookkeeping],
    )
    # Text and back is not the identity where a prompt ends within a character.
    ids_of = dict(zip(texts, ids, strict=True))
    setattr(trainer, "_tokenize_prompts", lambda prompts: ([ids_of[text] for text in prompts], None, {}))  # noqa: B010
    return trainer


def shared_arguments(entry: Entry, folder: Path, steps_per_batch: int) -> dict[str, Any]:
    """Arguments of any trainer: our schedule and seeds, one device, nothing saved or reported but by `Bookkeeping`."""
    return {
        "output_dir": str(folder),
        "seed": entry.seed,
        "max_steps": entry.batches * steps_per_batch,
        "per_device_train_batch_size": entry.rows_at_once,
        "gradient_accumulation_steps": entry.gradient_accumulation,
        "learning_rate": entry.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": entry.warmup_batches * steps_per_batch,
        "weight_decay": 0.0,
        "max_grad_norm": entry.max_grad_norm,
        "bf16": entry.precision == "bfloat16",
        "gradient_checkpointing": False,
        "logging_steps": steps_per_batch,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": device().type == "cpu",
    }


def use_one_device(arguments: TrainingArguments) -> None:
    """Keep a trainer from spreading, and so multiplying, its batch over every GPU in sight."""
    arguments._n_gpu = min(1, arguments.n_gpu)


class Bookkeeping(TrainerCallback):
    """Keeps history, published checkpoints and the partial state while a trainer runs."""

    def __init__(self, stage: Stage, entry: Entry, tokenizer: PreTrainedTokenizerBase, base: Path) -> None:
        self.stage, self.entry, self.tokenizer, self.base = stage, entry, tokenizer, base
        self.history: History
        self.steps_per_batch = 1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps_per_batch = args.max_steps // self.entry.batches
        earlier = [{"batch": batch, **row(logs)} for batch, logs in enumerate(state.log_history)]
        self.history = History(self.stage, self.entry, earlier)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" in logs:
            self.history.add(row(logs))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **models: Any) -> None:
        batch, rest = divmod(state.global_step, self.steps_per_batch)
        if rest:
            return
        if batch in self.entry.checkpoint_steps():
            keep_checkpoint(self.stage, self.published(models["model"]), self.tokenizer, batch)
        # A trainer that resumes after its last step makes one more.
        control.should_save = state.global_step < args.max_steps and self.stage.due()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    def published(self, lm: Any) -> PreTrainedModel:
        """The trained weights in a model without the trainer's changes to settings and forward pass."""
        tuned, _ = load(self.base, lm.device)
        tuned.load_state_dict(merged(lm).state_dict())
        return tuned


def row(logs: dict[str, float]) -> dict[str, float]:
    """One row of the history from what a trainer logs."""
    found = {ours: float(logs[theirs]) for theirs, ours in COLUMNS.items() if theirs in logs}
    if "kl_per_token" in found:
        found["kl"] = found.pop("kl_per_token") * found["response_length"]
    return found


def max_tokens(entry: DPOTuning, lm: PreTrainedModel) -> int:
    """Tokens of prompt and response that are trained on.

    Raises:
        RlsaeError: more are asked for than the model's context holds.
    """
    limit = context_limit(lm)
    if entry.max_tokens is not None and entry.max_tokens > limit:
        raise RlsaeError(f"max_tokens: {entry.max_tokens} tokens are asked for, the model's context holds {limit}")
    return entry.max_tokens or limit


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; those that were not are deleted."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)


def check_state(checkpoint: Path) -> None:
    """Read a checkpoint as the trainer will, which does not say which file it could not read.

    Raises:
        RlsaeError: a file is damaged.
    """
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix in (".pt", ".pth"):
                with safe_globals():  # the generators of numpy
                    torch.load(path, map_location="cpu", weights_only=True)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (UnpicklingError, EOFError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise RlsaeError(
                f"the partial state {path} is damaged ({type(error).__name__}); delete {checkpoint} to go on from the one "
                "before it, or anew where there is none"
            ) from None


def positions_from_mask(model: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Number the real tokens of each row from 0, where a caller gives a mask and no positions."""
    mask, ids = named.get("attention_mask"), named.get("input_ids")
    if named.get("position_ids") is None and mask is not None and ids is not None and mask.shape == ids.shape:
        named["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return arguments, named
