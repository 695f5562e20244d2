"""Prompts, sampled responses, and their log-probabilities under a model.

Shapes: B responses, Q prompt positions (padded left), R response positions (padded right), T = Q + R, V tokens, D width.
Masks come from lengths, never from token ids: many models pad with a token that also occurs in text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from rlsae.config import Tuning
from rlsae.corpora import DOCUMENTS, PAIRS
from rlsae.errors import RlsaeError
from rlsae.models import context_limit, width


@dataclass(frozen=True)
class Rollout:
    """Prompts with one sampled response each."""

    ids_BT: Tensor
    """Token ids; anything stands where the masks are false."""
    prompt_mask_BQ: Tensor
    response_mask_BR: Tensor
    """True from the first response token to the end-of-text token or the length limit, both included."""
    prompts: list[str]
    responses: list[str]
    """Texts without special tokens."""

    def __getitem__(self, rows: Tensor | slice) -> Rollout:
        numbers = range(len(self.prompts))[rows] if isinstance(rows, slice) else rows.tolist()
        return Rollout(
            self.ids_BT[rows],
            self.prompt_mask_BQ[rows],
            self.response_mask_BR[rows],
            [self.prompts[i] for i in numbers],
            [self.responses[i] for i in numbers],
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def response_ids_BR(self) -> Tensor:
        return self.ids_BT[:, self.prompt_mask_BQ.shape[1] :]

    @property
    def lengths_B(self) -> Tensor:
        return self.response_mask_BR.sum(1)


class Prompts:
    """Beginnings of a corpus's documents, `query_tokens` long; of a corpus of preferences, the prompts of its pairs.

    Raises:
        RlsaeError: no document is long enough, or no prompt fits the model's context beside its response.
    """

    def __init__(
        self,
        corpus: Path,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        entry: Tuning,
        held_out: bool,
    ) -> None:
        self.low, self.high = entry.query_tokens
        self.whole = (corpus / PAIRS).exists()
        side, longest = "held-out" if held_out else "training", entry.response_tokens[1]
        room = context_limit(model) - longest
        documents = pd.read_parquet(corpus / (PAIRS if self.whole else DOCUMENTS))
        texts = documents["prompt" if self.whole else "text"][documents.held_out == held_out].tolist()
        if self.whole:
            ids = [tokenizer(text)["input_ids"] for text in texts]
            self.ids = [i for i in ids if 0 < len(i) <= room]
            if not self.ids:
                raise RlsaeError(
                    f"response_tokens: no {side} prompt of {corpus} leaves room for {longest} tokens in the model's context "
                    f"of {context_limit(model)}"
                )
            return
        if self.high > room:
            raise RlsaeError(
                f"query_tokens + response_tokens: up to {self.high + longest} tokens, "
                f"the model's context holds {context_limit(model)}"
            )
        # No token is shorter than a byte, so this prefix holds `high` tokens of any text that has them.
        ids = [tokenizer(text[: 40 * self.high])["input_ids"][: self.high] for text in texts]
        self.ids = [i for i in ids if len(i) == self.high]
        if not self.ids:
            raise RlsaeError(f"query_tokens: no {side} document of {corpus} has {self.high} tokens; lower the longest prompt")

    def require(self, count: int) -> None:
        """
        Raises:
            RlsaeError: fewer than `count` documents are long enough.
        """
        if count > len(self.ids):
            raise RlsaeError(f"evaluation_prompts: {count} are asked for, {len(self.ids)} held-out ones fit")

    def sample(self, count: int, rng: np.random.Generator, *, distinct: bool = False) -> list[list[int]]:
        """Token ids of `count` prompts; those from documents are of random lengths."""
        if distinct:
            self.require(count)
        chosen = rng.choice(len(self.ids), count, replace=not distinct and count > len(self.ids))
        if self.whole:
            return [self.ids[i] for i in chosen]
        return [self.ids[i][: rng.integers(self.low, self.high + 1)] for i in chosen]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    limits: np.ndarray,
    seed: int | None = None,
    noise: LogitsProcessor | None = None,
) -> Rollout:
    """Sample one response per prompt at temperature 1 from the whole distribution (top-k 0, top-p 1).

    Args:
        prompts: token ids of B prompts.
        limits: longest response [B] in tokens.
        seed: of torch's global generator, which `generate` draws from; or else
        noise: adds Gumbel noise to the logits, of which the largest is then taken.
    """
    device = model.device
    longest = max(len(ids) for ids in prompts)
    prompt_BQ = torch.full((len(prompts), longest), tokenizer.eos_token_id)
    mask_BQ = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        prompt_BQ[row, longest - len(ids) :] = torch.tensor(ids)
        mask_BQ[row, longest - len(ids) :] = True
    if seed is not None:
        torch.manual_seed(seed)
    # What our settings leave open is filled from the model's own ones (a repetition penalty, say): the samples would not
    # be the policy's.
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    published, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        ids_BT = model.generate(
            input_ids=prompt_BQ.to(device),
            attention_mask=mask_BQ.to(device).long(),
            generation_config=GenerationConfig(
                **({"do_sample": False} if noise else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}),
                max_new_tokens=int(limits.max()),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            ),
            logits_processor=LogitsProcessorList([noise] if noise else []),
        )
    finally:
        owner.generation_config = published
    response_BR = ids_BT[:, longest:]
    ended_BR = (response_BR == tokenizer.eos_token_id).long().cumsum(1)
    before_end_BR = ended_BR - (response_BR == tokenizer.eos_token_id).long() == 0
    within_BR = torch.arange(response_BR.shape[1], device=device) < torch.as_tensor(limits, device=device)[:, None]
    response_mask_BR = before_end_BR & within_BR
    return Rollout(
        ids_BT,
        mask_BQ.to(device),
        response_mask_BR,
        tokenizer.batch_decode(prompts, skip_special_tokens=True),
        tokenizer.batch_decode(
            [ids[mask].tolist() for ids, mask in zip(response_BR, response_mask_BR, strict=True)],
            skip_special_tokens=True,
        ),
    )


class PolicyWithValue(nn.Module):
    """A causal LM and a scalar value head on the same trunk; the head starts at zero."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.value_head = nn.Linear(width(lm), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the next token logp_BRV and values_BR at the response positions."""
        captured: list[Tensor] = []
        handle = self.lm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logp_BRV = next_token_logp(self.lm, rollout)
        finally:
            handle.remove()
        return logp_BRV, self.value_head(captured[0][:, :-1]).squeeze(-1).float()


def next_token_logp(lm: PreTrainedModel, rollout: Rollout) -> Tensor:
    """log p(token | everything before it) [B, R, V] at the response positions; the head runs on these alone."""
    mask_BT = torch.cat([rollout.prompt_mask_BQ, rollout.response_mask_BR], 1).long()
    logits = lm(
        input_ids=rollout.ids_BT,
        attention_mask=mask_BT,
        # Left padding shifts every token: models with learned positions are wrong without these.
        position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=rollout.response_mask_BR.shape[1] + 1,
        use_cache=False,
    ).logits
    return logits[:, :-1].float().log_softmax(-1)


def taken(logp_BRV: Tensor, rollout: Rollout) -> Tensor:
    """Log-probability of the sampled tokens [B, R], 0 behind the end."""
    logp_BR = logp_BRV.gather(-1, rollout.response_ids_BR[..., None]).squeeze(-1)
    return logp_BR.masked_fill(~rollout.response_mask_BR, 0.0)
