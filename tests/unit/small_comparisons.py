"""What tests of the comparison share: dictionaries with known directions, and two policies to try them in."""

from __future__ import annotations

import numpy as np
import torch
from small_artifacts import random_documents, tiny_model, tokens_of, write_policy, write_tokens
from small_models import perturbed

from rlsae.sae.dictionary import SparseAutoencoder

CHANNELS = 8


def directions(count, seed=0, channels=CHANNELS):
    rows = np.random.default_rng(seed).normal(size=(count, channels))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def dictionary(rows_FD, bias=0.0, encoder_FD=None):
    """A dictionary whose latents write and, unless told otherwise, read these directions."""
    decoder_FD = torch.tensor(rows_FD, dtype=torch.float32)
    encoder_FD = decoder_FD if encoder_FD is None else torch.tensor(encoder_FD, dtype=torch.float32)
    b_enc_F = torch.full((len(decoder_FD),), float(bias))
    return SparseAutoencoder(encoder_FD.T.contiguous(), b_enc_F, decoder_FD, torch.zeros(decoder_FD.shape[1]))


def write_policies(folder, tokenizer):
    """Weights of a base and a tuned model by role, and a tokens artifact: `weights` and `tokens` of a comparison."""
    base = tiny_model("gpt2", layers=4, vocabulary=len(tokenizer), width=CHANNELS)
    models = {"base": base, "tuned": perturbed(base, 1)}
    for role, model in models.items():
        write_policy(folder / role, model, tokenizer)
    tokens = write_tokens(folder / "tokens" / "tiny.reviews", tokens_of(random_documents([10] * 24)))
    return {"weights": {role: folder / role / "model" for role in models}, "tokens": tokens}
