"""Proximal policy optimisation on every family of models, whatever they pad with, and how much memory it takes at once."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from small_tunings import FAMILY, entry, equal, letters, runner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlsae.resumable import Stage
from rlsae.tuning.ppo import tune
from rlsae.tuning.rollout import generate

EOS = 0
PAD = "<|pad|>"


@pytest.fixture
def run(random_model, tokenizer, corpus, tmp_path):
    return runner(random_model, tokenizer, corpus, tmp_path)


# --- families ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16"}, {"lora": {}}], ids=["plain", "bfloat16", "adapters"])
def test_every_family_is_tuned_from_a_divergence_of_zero_to_other_weights(run, model, changes):
    lm, history = run("family", family=model.config.model_type, batches=2, learning_rate=1e-2, **changes)
    assert not equal(lm, model)
    assert all(parameter.isfinite().all() for parameter in lm.parameters())
    assert history.notna().all(axis=None)
    assert history.kl[0] == 0.0
    assert history.kl[1] != 0.0


# --- padding -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_with_pad(tokenizer):
    """The tokenizer with a special token that may serve as padding, the last of its vocabulary."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": [PAD]})
    return made


@pytest.fixture
def model_with_pad(random_model, tokenizer_with_pad):
    """Function: a model with a row for that token, which it likes to say, as it likes to end."""

    def make():
        lm = random_model(FAMILY)
        torch.manual_seed(0)
        lm.resize_token_embeddings(len(tokenizer_with_pad), mean_resizing=False)
        head = lm.get_output_embeddings()
        head.bias = nn.Parameter(torch.zeros(len(tokenizer_with_pad)))
        head.bias.data[[EOS, -1]] = 3.0
        return lm

    return make


def test_the_padding_token_of_a_model_does_not_matter(tokenizer_with_pad, model_with_pad, corpus, tmp_path):
    assert tokenizer_with_pad.pad_token is None
    found = {}
    for name, pad in {"none": None, "end": tokenizer_with_pad.eos_token, "own": PAD}.items():
        tokens = copy.deepcopy(tokenizer_with_pad)
        tokens.pad_token = pad
        lm, base = model_with_pad(), model_with_pad()
        for one in (lm, base):
            one.config.pad_token_id = one.generation_config.pad_token_id = tokens.pad_token_id
        with Stage("policies", tmp_path / name, {}, {}) as stage:
            found[name] = tune(lm, base, tokens, corpus, letters, entry(learning_rate=1e-2), stage)
    lm, history = found.pop("none")
    for other, other_history in found.values():
        assert equal(lm, other)
        pd.testing.assert_frame_equal(history, other_history, check_exact=True)


def test_a_padding_token_inside_a_response_is_a_token_like_others(tokenizer_with_pad, model_with_pad):
    tokens, pad = tokenizer_with_pad, len(tokenizer_with_pad) - 1
    tokens.pad_token = PAD
    rollout = generate(model_with_pad(), tokens, [[5, 6]] * 64, np.full(64, 10), seed=0)
    inside = (rollout.response_ids_BR == pad) & rollout.response_mask_BR
    behind = inside.cumsum(1).bool() & rollout.response_mask_BR & ~inside
    assert inside.any()
    assert behind.any()


# --- memory ------------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Numbers of rows of all new tensors whose last dimension is the vocabulary, apart for generation and all else."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.generating = False
        self.rows = {True: [], False: []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            is_new = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given
            if is_new and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                self.rows[self.generating].append(math.prod(tensor.shape[:-1]))
        return made


@pytest.fixture
def sizes(tokenizer, monkeypatch):
    """Records the sizes of tensors within `with sizes:`."""
    mode = Sizes(len(tokenizer))

    def spy(*given):
        mode.generating = True
        try:
            return generate(*given)
        finally:
            mode.generating = False

    monkeypatch.setattr("rlsae.tuning.ppo.generate", spy)
    return mode


def largest(run, sizes, **changes):
    """Most rows over the vocabulary, in generation and in all else, of two batches of 32 responses in minibatches of 4."""
    with sizes:
        run("sizes", batches=2, batch_size=32, minibatch_size=4, response_tokens=(3, 6), learning_rate=1e-3, **changes)
    return max(sizes.rows[True]), max(sizes.rows[False])


def test_one_minibatch_of_responses_is_held_over_the_vocabulary_and_one_position_of_a_batch_in_generation(run, sizes, model):
    assert largest(run, sizes, family=model.config.model_type) == (32, 4 * (6 + 1))


@pytest.mark.parametrize("changes", [{"lora": {}}, {"precision": "bfloat16"}], ids=["adapters", "bfloat16"])
def test_adapters_and_bfloat16_hold_no_more_over_the_vocabulary(run, sizes, changes):
    assert largest(run, sizes, **changes) == (32, 4 * (6 + 1))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_holds_one_part_over_the_vocabulary(run, sizes, parts):
    assert largest(run, sizes, gradient_accumulation=parts) == (32, 4 // parts * (6 + 1))
