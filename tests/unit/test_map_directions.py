"""The principal directions of the shared linear map: what they write, where, and whether it is rewarded."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import random_documents, tokens_of, write_store

from rlsae.activations.store import ActivationStore
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.interpretation.map_directions import correlation_ci95, document_rewards, map_directions

TOKENS = tokens_of([20 + ids % 12 for ids in random_documents([8 + i % 9 for i in range(200)])])
A, B = 21, 22


@pytest.fixture(scope="module")
def base(random_model):
    return random_model("gpt_neox")


@pytest.fixture(scope="module")
def stores(base, tmp_path_factory):
    """Rows whose channel 0 is large at token A; tuning writes the embedding of token B along with it."""
    channels = base.config.hidden_size
    rng = np.random.default_rng(0)
    base_ND = rng.normal(size=(len(TOKENS.token), channels)) * 0.5
    base_ND[:, 0] += 4 * (TOKENS.token == A)
    written_D = base.get_output_embeddings().weight[B].detach().double().numpy()
    tuned_ND = base_ND + np.outer(base_ND[:, 0], written_D / np.linalg.norm(written_D))
    folder = tmp_path_factory.mktemp("stores")
    acts = {"base": base_ND, "tuned": tuned_ND}
    return {role: ActivationStore(write_store(folder / role, TOKENS, {0: acts_ND})) for role, acts_ND in acts.items()}


def count_of_a(tokenizer):
    """A reward for token A in the text."""
    text = tokenizer.decode([A])
    return lambda prompts, responses: [float(response.count(text)) for response in responses]


def told(stores, rank, base, tokenizer):
    rows = PairedRows(stores["base"], stores["tuned"], 0)
    rewards = document_rewards(stores["base"], tokenizer, count_of_a(tokenizer))
    return map_directions(rows, fit_linear_maps(rows, torch.device("cpu")), rank, base, tokenizer, rewards)


def test_a_direction_is_told_by_what_it_writes_where_and_its_reward(stores, base, tokenizer):
    table = told(stores, 1, base, tokenizer)
    row = table.iloc[0]
    assert (row.layer, row.direction, len(table)) == (0, 0, 1)
    assert row.share > 0.9
    assert row.raises.split(" ")[0] == f"‹{tokenizer.decode([B])}›"
    assert row.written_at.split(" ")[0] == f"‹{tokenizer.decode([A])}›"
    assert row.reward_correlation_low < row.reward_correlation < row.reward_correlation_high
    assert row.reward_correlation_low > 0.2


def test_no_more_directions_are_told_than_the_map_has(stores, base, tokenizer):
    assert len(told(stores, 3, base, tokenizer)) == 3
    assert len(told(stores, 50, base, tokenizer)) == 8


def test_the_correlation_is_pearsons():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = x + rng.normal(size=200)
    found, low, high = correlation_ci95(x, y)
    assert found == pytest.approx(pd.Series(x).corr(pd.Series(y)))
    assert low < found < high
    assert high - low == pytest.approx(2 * 1.96 * (1 - found**2) / np.sqrt(200), rel=0.25)


def test_a_constant_reward_has_no_correlation():
    assert np.isnan(correlation_ci95(np.arange(5.0), np.ones(5))).all()


def test_the_sign_follows_the_shift_of_the_mean(stores, base, tokenizer):
    row = told(stores, 1, base, tokenizer).iloc[0]
    shift_D = stores["tuned"].statistics(0)[0] - stores["base"].statistics(0)[0]
    lens_V = base.get_output_embeddings().weight.detach().double() @ torch.from_numpy(shift_D)
    assert row.raises.split(" ")[0] == f"‹{tokenizer.decode([int(lens_V.argmax())])}›"
