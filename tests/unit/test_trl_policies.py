"""Policies of TRL's trainers: what is published, and how a tuning survives a kill."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import cache
from itertools import pairwise

import pandas as pd
import pytest
from small_artifacts import Payload, write_policy
from small_trl import LORA, METHODS, SAMPLING, entry, whole_or_lora
from small_tunings import FAMILY, equal

from rlsae.artifacts import MANIFEST, Manifest
from rlsae.config import PythonReward
from rlsae.errors import RlsaeError
from rlsae.models import load
from rlsae.tuning import stage as policies
from rlsae.tuning.history import History
from rlsae.tuning.stage import build_policy
from rlsae.tuning.trl_trainers import COMPLETE, Bookkeeping, last_checkpoint

REWARD = "def reward(prompts, responses):\n    return [text.count('e') for text in responses]\n"


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        yield


@pytest.fixture(scope="module")
def base(random_model, tokenizer, tmp_path_factory):
    """Folder of a base model's artifact."""
    return write_policy(tmp_path_factory.mktemp("results") / "models" / FAMILY, random_model(FAMILY), tokenizer)


@pytest.fixture(scope="module")
def publish(base, corpus, pairs, tmp_path_factory):
    """Function of a folder, a method and settings: publish a tuning there."""
    path = tmp_path_factory.mktemp("rewards") / "reward.py"

    def build(out, method, source=REWARD, **changes):
        path.write_text(source)
        settings = entry(method, **changes)
        reward = PythonReward(kind="python", path=str(path))
        told = {"tuning": settings.settings(), "reward": reward.settings()}
        build_policy(settings, reward, told, out, None, base, pairs if method == "dpo" else corpus, path, None)
        return out

    return build


# --- what is published -------------------------------------------------------------------------------------------

SETTINGS = {method: {"batches": 8 if method == "dpo" else 5, "checkpoints": 2} for method in METHODS}
STEPS = {"dpo": [3, 5], "rloo": [2, 3], "grpo": [2, 3]}
OF_SAMPLES = {"reward", "kl", "response_length", "clip_fraction"}
COLUMNS = {"dpo": {"preference_accuracy", "margin"}, "rloo": OF_SAMPLES, "grpo": OF_SAMPLES}


@pytest.fixture(scope="module")
def published(publish, tmp_path_factory):
    """Function of a method and adapters: a tuning published without an interruption, from an empty folder."""
    results, elsewhere = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("elsewhere")

    @cache
    def build(method, lora):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(elsewhere)
            patch.setattr("datasets.config.HF_DATASETS_CACHE", elsewhere / "cache")
            return publish(results / f"{method}-{lora}" / "tuned", method, **SETTINGS[method], **(LORA if lora else {}))

    build.elsewhere = elsewhere
    return build


@whole_or_lora
@pytest.mark.parametrize("method", METHODS)
def test_a_tuning_is_published_with_its_checkpoints_history_samples_and_evaluation(published, base, method, changes):
    out, steps = published(method, bool(changes)), STEPS[method]
    manifest = Manifest.read(out)
    assert set(manifest.outputs) == {"model", "checkpoints", "history.parquet", "samples.parquet"}
    assert manifest.metrics["checkpoints"] == sorted(int(path.name) for path in (out / "checkpoints").iterdir()) == steps
    history = pd.read_parquet(out / "history.parquet")
    assert history.batch.tolist() == list(range(SETTINGS[method]["batches"]))
    assert set(history) == {"batch", "entropy", "loss", "learning_rate"} | COLUMNS[method]
    assert len(pd.read_parquet(out / "samples.parquet")) == manifest.metrics["evaluation_prompts"] == 8
    folders = [base / "model", *(out / "checkpoints" / str(step) for step in steps), out / "model"]
    assert not any(equal(one, other) for one, other in pairwise(load(folder)[0] for folder in folders))
    assert len(json.loads((out / "provenance.json").read_text())["samples_per_second"]) == len(history)


@whole_or_lora
@pytest.mark.parametrize("method", METHODS)
def test_only_the_weights_of_a_published_model_differ_from_its_base(published, base, method, changes):
    out, base_folder = published(method, bool(changes)), base / "model"
    _, base_tokenizer = load(base_folder)
    for folder in (out / "model", *(out / "checkpoints").iterdir()):
        assert {path.name for path in folder.iterdir()} == {path.name for path in base_folder.iterdir()}
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (folder / name).read_text() == (base_folder / name).read_text()
        _, its_tokenizer = load(folder)
        assert its_tokenizer.special_tokens_map == base_tokenizer.special_tokens_map
        assert its_tokenizer.padding_side == base_tokenizer.padding_side


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_written_outside_the_folder_of_the_tuning(published, method):
    out = published(method, False)
    assert list(published.elsewhere.iterdir()) == []
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("method", METHODS)
def test_a_tuning_that_learned_nothing_gains_nothing_and_costs_nothing(publish, tmp_path, method):
    metrics = Manifest.read(publish(tmp_path / "tuned", method, learning_rate=0.0)).metrics
    assert metrics["kl"] == 0.0
    assert metrics["reward_gain"] == 0.0
    assert metrics["reward_gain_ci95"][0] <= 0.0 <= metrics["reward_gain_ci95"][1]
    assert metrics.get("preference_accuracy", 0.5) == 0.5
    assert ("preference_accuracy" in metrics) == (method == "dpo")


@pytest.mark.parametrize("method", SAMPLING)
def test_a_reward_that_is_no_number_stops_the_tuning_and_is_named_with_its_sample(publish, tmp_path, method):
    source = "def reward(prompts, responses):\n    return [float('nan')] * len(responses)\n"
    with pytest.raises(RlsaeError, match=r"reward\.py:reward returned nan for prompt '.+', response '"):
        publish(tmp_path / "tuned", method, source)


# --- a kill ------------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(publish, monkeypatch):
    """Function of a function's owner and name and a condition: publish, and be killed in a call where it holds."""
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")

    def build(owner, function, condition, *arguments, **changes):
        original = getattr(owner, function)

        def kill(*given, **named):
            if condition(*given):
                raise KeyboardInterrupt
            return original(*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, kill)
            with pytest.raises(KeyboardInterrupt):
                publish(*arguments, **changes)

    return build


def same_artifact(one, other):
    return (one / MANIFEST).read_bytes() == (other / MANIFEST).read_bytes()


def batches_of_earlier_runs(out):
    return json.loads((out / "provenance.json").read_text())["samples_per_second"].count(None)


@whole_or_lora
@pytest.mark.parametrize(("method", "batch"), [("dpo", 6), ("dpo", 7), ("rloo", 3), ("grpo", 3)])
def test_a_tuning_that_was_killed_goes_on_and_ends_with_the_same_bits(
    publish, published, killed, tmp_path, method, batch, changes
):
    told = tmp_path / "tuned", method
    killed(History, "add", lambda history, row: len(history.rows) == batch, *told, **SETTINGS[method], **changes)
    resumed = publish(*told, **SETTINGS[method], **changes)
    assert batches_of_earlier_runs(resumed) == batch
    assert same_artifact(published(method, bool(changes)), resumed)


@pytest.mark.parametrize("method", METHODS)
def test_a_tuning_that_was_killed_in_its_evaluation_is_not_tuned_further(publish, published, killed, tmp_path, method):
    killed(policies, "evaluate", lambda *_: True, tmp_path / "tuned", method, **SETTINGS[method])
    resumed = publish(tmp_path / "tuned", method, **SETTINGS[method])
    assert len(pd.read_parquet(resumed / "history.parquet")) == SETTINGS[method]["batches"]
    assert same_artifact(published(method, False), resumed)


@pytest.mark.parametrize("saved", [0, 3])
def test_a_state_whose_writing_was_killed_is_deleted_and_not_used(publish, published, killed, tmp_path, saved):
    told = tmp_path / "tuned", "dpo"
    killed(Bookkeeping, "on_save", lambda kept, a, state, *_: state.global_step == saved + 1, *told, **SETTINGS["dpo"])
    half = tmp_path / ".tuned.work" / "trainer" / f"checkpoint-{saved + 1}" / "model.safetensors"
    half.write_bytes(half.read_bytes()[:100])
    resumed = publish(*told, **SETTINGS["dpo"])
    assert batches_of_earlier_runs(resumed) == saved
    assert same_artifact(published("dpo", False), resumed)


def test_the_newest_state_that_was_written_to_its_end_is_the_one_to_go_on_from(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()


DAMAGE = {"cut": lambda path, _: path.read_bytes()[:-100], "pickle": lambda _, marker: pickle.dumps(Payload(marker))}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"])
def test_a_damaged_state_is_named_and_without_it_the_one_before_goes_on(publish, published, killed, tmp_path, name, damage):
    told = tmp_path / "tuned", "dpo"
    killed(History, "add", lambda history, row: len(history.rows) == 4, *told, **SETTINGS["dpo"])
    state = tmp_path / ".tuned.work" / "trainer" / "checkpoint-4"
    (state / name).write_bytes(DAMAGE[damage](state / name, tmp_path / "executed"))
    with pytest.raises(RlsaeError, match=rf"the partial state .*{name} is damaged .*; delete .*checkpoint-4 to go on"):
        publish(*told, **SETTINGS["dpo"])
    assert not (tmp_path / "executed").exists()
    shutil.rmtree(state)
    resumed = publish(*told, **SETTINGS["dpo"])
    assert batches_of_earlier_runs(resumed) == 3
    assert same_artifact(published("dpo", False), resumed)
