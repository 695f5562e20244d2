"""Train a small GPT-NeoX and its byte-level BPE on a corpus: the base model of studies that must run anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from rlsae.config import PretrainedModel
from rlsae.corpora import DOCUMENTS
from rlsae.errors import RlsaeError
from rlsae.progress import Progress
from rlsae.resumable import Stage
from rlsae.training import load_optimizer, optimizer_tensors, set_learning_rate, warmup_cosine

END = "<|endoftext|>"
WARMUP_SHARE = 0.05


def pretrain(
    entry: PretrainedModel, context_length: int, corpus: Path, stage: Stage
) -> tuple[GPTNeoXForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Minimise the next-token loss of the not held-out documents, each ended by the end-of-text token.

    Returns:
        model, tokenizer, and the metrics `loss_start`, `loss_end` (nats per token, mean of 10 steps), `loss_held_out`.
    """
    documents = pd.read_parquet(corpus / DOCUMENTS)
    tokenizer = train_tokenizer(documents.text[~documents.held_out].tolist(), entry.vocabulary)
    ids = [_ended(tokenizer, text, context_length) for text in documents.text]
    train = [i for i, held_out in zip(ids, documents.held_out, strict=True) if not held_out]
    held_out = [i for i, held_out in zip(ids, documents.held_out, strict=True) if held_out]
    if len(train) < entry.batch_size:
        raise RlsaeError(f"batch_size: {entry.batch_size} documents per step, the corpus trains on {len(train)}")

    torch.manual_seed(entry.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=entry.width,
            num_hidden_layers=entry.layers,
            num_attention_heads=entry.heads,
            intermediate_size=entry.mlp_width,
            max_position_embeddings=context_length,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )
    peak = entry.learning_rate
    optimizer = torch.optim.AdamW(
        [{"params": list(model.parameters()), "peak_lr": peak}], lr=peak, weight_decay=0.1, fused=True
    )
    losses: list[float] = []
    if (state := stage.load_state()) is not None:
        tensors, values = state
        model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        load_optimizer(optimizer, tensors)
        losses = values["losses"]

    warmup = max(1, round(WARMUP_SHARE * entry.steps))
    progress = Progress("pretrain", entry.steps, "steps", done=len(losses))
    for step in range(len(losses), entry.steps):
        rng = np.random.default_rng([entry.seed, step])
        batch = [train[i] for i in rng.choice(len(train), entry.batch_size, replace=False)]
        set_learning_rate(optimizer, warmup_cosine(step, warmup, entry.steps))
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress.update(loss=losses[-1])
        if stage.due():
            weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
            stage.save_state(weights | optimizer_tensors(optimizer), {"losses": losses})
    model.eval()
    metrics = {
        "loss_start": float(np.mean(losses[:10])),
        "loss_end": float(np.mean(losses[-10:])),
        "loss_held_out": _mean_loss(model, held_out) if held_out else None,
    }
    return model, tokenizer, metrics


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose only special token ends a text."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )


def next_token_loss(model: GPTNeoXForCausalLM, batch: list[list[int]]) -> torch.Tensor:
    """Mean next-token cross-entropy of some documents in nats; padding on the right is ignored by length."""
    longest = max(len(ids) for ids in batch)
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    real_BT = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, ids in enumerate(batch):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        real_BT[row, : len(ids)] = True
    logits_BTV = model(input_ids=ids_BT).logits  # right padding cannot reach back through causal attention
    return F.cross_entropy(logits_BTV[:, :-1][real_BT[:, 1:]], ids_BT[:, 1:][real_BT[:, 1:]])


@torch.no_grad()
def _mean_loss(model: GPTNeoXForCausalLM, documents: list[list[int]], batch_size: int = 64) -> float:
    batches = [documents[i : i + batch_size] for i in range(0, min(len(documents), 1024), batch_size)]
    counts = [sum(len(ids) - 1 for ids in batch) for batch in batches]
    return float(np.average([next_token_loss(model, batch).item() for batch in batches], weights=counts))


def _ended(tokenizer: PreTrainedTokenizerFast, text: str, context_length: int) -> list[int]:
    return [*tokenizer(text)["input_ids"][: context_length - 1], tokenizer.eos_token_id]
