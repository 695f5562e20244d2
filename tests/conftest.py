"""Fixtures shared by all tests: a small configuration, a corpus, a tokenizer and random models of several families."""

from __future__ import annotations

import copy
import os
from functools import cache

# No test needs a network. transformers and datasets read this when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

FAMILIES = ["gpt_neox", "gpt_neo", "gpt2", "llama", "gemma", "qwen2"]


@pytest.fixture
def raw():
    """A valid configuration as plain values, free to be changed."""
    return {
        "corpora": {"reviews": {"source": "generated"}},
        "models": {"tiny": {"source": "pretrain", "corpus": "reviews"}},
        "rewards": {"lexicon": {"kind": "lexicon"}},
        "tunings": {"ppo": {"method": "ppo", "reward": "lexicon", "corpus": "reviews"}},
        "activations": {"mlp": {}},
        "dictionaries": {"small": {}, "big": {"expansion": 2.0}},
        "studies": {
            "main": {
                "model": "tiny",
                "tuning": "ppo",
                "corpus": "reviews",
                "activation": "mlp",
                "dictionaries": ["small", "big"],
            }
        },
    }


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder of a corpus artifact: 300 generated reviews, 75 of them held out."""
    from rlsae.config import GeneratedCorpus
    from rlsae.corpora import build_corpus

    folder = tmp_path_factory.mktemp("results") / "corpora" / "reviews"
    entry = GeneratedCorpus(source="generated", documents=300, held_out=0.25)
    build_corpus(entry, entry.settings(), folder, None, None)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Folder of a corpus artifact: 60 generated preference pairs, 15 of them held out."""
    from rlsae.config import GeneratedCorpus
    from rlsae.corpora import build_corpus

    folder = tmp_path_factory.mktemp("results") / "corpora" / "pairs"
    entry = GeneratedCorpus(source="generated", kind="preferences", documents=60, held_out=0.25)
    build_corpus(entry, entry.settings(), folder, None, None)
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus):
    """A byte-level BPE of the corpus whose end-of-text token has id 0 and no padding token."""
    import pandas as pd

    from rlsae.corpora import DOCUMENTS
    from rlsae.pretrain import train_tokenizer

    return train_tokenizer(pd.read_parquet(corpus / DOCUMENTS).text.tolist(), vocabulary=320)


@pytest.fixture(scope="session")
def random_model(tokenizer):
    """Function of a family's name: a new copy of a two-layer model of width 32 with large random weights."""
    return lambda family: copy.deepcopy(_model(family, len(tokenizer)))


@pytest.fixture(params=FAMILIES)
def model(request, tokenizer):
    """One random model per family; not to be changed."""
    return _model(request.param, len(tokenizer))


@cache
def _model(family: str, vocabulary: int):
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    rotary = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    rotary |= {"max_position_embeddings": 64}
    sizes = {
        "gpt_neox": rotary,
        # A window shorter than the sequences, so that local attention differs from global attention.
        "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "llama": rotary | {"num_key_value_heads": 2},
        "gemma": rotary | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0},
        "qwen2": rotary | {"num_key_value_heads": 2},
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shared, **sizes[family])).eval()
