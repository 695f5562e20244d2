"""How often a tuned model prefers the chosen response of held-out pairs, beside a rule that only looks at length."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rlsae.corpora import DOCUMENTS
from rlsae.tuning import preference_accuracy as module
from rlsae.tuning.preference_accuracy import encoded, half_for_ties, implicit_reward, preference_accuracy
from tests.conftest import FAMILIES

LIMIT = 64


def table(rows, held_out=True):
    """Pairs of (prompt, chosen, rejected)."""
    return pd.DataFrame(rows, columns=["prompt", "chosen", "rejected"]).assign(held_out=held_out)


@pytest.fixture(scope="module")
def pairs(corpus):
    """40 pairs of pieces of reviews, every other one held out; some are longer than the context."""
    texts = pd.read_parquet(corpus / DOCUMENTS).text.tolist()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        prompt, chosen, rejected = (texts[3 * number + k] for k in range(3))
        cuts = rng.integers(1, 120, 3)
        rows.append((prompt[: cuts[0]], " " + chosen[: cuts[1]], " " + rejected[: cuts[2]]))
    return table(rows, held_out=[number % 2 == 0 for number in range(40)])


@pytest.fixture
def disturbed(random_model):
    """Function of a family: its random model with noise on every weight."""

    def make(family, scale=0.05):
        lm = random_model(family)
        generator = torch.Generator().manual_seed(1)
        for weight in lm.parameters():
            weight.data += scale * torch.randn(weight.shape, generator=generator)
        return lm

    return make


@torch.no_grad()
def slow_reward(tuned, base, ids, start):
    """The implicit reward of one text alone, token by token."""
    total = 0.0
    for t in range(max(start, 1), len(ids)):
        for sign, lm in ((1, tuned), (-1, base)):
            total += sign * lm(torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)[ids[t]].item()
    return total


def slow_ids(tokenizer, prompt, response, other):
    """Token ids of a text, and how many of them it has in common with its prompt alone and with the other text."""
    alone, ids, its = (tokenizer(text)["input_ids"] for text in (prompt, prompt + response, prompt + other))
    start = 0
    while start < len(alone) and alone[start] == ids[start] == its[start]:
        start += 1
    return [*ids, tokenizer.eos_token_id][:LIMIT], start


# --- the implicit reward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_implicit_reward_is_that_of_each_text_alone(random_model, disturbed, tokenizer, pairs, family):
    tuned, base = disturbed(family), random_model(family)
    rows = pairs.head(6)
    texts = [text for pair in encoded(rows, tokenizer, LIMIT) for text in pair]
    assert len({len(ids) for ids, _ in texts}) > 3
    expected = [slow_reward(tuned, base, ids, start) for ids, start in texts]
    assert implicit_reward(tuned, base, tokenizer, texts).tolist() == pytest.approx(expected, abs=1e-3)
    assert np.ptp(expected) > 0.1


def test_the_implicit_reward_does_not_depend_on_how_many_texts_are_scored_at_once(
    random_model, disturbed, tokenizer, pairs, monkeypatch
):
    models = disturbed("gpt2"), random_model("gpt2")
    texts = [pair[0] for pair in encoded(pairs, tokenizer, LIMIT)]
    whole = implicit_reward(*models, tokenizer, texts)
    monkeypatch.setattr(module, "BATCH", 3)
    assert implicit_reward(*models, tokenizer, texts).tolist() == pytest.approx(whole.tolist(), abs=1e-4)


def test_texts_are_encoded_as_prompt_and_response_with_an_end_cut_at_the_context(tokenizer, pairs):
    found = encoded(pairs, tokenizer, LIMIT)
    kept = 0
    for prompt, chosen, rejected in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True):
        ids, start = slow_ids(tokenizer, prompt, chosen, rejected)
        if start < LIMIT:
            assert found[kept] == ((ids, start), slow_ids(tokenizer, prompt, rejected, chosen))
            kept += 1
    assert kept == len(found)
    lengths = [len(ids) for pair in found for ids, _ in pair]
    assert min(lengths) < LIMIT == max(lengths)


def test_a_response_begins_where_its_tokens_part_from_those_of_the_prompt(tokenizer):
    [((ids, start), _)] = encoded(table([("i saw th", "e film", "at plot")]), tokenizer, LIMIT)
    assert tokenizer.decode(ids[:start]) == "i saw"
    assert tokenizer.decode(ids[start:-1]) == " the film"


def test_an_empty_response_is_the_end_of_the_text_alone(random_model, disturbed, tokenizer):
    [((ids, start), _)] = encoded(table([("the film", "", " is good")]), tokenizer, LIMIT)
    assert ids[start:] == [tokenizer.eos_token_id]
    models = disturbed("gpt_neox"), random_model("gpt_neox")
    assert implicit_reward(*models, tokenizer, [(ids, start)])[0] == pytest.approx(slow_reward(*models, ids, start), abs=1e-4)


def test_without_a_prompt_the_first_token_is_given_and_not_scored(random_model, disturbed, tokenizer):
    texts = [pair[0] for pair in encoded(table([("", "the film", "a plot")]), tokenizer, LIMIT)]
    models = disturbed("gpt_neox"), random_model("gpt_neox")
    assert implicit_reward(*models, tokenizer, texts)[0] == pytest.approx(slow_reward(*models, *texts[0]), abs=1e-4)


# --- accuracies --------------------------------------------------------------------------------------------------


def test_the_accuracy_is_the_share_of_held_out_pairs_whose_chosen_response_has_the_larger_reward(
    random_model, disturbed, tokenizer, pairs
):
    models = disturbed("gpt_neox"), random_model("gpt_neox")
    right = []
    for pair in pairs[pairs.held_out].itertuples():
        ids, start = slow_ids(tokenizer, pair.prompt, pair.chosen, pair.rejected)
        if start < LIMIT:
            other_ids, _ = slow_ids(tokenizer, pair.prompt, pair.rejected, pair.chosen)
            right.append(slow_reward(*models, ids, start) > slow_reward(*models, other_ids, start))
    metrics = preference_accuracy(*models, tokenizer, pairs, LIMIT)
    assert metrics["preference_pairs"] == len(right)
    assert metrics["preference_accuracy"] == np.mean(right)
    assert 0 < metrics["preference_accuracy"] < 1
    for name in ("preference_accuracy", "length_only_accuracy"):
        low, high = metrics[f"{name}_ci95"]
        assert 0 <= low < metrics[name] < high <= 1
    json.dumps(metrics, allow_nan=False)


def test_a_model_that_writes_a_word_more_often_prefers_the_responses_that_have_it(random_model, tokenizer):
    tuned = random_model("gpt_neox")
    head = tuned.get_output_embeddings()
    word = tokenizer(" good")["input_ids"]
    head.bias = nn.Parameter(5.0 * torch.isin(torch.arange(head.weight.shape[0]), torch.tensor(word)))
    rows = [("the film is", " good", " bad"), ("the plot is", " good", " sad"), ("the end is", " lame", " good")]
    metrics = preference_accuracy(tuned, random_model("gpt_neox"), tokenizer, table(rows), LIMIT)
    assert metrics["preference_accuracy"] == pytest.approx(2 / 3)


def test_a_model_that_was_not_changed_is_right_half_the_time(random_model, tokenizer, pairs):
    metrics = preference_accuracy(random_model("gpt2"), random_model("gpt2"), tokenizer, pairs, LIMIT)
    assert metrics["preference_accuracy"] == 0.5
    assert metrics["preference_accuracy_ci95"] == [0.5, 0.5]


def test_ties_count_half():
    assert half_for_ties(np.array([-0.1, 0.0, 2.0])).tolist() == [0.0, 0.5, 1.0]


def test_pairs_that_are_trained_on_do_not_count(random_model, disturbed, tokenizer, pairs):
    models = disturbed("gpt2"), random_model("gpt2")
    swapped = pairs.assign(
        chosen=pairs.chosen.where(pairs.held_out, pairs.rejected), rejected=pairs.rejected.where(pairs.held_out, pairs.chosen)
    )
    one, other = (preference_accuracy(*models, tokenizer, rows, LIMIT) for rows in (pairs, swapped))
    assert one["preference_accuracy"] == other["preference_accuracy"]
    assert one["preference_pairs"] == other["preference_pairs"]


LONGER, SHORTER, ALIKE = ("the", " film is good", " plot"), ("the", " plot", " film is good"), ("the", " plot", " plot")


@pytest.mark.parametrize(
    ("train", "accuracy"),
    [
        ([LONGER, LONGER, SHORTER], 0.625),
        ([SHORTER, SHORTER, LONGER], 0.375),
        ([SHORTER, LONGER], 0.625),
        ([ALIKE, SHORTER], 0.375),
        ([], 0.625),
    ],
)
def test_the_rule_of_length_is_the_one_that_holds_more_often_on_the_training_pairs(random_model, tokenizer, train, accuracy):
    held_out = [LONGER, LONGER, SHORTER, ALIKE]
    rows = pd.concat([table(held_out), table(train, held_out=False)])
    metrics = preference_accuracy(random_model("gpt2"), random_model("gpt2"), tokenizer, rows, LIMIT)
    assert metrics["length_only_accuracy"] == accuracy


def test_pairs_whose_prompt_fills_the_context_are_left_out(random_model, disturbed, tokenizer):
    models = disturbed("gpt2"), random_model("gpt2")
    short = table([("the film is", " good", " bad"), ("a plot", " that", " of one")])
    full = table([("q" * LIMIT, " good", " bad"), ("q" * (LIMIT + 1), " good", " bad")])
    both = preference_accuracy(*models, tokenizer, pd.concat([short, full]), LIMIT)
    assert both == preference_accuracy(*models, tokenizer, short, LIMIT)
    assert both["preference_pairs"] == 2
    assert preference_accuracy(*models, tokenizer, full, LIMIT) == {"preference_pairs": 0}


def test_a_prompt_that_leaves_room_for_one_token_is_judged_by_it(random_model, disturbed, tokenizer):
    models = disturbed("gpt2"), random_model("gpt2")
    rows = table([("q" * (LIMIT - 1), " good", " bad")])
    [((ids, start), (other_ids, _))] = encoded(rows, tokenizer, LIMIT)
    assert (len(ids), start) == (LIMIT, LIMIT - 1)
    right = slow_reward(*models, ids, start) > slow_reward(*models, other_ids, start)
    assert preference_accuracy(*models, tokenizer, rows, LIMIT)["preference_accuracy"] == right
