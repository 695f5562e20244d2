"""DPO, RLOO and GRPO by TRL's trainers: what they learn, and from what."""

from __future__ import annotations

import copy
import json
import math
import shutil
from functools import cache
from itertools import count

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import write_policy
from small_trl import LORA, METHODS, SAMPLING, entry, whole_or_lora
from small_tunings import FAMILY, equal, letters

from rlsae.corpora import DOCUMENTS, PAIRS
from rlsae.errors import RlsaeError
from rlsae.models import load
from rlsae.preferences import shared_start
from rlsae.resumable import Stage
from rlsae.tuning.trl_trainers import positions_from_mask, tune
from tests.conftest import FAMILIES


def distance(one, other):
    weights = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return torch.cat([(a - b).flatten() for a, b in weights]).norm().item()


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        yield


@pytest.fixture(scope="module")
def base(random_model, tokenizer, tmp_path_factory):
    """Function of a family and a padding token: folder of a base model's artifact."""
    models = tmp_path_factory.mktemp("results") / "models"

    @cache
    def write(family=FAMILY, pad=None):
        its_tokenizer = copy.deepcopy(tokenizer)
        its_tokenizer.pad_token = pad
        folder = models / f"{family}-{len(list(models.glob('*')))}"
        return write_policy(folder, random_model(family), its_tokenizer)

    return write


@pytest.fixture
def run(base, corpus, pairs, tmp_path):
    """Function of a method and settings: tuned model and history."""
    numbers = count()

    def tuned(method, family=FAMILY, pad=None, reward=letters, told=None, documents=corpus, folder=None, **changes):
        folder = folder or base(family, pad) / "model"
        with Stage("policies", tmp_path / f"run-{next(numbers)}", {}, {}) as stage:
            source = pairs if method == "dpo" else documents
            made = tune(folder, load(folder)[1], source, reward, entry(method, **changes), stage)
            if told is not None:
                told |= stage.details
        return made

    return tuned


# --- what is learned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["dpo", "rloo"])
def test_models_of_every_family_are_tuned(run, random_model, method, family):
    lm, history = run(method, family)
    assert type(lm) is type(random_model(family))
    assert not equal(lm, random_model(family))
    assert all(tensor.isfinite().all() for tensor in lm.state_dict().values())
    assert history.notna().all(axis=None)


@pytest.mark.parametrize(("family", "changes"), [(FAMILY, {}), (FAMILY, LORA), ("gpt2", {})], ids=["whole", "lora", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_learning_rate_of_zero_leaves_every_bit_of_the_model(run, random_model, method, family, changes):
    lm, history = run(method, family, learning_rate=0.0, **changes)
    assert equal(lm, random_model(family))
    if method == "dpo":
        assert history.margin.tolist() == [0.0] * 3
        assert history.loss.tolist() == pytest.approx([math.log(2)] * 3)
    else:
        assert history.kl.tolist() == [0.0] * 3
        assert history.clip_fraction.tolist() == [0.0] * 3


@pytest.mark.parametrize("method", SAMPLING)
def test_sampling_methods_raise_an_easy_reward(run, method):
    sizes = {"batches": 12, "batch_size": 32, "minibatch_size": 16, "warmup_batches": 1}
    _, history = run(method, **sizes, learning_rate=5e-3, kl_coefficient=0.001)
    assert history.reward[-4:].mean() > history.reward[:4].mean() + 0.05


def test_dpo_comes_to_prefer_the_chosen_responses_of_its_pairs(run):
    _, history = run("dpo", batches=18, batch_size=15, learning_rate=3e-3, warmup_batches=1)
    assert history.loss[0] == pytest.approx(math.log(2))
    assert history.loss[-3:].mean() < 0.5
    assert history.preference_accuracy[-3:].mean() > 0.9
    assert history.margin[-3:].mean() > history.margin[:3].mean()


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_models_and_other_seeds_others(run, method):
    (first, _), (again, _), (other, _) = run(method), run(method), run(method, seed=1)
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_parts_is_the_same_step(run, random_model, method):
    changes = {"batches": 2, "warmup_batches": 0, "learning_rate": 1e-4}
    (whole, _), (parts, history) = run(method, **changes), run(method, gradient_accumulation=4, **changes)
    assert distance(whole, parts) < 0.02 * distance(whole, random_model(FAMILY))
    assert len(history) == 2


@pytest.mark.parametrize(("method", "changes"), [("dpo", {}), ("rloo", {}), ("grpo", LORA)])
def test_a_tuning_in_bfloat16_gives_weights_in_float32_near_those_of_float32(run, random_model, method, changes):
    (exact, _), (rough, history) = run(method, **changes), run(method, precision="bfloat16", **changes)
    assert {tensor.dtype for tensor in rough.state_dict().values()} == {torch.float32}
    assert 0 < distance(rough, exact) < 0.5 * distance(exact, random_model(FAMILY))
    assert history.notna().all(axis=None)


# --- padding and positions ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_row_padded_on_the_left_has_the_logits_of_the_row_itself(model):
    ids, padding = [5, 70, 9, 11, 41], 3
    plain = model(input_ids=torch.tensor([ids])).logits[0]
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    handle = model.register_forward_pre_hook(positions_from_mask, with_kwargs=True)
    padded = model(input_ids=torch.tensor([[7] * padding + ids]), attention_mask=mask).logits[0, padding:]
    handle.remove()
    assert torch.allclose(padded, plain, atol=1e-4)


def test_positions_that_are_given_or_cannot_be_told_are_left_alone():
    def positions(**named):
        return positions_from_mask(None, (), named)[1].get("position_ids")

    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 1]])
    given = torch.tensor([[9, 8, 7], [6, 5, 4]])
    assert positions(input_ids=ids, attention_mask=mask).tolist() == [[0, 0, 1], [0, 1, 2]]
    assert positions(input_ids=ids, attention_mask=mask, position_ids=given) is given
    assert positions(input_ids=ids[:, -1:], attention_mask=mask) is None
    assert positions(input_ids=ids) is None


@whole_or_lora
@pytest.mark.parametrize("method", SAMPLING)
def test_every_forward_pass_numbers_the_real_tokens_of_each_row_from_zero(run, random_model, monkeypatch, method, changes):
    trunk = type(random_model("gpt2").transformer)
    forward, padded = trunk.forward, []

    def watched(self, input_ids=None, attention_mask=None, position_ids=None, **named):
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            padded.append(bool((attention_mask[:, 0] == 0).any()))
            expected = (attention_mask.cumsum(1) - 1) * attention_mask
            assert torch.equal(position_ids * attention_mask, expected)
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **named)

    monkeypatch.setattr(trunk, "forward", watched)
    run(method, "gpt2", **changes)
    assert any(padded)


@pytest.mark.parametrize(("method", "family"), [("dpo", FAMILY), ("rloo", FAMILY), ("rloo", "gpt2"), ("grpo", "gpt2")])
def test_what_rows_are_padded_with_changes_no_bit_of_the_model(run, method, family):
    never_written = "Z"
    one, other = (
        run(method, family, pad, reward=lambda prompts, texts: [text.count("e") for text in texts])[0]
        for pad in ("<|endoftext|>", never_written)
    )
    assert equal(one, other)


# --- prompts and pairs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SAMPLING)
def test_prompts_are_beginnings_of_training_documents_each_answered_by_a_group(run, corpus, method):
    seen = []
    run(method, reward=lambda prompts, texts: seen.append(prompts) or letters(prompts, texts), group_size=2)
    documents = pd.read_parquet(corpus / DOCUMENTS)
    training = documents.text[~documents.held_out].tolist()
    assert [len(prompts) for prompts in seen] == [8] * 3
    assert all(any(text.startswith(prompt) for text in training) for prompts in seen for prompt in prompts)
    assert all(prompts[::2] == prompts[1::2] for prompts in seen)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize(
    "setting", [{"no_repeat_ngram_size": 1}, {"eos_token_id": [0, *range(50, 200)]}], ids=["repeats", "ends"]
)
def test_settings_of_generation_that_the_base_publishes_do_not_shape_the_samples(run, base, tmp_path, setting):
    folder = shutil.copytree(base() / "model", tmp_path / "model")
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(content | setting))
    assert equal(run("rloo")[0], run("rloo", folder=folder)[0])


def test_prompts_that_end_within_a_character_fit_the_context_as_they_were_cut(run, tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(chr(0x4E00 + number) for number in row) for row in rng.integers(0, 2000, (40, 40))]
    pd.DataFrame({"text": texts, "held_out": False}).to_parquet(tmp_path / DOCUMENTS)
    lm, _ = run("rloo", "gpt2", documents=tmp_path, query_tokens=(58, 58), response_tokens=(6, 6))
    assert all(tensor.isfinite().all() for tensor in lm.state_dict().values())


def test_dpo_trains_on_the_pairs_that_are_not_held_out_and_whose_prompt_leaves_room(run, pairs, tokenizer):
    table = pd.read_parquet(pairs / PAIRS)
    table = table[~table.held_out]
    texts = (table.prompt, table.prompt + table.chosen, table.prompt + table.rejected)
    ids = [[tokenizer(text)["input_ids"] for text in column] for column in texts]
    lengths = [shared_start(*three) for three in zip(*ids, strict=True)]
    longest = sorted(lengths)[20]
    for changes, count_of_pairs in (({}, 45), ({"max_tokens": longest}, sum(length < longest for length in lengths))):
        told = {}
        run("dpo", told=told, **changes)
        assert told["pairs_trained_on"] == count_of_pairs >= 8


def test_fewer_pairs_than_a_step_takes_are_refused_with_both_numbers(run):
    with pytest.raises(RlsaeError, match="batch_size: 46 pairs per step are asked for, the corpus trains on 45"):
        run("dpo", batch_size=46)


@pytest.mark.parametrize("longest", [1, 3])
def test_prompts_that_all_fill_the_longest_text_are_refused(run, longest):
    with pytest.raises(RlsaeError, match=f"max_tokens: only 0 of 45 training prompts are shorter than {longest} tokens"):
        run("dpo", max_tokens=longest)


def test_texts_longer_than_the_context_are_refused_with_both_numbers(run):
    with pytest.raises(RlsaeError, match="max_tokens: 65 tokens are asked for, the model's context holds 64"):
        run("dpo", max_tokens=65)
