"""What the methods do alike to a policy in training: adapters, number format, published checkpoints."""

from __future__ import annotations

import copy
import shutil

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.config import Training
from rlsae.models import save
from rlsae.resumable import Stage

CHECKPOINTS = "checkpoints"


def lora_config(entry: Training) -> LoraConfig | None:
    """Adapters on every linear layer but the head (Hu et al. 2021, arXiv 2106.09685), where the entry asks for them."""
    if entry.lora is None:
        return None
    return LoraConfig(
        r=entry.lora.rank,
        lora_alpha=entry.lora.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def merged(lm: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself, or a copy with its adapters added to the weights."""
    return copy.deepcopy(lm).merge_and_unload() if isinstance(lm, PeftModel) else lm


def autocast(entry: Training, device: torch.device) -> torch.autocast:
    """Context in which matrix products run in the entry's number format; weights stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=entry.precision == "bfloat16")


def keep_checkpoint(stage: Stage, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int) -> None:
    """Save the policy after `batch` batches, to be published with the final one."""
    folder = stage.work / CHECKPOINTS / str(batch)
    partial = folder.with_suffix(".partial")
    for earlier in (partial, folder):
        shutil.rmtree(earlier, ignore_errors=True)
    save(lm, tokenizer, partial)
    partial.rename(folder)
