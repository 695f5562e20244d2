"""Recipes of every architecture, members in training and random rows, for the tests of the dictionaries."""

from __future__ import annotations

import torch
from pydantic import TypeAdapter

from rlsae.config import AnyDictionary
from rlsae.sae.architectures import ARCHITECTURES
from rlsae.sae.dictionary import SparseAutoencoder

CPU = torch.device("cpu")
SETTINGS = {"batch_rows": 64, "epochs": 2, "seeds": [0, 1]}
ENTRIES = {
    "tied_relu": {"l1": 0.01},
    "relu": {"l1": 0.01},
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "jumprelu": {"l0": 3, "bandwidth": 0.2},
    "gated": {"l1": 0.01},
    "matryoshka": {"k": 3, "prefixes": [0.25, 0.5, 1.0]},
}
"""What each architecture needs to be small."""
DICTIONARY_LEARNING = [
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
]
"""The classes of dictionary_learning that can be read."""


def entry_of(architecture="tied_relu", **changes):
    """A recipe of this architecture."""
    small = SETTINGS | ENTRIES[architecture] if architecture in ENTRIES else {}
    return TypeAdapter(AnyDictionary).validate_python({"architecture": architecture} | small | changes)


def member_of(architecture, channels, latents, seed=0, **changes):
    """A member before its first step."""
    return ARCHITECTURES[architecture](channels, latents, entry_of(architecture, **changes), seed, CPU)


def random_rows(rows, channels, seed=0):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def autoencoder(W_enc_DF, b_enc_F, W_dec_FD, b_dec_D, **options):
    """A dictionary of these numbers."""
    tensors = (torch.tensor(values, dtype=torch.float32) for values in (W_enc_DF, b_enc_F, W_dec_FD, b_dec_D))
    return SparseAutoencoder(*tensors, **options)
