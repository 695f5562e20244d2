"""A tuned model from elsewhere: it is evaluated and published as it is, or refused where it is no tuning of the base."""

from __future__ import annotations

import copy
import json
import shutil

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsae.artifacts import MANIFEST, Manifest
from rlsae.config import ExternalTuning, GeneratedCorpus, PythonReward
from rlsae.corpora import build_corpus
from rlsae.errors import RlsaeError
from rlsae.models import load, save
from rlsae.tuning.stage import build_policy

REWARD = "def reward(prompts, responses):\n    return [text.count('e') for text in responses]\n"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


@pytest.fixture
def base(random_model, tokenizer, tmp_path):
    """Function of a family: folder of a base model's artifact."""

    def write(family="gpt_neox"):
        folder = tmp_path / "results" / "models" / family
        if not folder.exists():
            save(random_model(family), tokenizer, folder / "model")
            (folder / MANIFEST).write_text(Manifest("models", {}, {}, {}, {}).to_json())
        return folder

    return write


@pytest.fixture
def tuned(random_model, tokenizer, tmp_path):
    """Function of changed settings of the model: folder of a random model of the same family, else like the base."""

    def write(family="gpt_neox", name="tuned", its_tokenizer=tokenizer, dtype=torch.float32, **changes):
        config = copy.deepcopy(random_model(family).config)
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(1)
        save(AutoModelForCausalLM.from_config(config).to(dtype), its_tokenizer, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def publish(base, corpus, tmp_path):
    """Function of a tuned model's folder: folder of the artifact."""
    path = tmp_path / "reward.py"
    path.write_text(REWARD)

    def build(folder, name="a", family="gpt_neox", repository=None, prompts=corpus):
        out = tmp_path / name / "policies" / "tiny.external"
        source = {"repository": repository} if repository else {"path": str(folder)}
        shared = {"reward": "letters", "corpus": "reviews", "evaluation_prompts": 12}
        lengths = {"query_tokens": (2, 4), "response_tokens": (3, 6)}
        entry = ExternalTuning(method="external", **shared, **lengths, **source)
        reward = PythonReward(kind="python", path=str(path))
        told = {"tuning": entry.settings(), "reward": reward.settings()}
        build_policy(entry, reward, told, out, None, base(family), prompts, path, folder)
        return out

    return build


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# --- what is published -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"], ids=["untied", "tied"])
def test_a_folder_is_published_bit_for_bit(publish, tuned, family):
    folder = tuned(family)
    out = publish(folder, family=family)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / "model" / name).read_bytes() == (folder / name).read_bytes()


def test_weights_of_another_number_format_are_published_as_equal_numbers(publish, tuned):
    folder = tuned(dtype=torch.bfloat16)
    published, _ = load(publish(folder) / "model")
    assert {tensor.dtype for tensor in published.state_dict().values()} == {torch.float32}
    assert equal(published, load(folder)[0])


def test_a_model_from_elsewhere_is_evaluated_like_any_other(publish, tuned, base):
    out = publish(tuned())
    manifest = Manifest.read(out)
    assert set(manifest.outputs) == {"model", "checkpoints", "history.parquet", "samples.parquet"}
    assert set(manifest.inputs) == {"models/gpt_neox", "corpora/reviews", "file:reward", "file:tuned"}
    assert manifest.metrics["kl"] > 0
    assert manifest.metrics["evaluation_prompts"] == 12
    samples = pd.read_parquet(out / "samples.parquet")
    assert len(samples) == 12
    for role in ("base", "tuned"):
        assert samples[f"reward_{role}"].tolist() == [text.count("e") for text in samples[f"response_{role}"]]
    gain = samples.reward_tuned.mean() - samples.reward_base.mean()
    assert manifest.metrics["reward_gain"] == pytest.approx(gain)


def test_it_has_no_checkpoints_and_an_empty_history(publish, tuned):
    out = publish(tuned())
    assert Manifest.read(out).metrics["checkpoints"] == []
    assert list((out / "checkpoints").iterdir()) == []
    history = pd.read_parquet(out / "history.parquet")
    assert (list(history), len(history), str(history.batch.dtype)) == (["batch"], 0, "int64")


def test_a_copy_of_the_base_gains_nothing_and_costs_nothing(publish, base):
    metrics = Manifest.read(publish(base() / "model")).metrics
    assert metrics["kl"] == 0.0
    assert metrics["reward_gain_ci95"] == [0.0, 0.0]


def test_on_prompts_of_pairs_its_preferences_are_measured_too(publish, tuned, tmp_path):
    made = GeneratedCorpus(source="generated", kind="preferences", documents=60, held_out=0.25)
    pairs = tmp_path / "results" / "corpora" / "pairs"
    build_corpus(made, made.settings(), pairs, None, None)
    metrics = Manifest.read(publish(tuned(), prompts=pairs)).metrics
    assert metrics["preference_pairs"] == 15
    assert 0 <= metrics["preference_accuracy"] <= 1


def test_a_copy_of_the_folder_elsewhere_gives_the_same_artifact(publish, tuned, tmp_path):
    folder = tuned()
    shutil.copytree(folder, tmp_path / "elsewhere" / "tuned")
    one, other = (publish(source, name) for source, name in ((folder, "a"), (tmp_path / "elsewhere" / "tuned", "b")))
    ours, theirs = Manifest.read(one), Manifest.read(other)
    assert (ours.outputs, ours.inputs, ours.metrics) == (theirs.outputs, theirs.inputs, theirs.metrics)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_another_architecture_is_refused_with_both_names(publish, tuned):
    expected = r"tuned is no tuning of the base: architecture LlamaForCausalLM, the base has GPTNeoXForCausalLM"
    with pytest.raises(RlsaeError, match=expected):
        publish(tuned("llama"))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_hidden_layers": 3}, "layers 3, the base has 2"),
        ({"hidden_size": 16}, "width 16, the base has 32"),
        ({"vocab_size": 328}, "vocabulary 328, the base has 320"),
    ],
)
def test_a_model_of_another_size_is_refused_with_both_numbers(publish, tuned, changes, difference):
    with pytest.raises(RlsaeError, match=f"tuned is no tuning of the base: {difference}"):
        publish(tuned(**changes))


def test_a_shorter_context_is_refused_with_both_numbers(publish, tuned):
    with pytest.raises(RlsaeError, match="tuned is no tuning of the base: context 8, the base has 64"):
        publish(tuned("gpt2", n_positions=8), family="gpt2")


def test_another_tokenizer_is_refused_with_tokens_that_differ(publish, tuned, tokenizer, tmp_path):
    folder = tuned()
    content = json.loads((folder / "tokenizer.json").read_text())
    numbers = content["model"]["vocab"]
    numbers["A"], numbers["B"] = numbers["B"], numbers["A"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RlsaeError, match=r"tuned: its tokenizer differs from the base's in 2 tokens \('A', 'B'"):
        publish(folder)


def test_a_tokenizer_with_a_token_more_is_refused(publish, tuned, tokenizer):
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<turn>"])
    with pytest.raises(RlsaeError, match=r"tuned: its tokenizer differs from the base's in 1 tokens \('<turn>'"):
        publish(tuned(its_tokenizer=longer))


def test_a_folder_that_holds_no_model_is_named(publish, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RlsaeError, match=r"empty is no transformers model: it has no config\.json"):
        publish(tmp_path / "empty")


def test_a_repository_that_cannot_be_reached_is_named_with_how_to_download_it_first(publish):
    with pytest.raises(RlsaeError, match="cannot load the model nobody/no-such-model at revision main from the hub") as caught:
        publish(None, repository="nobody/no-such-model")
    assert "rlsae prefetch CONFIG" in str(caught.value)


def test_nothing_is_published_of_a_model_that_is_refused(publish, tuned, tmp_path):
    with pytest.raises(RlsaeError):
        publish(tuned(num_hidden_layers=3))
    assert not (tmp_path / "a" / "policies" / "tiny.external").exists()
