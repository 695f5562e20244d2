"""The reward of a sequence-classification model: the logit or the probability of one of its labels."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlsae.config import ClassifierReward
from rlsae.errors import RlsaeError
from rlsae.models import load_classifier, save
from rlsae.rewards import load_reward

FAMILIES = ["bert", "gpt_neox", "gpt2"]
LABELS = ["negative", "neutral", "positive"]
TEXTS = ["the film is good .", "a plot", "i adored the superb acting , and the music is lovely and warm too .", "no"]
CONTEXT = 64


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


@pytest.fixture
def folder(tokenizer, tmp_path):
    """Function of a family: folder of a random classifier with its tokenizer."""

    def write(family="gpt_neox", labels=LABELS, padding_side="right", pad=None):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
        sizes |= {} if family == "gpt2" else {"intermediate_size": 48}
        named = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
        tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **sizes, **named, **tokens, initializer_range=0.3)
        its_tokenizer = copy.deepcopy(tokenizer)
        its_tokenizer.pad_token = pad
        place = tmp_path / f"{family}-{padding_side}"
        save(AutoModelForSequenceClassification.from_config(config), its_tokenizer, place)
        settings = place / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": padding_side}))
        return place

    return write


def reward(folder, **changes):
    return load_reward(ClassifierReward(**{"kind": "classifier", "path": str(folder), "label": "positive"} | changes), folder)


@torch.no_grad()
def logits_alone(folder, texts):
    """Logits of each text alone, without padding."""
    model, tokenizer = load_classifier(folder, "main", "cpu")
    return torch.stack([model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts])


def scores(rewarded, texts=TEXTS):
    return rewarded([""] * len(texts), texts)


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reward_is_the_logit_of_the_label_of_each_text_alone(folder, family):
    place = folder(family)
    found = scores(reward(place))
    assert found == pytest.approx(logits_alone(place, TEXTS)[:, 2].tolist(), abs=1e-4)
    assert len({round(score, 3) for score in found}) == len(TEXTS)
    assert all(type(score) is float for score in found)


def test_the_reward_is_the_probability_of_the_label_where_that_is_asked_for(folder):
    place = folder()
    by_label = [scores(reward(place, label=label, output="probability")) for label in LABELS]
    assert torch.tensor(by_label).T.flatten().tolist() == pytest.approx(
        logits_alone(place, TEXTS).softmax(-1).flatten().tolist(), abs=1e-5
    )


@pytest.mark.parametrize(("number", "name"), enumerate(LABELS))
def test_a_label_may_be_named_or_numbered(folder, number, name):
    place = folder()
    assert scores(reward(place, label=name)) == scores(reward(place, label=str(number)))


def test_a_name_that_looks_like_a_number_is_a_name(folder):
    place = folder(labels=["1", "2", "3"])
    for column, name in enumerate(["1", "2", "3"]):
        found = scores(reward(place, label=name))
        assert found == pytest.approx(logits_alone(place, TEXTS)[:, column].tolist(), abs=1e-4)


@pytest.mark.parametrize("label", ["joy", "Positive", "3", "-1", ""])
def test_a_label_that_the_model_lacks_is_refused_with_those_it_has(folder, label):
    expected = rf"rewards\.\*\.label: .*gpt_neox-right has no label '{label}'; it has: negative, neutral, positive"
    with pytest.raises(RlsaeError, match=expected):
        reward(folder(), label=label)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("pad", [None, "Z"], ids=["pads-with-the-end", "pads-with-another-token"])
def test_scores_do_not_depend_on_the_texts_beside_them(folder, family, padding_side, pad):
    place = folder(family, padding_side=padding_side, pad=pad)
    alone = scores(reward(place, batch_size=1))
    for batch_size in (2, 3, 64):
        assert scores(reward(place, batch_size=batch_size)) == pytest.approx(alone, abs=1e-4)
    assert scores(reward(place), TEXTS[::-1]) == pytest.approx(alone[::-1], abs=1e-4)


def test_the_whole_text_is_scored_unless_the_response_alone_is_asked_for(folder):
    place = folder()
    prompts, responses = ["the film", "a plot"], [" is good", " that i liked"]
    full, default = (reward(place, **scope)(prompts, responses) for scope in ({"scope": "full"}, {}))
    assert full == default == pytest.approx(scores(reward(place), ["the film is good", "a plot that i liked"]), abs=1e-4)
    assert reward(place, scope="response")(prompts, responses) == pytest.approx(scores(reward(place), responses), abs=1e-4)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_the_output_is_scaled(folder, output):
    place = folder()
    plain, scaled = scores(reward(place, output=output)), scores(reward(place, output=output, scale=-2.5))
    assert scaled == pytest.approx([-2.5 * score for score in plain])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_same_every_time(folder, family):
    rewarded = reward(folder(family))
    assert scores(rewarded) == scores(rewarded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_longer_than_the_context_of_the_classifier_is_cut(folder, family):
    rewarded = reward(folder(family))
    long = "the film is good and " * 40
    assert scores(rewarded, [long]) == pytest.approx(scores(rewarded, [long + long]), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_an_empty_response_has_a_score_that_does_not_depend_on_the_texts_beside_it(folder, family):
    rewarded = reward(folder(family), scope="response")
    alone, among = scores(rewarded, [""]), scores(rewarded, [*TEXTS, ""])
    assert among[-1] == pytest.approx(alone[0], abs=1e-4)
    assert among[:-1] == pytest.approx(scores(rewarded), abs=1e-4)


def test_no_texts_have_no_scores(folder):
    assert reward(folder())([], []) == []


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_language_model_without_a_head_for_labels_is_refused(random_model, tokenizer, tmp_path):
    save(random_model("gpt_neox"), tokenizer, tmp_path / "lm")
    with pytest.raises(RlsaeError, match=r"lm: the weights lack .*score\.weight.*; this is not the model of its config"):
        reward(tmp_path / "lm", label="LABEL_1")


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "nothing"}', '{"model_type": "clip"}'])
def test_a_folder_that_is_no_classifier_is_named(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RlsaeError, match=re.escape(str(tmp_path))):
        reward(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    place = folder()
    for path in place.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(RlsaeError, match="tokenizer"):
        reward(place)


def test_a_repository_that_cannot_be_reached_is_named_with_how_to_download_it_first():
    entry = ClassifierReward(kind="classifier", repository="nobody/no-such-classifier", revision="v1", label="positive")
    with pytest.raises(RlsaeError, match="the model nobody/no-such-classifier at revision v1 from the hub") as caught:
        load_reward(entry)
    assert "rlsae prefetch CONFIG" in str(caught.value)


def test_weights_that_are_no_numbers_are_found_in_the_first_score_and_named_with_its_sample(folder):
    place = folder()
    path = place / "model.safetensors"
    weights = load_file(path)
    save_file({n: t * float("nan") if "score" in n else t for n, t in weights.items()}, path, metadata={"format": "pt"})
    expected = r"the reward .*gpt_neox-right returned nan for prompt 'the film', response ' is good'"
    with pytest.raises(RlsaeError, match=expected):
        reward(place)(["the film"], [" is good"])
