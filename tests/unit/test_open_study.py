"""A finished study opened from its results alone: what it holds, where a dictionary sits in a model, and what is missing."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import dump, finish, write_policy
from small_dictionaries import entry_of
from small_models import perturbed
from small_tunings import entry

import rlsae
from rlsae.activations.tokens import build_tokens
from rlsae.artifacts import MANIFEST, Manifest, input_digests
from rlsae.config import LexiconReward
from rlsae.errors import RlsaeError
from rlsae.models import save
from rlsae.sae.train import build_dictionaries

LAYER, LATENT, TEXT = 1, 3, "the film opens in an island with a wonderful letter ."
NAMES = ["small", "big"]
"""In the order of the study, which is not the alphabet's."""
TABLES = {
    "divergence": ["layers"],
    "comparison": ["latents", "levels"],
    "interpretation": ["latents", "examples"],
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def models(random_model):
    base = random_model("gpt_neox")
    return {"base": base, "tuned": perturbed(base, LAYER), "tuned@2": perturbed(base, LAYER, seed=2)}


@pytest.fixture(scope="module")
def results(tmp_path_factory, corpus, tokenizer, models):
    """Results of a study `demo` of the finished tuning and of one, `early`, of its checkpoint."""
    folder = tmp_path_factory.mktemp("first") / "results"
    reviews, base, tokens = folder / "corpora/reviews", folder / "models/tiny", folder / "tokens/tiny.reviews"
    shutil.copytree(corpus, reviews)
    write_policy(base, models["base"], tokenizer)
    build_tokens({"seed": 0, "context_length": 32, "drop_positions": 0}, tokens, None, base, reviews)
    tuned = folder / "policies/tiny.ppo"
    save(models["tuned"], tokenizer, tuned / "model")
    save(models["tuned@2"], tokenizer, tuned / "checkpoints/2")
    write_table(tuned, "history")
    reward = LexiconReward(kind="lexicon").settings()
    made_from = input_digests({"base": base, "corpus": reviews})
    finish(tuned, "policies", parameters={"tuning": entry().settings(), "reward": reward}, inputs=made_from)
    trained = {"tiny": train(folder, base, None), "tiny.ppo": train(folder, tuned, None), "tiny.ppo@2": train(folder, tuned, 2)}
    for study, policy in (("demo", "tiny.ppo"), ("early", "tiny.ppo@2")):
        for stage in TABLES:
            for name in TABLES[stage]:
                write_table(folder / stage / study, name)
        finish(folder / "divergence" / study, "divergence")
        made_from = input_digests({"tokens": tokens})
        finish(folder / "comparison" / study, "comparison", parameters={"dictionaries": NAMES}, inputs=made_from)
        used = [folder / "comparison" / study, reviews, base, tuned, *trained["tiny"], *trained[policy]]
        made_from = input_digests({str(number): artifact for number, artifact in enumerate(used)})
        finish(folder / "interpretation" / study, "interpretation", inputs=made_from | {"file:triples": "sha256:0"})
    return folder


def write_table(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"told_by": [f"{folder.parent.name}/{name}"]}).to_parquet(folder / f"{name}.parquet")


def train(results, policy, step):
    """The artifacts of a policy's activations and dictionaries."""
    name, tokens = policy.name + (f"@{step}" if step else ""), results / "tokens/tiny.reviews"
    store = results / f"activations/{name}.reviews/mlp/layers-{LAYER}"
    weights = policy / (f"checkpoints/{step}" if step else "model")
    settings = {"checkpoint": step, "layers": [LAYER], "rows": 2048, "rows_per_part": 2048, "dtype": "float32"}
    dump(store, policy, tokens, weights, **settings)
    made = [store]
    for dictionary, seeds in zip(NAMES, ([1, 2], [0]), strict=True):
        recipe = entry_of(seeds=seeds, epochs=1)
        made.append(results / f"dictionaries/{name}.reviews/mlp/layers-{LAYER}/layer{LAYER}/{dictionary}")
        build_dictionaries(recipe, recipe.settings(), LAYER, made[-1], None, store, weights, tokens, None, None)
    return made


@pytest.fixture
def study(results):
    return rlsae.open_study(results, "demo")


@pytest.fixture
def copied(results, tmp_path):
    """A copy elsewhere that may be damaged."""
    return shutil.copytree(results, tmp_path / "years" / "later")


# --- what is found -----------------------------------------------------------------------------------------------


def test_a_study_is_found_in_a_folder_that_was_moved(study, copied):
    moved = rlsae.open_study(str(copied), "demo")
    assert moved.policies == study.policies == {"base": "tiny", "tuned": "tiny.ppo"}
    assert moved.corpus == "reviews"
    assert moved.folders.keys() == study.folders.keys()
    assert all(folder.is_relative_to(copied) for folder in moved.folders.values())
    assert repr(moved) == "<study demo: tiny against tiny.ppo on reviews, layers 1, dictionaries small, big>"


def test_dictionaries_come_in_the_order_of_the_study(study):
    assert list(study.dictionaries) == [(role, LAYER, name) for role in ("base", "tuned") for name in NAMES]


def test_every_table_has_the_name_of_its_stage_and_file(study):
    named = {f"{stage}/{name}" for stage, names in TABLES.items() for name in names}
    assert set(study.tables) == named | {"policies/history", "dictionaries/metrics"}
    for name in named:
        assert study.tables[name].told_by.tolist() == [name]
    assert "comparison/latents" in repr(study.tables).splitlines()


def test_the_trainings_of_all_dictionaries_are_one_table(study):
    curves = study.tables["dictionaries/metrics"]
    assert set(zip(curves.role, curves.layer, curves.dictionary, curves.seed, strict=True)) == {
        (role, LAYER, name, seed) for role in ("base", "tuned") for name, seed in [("small", 1), ("small", 2), ("big", 0)]
    }


def test_a_table_that_is_not_there_is_refused_with_those_that_are(study):
    with pytest.raises(
        RlsaeError, match="no table 'latents'; the study has: comparison/latents, comparison/levels, divergence"
    ):
        study.tables["latents"]


def test_a_dataset_holds_the_rows_of_a_store_with_their_tokens(study):
    store, dataset = study.store("tuned"), study.dataset("tuned", LAYER)
    np.testing.assert_array_equal(dataset.acts, store.acts(LAYER)[:])
    for name in ("token", "document", "position"):
        assert dataset[name].dims == ("row",)
        np.testing.assert_array_equal(dataset[name], store.group[name][:])


def test_the_documents_of_a_store_have_their_text_and_tokens(study):
    assert len(study.documents) == len(study.tokens.held_out)
    for number in (0, 17, 299):
        assert study.documents.text[number].startswith(study.tokenizer.decode(study.tokens.ids(number)))
        assert study.documents.held_out[number] == study.tokens.held_out[number]


def test_the_first_seed_of_a_dictionary_is_the_one_that_is_interpreted(study):
    chosen = study.sae("tuned", LAYER, "small")
    assert chosen.metadata["rlsae"]["seed"] == 1
    assert study.sae("tuned", LAYER, "small", seed=2).metadata["rlsae"]["seed"] == 2
    assert chosen.metadata["model_name"] == "tiny.ppo"


@pytest.mark.parametrize(
    ("name", "role", "model"), [("demo", "base", "base"), ("demo", "tuned", "tuned"), ("early", "tuned", "tuned@2")]
)
def test_a_model_is_the_policy_that_is_studied(results, models, name, role, model):
    opened = rlsae.open_study(results, name).model(role)
    assert all(torch.equal(value, models[model].state_dict()[key]) for key, value in opened.state_dict().items())


# --- in the model ------------------------------------------------------------------------------------------------


def test_latents_at_a_text_are_those_of_its_rows_in_the_store(study):
    sae, number = study.sae("tuned", LAYER, "small"), 5
    document = study.store("tuned").start[number : number + 2]
    rows = torch.from_numpy(study.store("tuned").read(LAYER, *document))
    text = study.tokenizer.decode(study.tokens.ids(number))
    found = rlsae.latents_at(study.model("tuned"), study.tokenizer, sae, text)
    assert "".join(found.index) == text
    np.testing.assert_allclose(found, sae.encode(rows), atol=1e-4)


def logits(study, model):
    with torch.no_grad():
        return model(**study.tokenizer(TEXT, return_tensors="pt")).logits


@pytest.fixture
def model(study):
    return study.model("tuned")


@pytest.fixture
def sae(study):
    return study.sae("tuned", LAYER, "big")


def test_an_attached_dictionary_adds_what_its_latents_write_and_goes_again(study, model, sae):
    """Twice what a latent writes is the model's own output and that once more."""
    acts_TF = rlsae.latents_at(model, study.tokenizer, sae, TEXT)
    latent = int(acts_TF.max().idxmax())
    rows: list[torch.Tensor] = []
    module = model.get_submodule(sae.metadata["hook_name"])
    before = logits(study, model)
    with rlsae.attach(model, sae, [latent], gain=2):
        handle = module.register_forward_hook(lambda module, given, output: rows.append(output[0]))
        changed = logits(study, model)
        handle.remove()
    handle = module.register_forward_hook(lambda module, given, output: rows.append(output[0]))
    after = logits(study, model)
    handle.remove()
    written = torch.outer(torch.tensor(acts_TF[latent].to_numpy()), sae.W_dec_FD[latent])
    torch.testing.assert_close(rows[0], rows[1] + written)
    assert not torch.equal(before, changed)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_gain_of_one_changes_nothing(study, model, sae):
    before = logits(study, model)
    with rlsae.attach(model, sae, [LATENT], gain=1):
        torch.testing.assert_close(logits(study, model), before)


def test_of_nested_contexts_the_inner_one_reads_what_the_outer_one_left(study, model, sae):
    with rlsae.attach(model, sae, range(sae.latents)):
        acts_TF = rlsae.latents_at(model, study.tokenizer, sae, TEXT)
    assert not np.allclose(acts_TF, rlsae.latents_at(model, study.tokenizer, sae, TEXT))


def test_a_model_without_the_module_of_a_dictionary_is_refused(study, sae, random_model):
    with (
        pytest.raises(RlsaeError, match=r"module 'gpt_neox\.layers\.1\.mlp', which GPT2LMHeadModel .* trained on, 'tiny.ppo'"),
        rlsae.attach(random_model("gpt2"), sae, [LATENT]),
    ):
        pass


def test_a_dictionary_of_both_models_is_not_attached_to_one(model, sae):
    crosscoder = replace(sae, metadata=sae.metadata | {"rlsae": {"reads": "both"}})
    with (
        pytest.raises(RlsaeError, match=r"reads both .* let the other model run beside it"),
        rlsae.attach(model, crosscoder, [0]),
    ):
        pass


def test_prompts_are_answered_alike_each_time_and_judged_by_the_tunings_reward(study, model):
    prompts = study.prompts(6)
    answers = prompts.answers(model)
    assert answers.columns.tolist() == ["prompt", "response", "reward"]
    assert len(answers) == 6
    assert answers.reward.tolist() == prompts.reward(answers.prompt, answers.response) == prompts.rewards(model).tolist()
    pd.testing.assert_frame_equal(study.prompts(6).answers(model), answers)


def test_a_reward_from_a_file_asks_for_that_file(copied, tmp_path):
    words = tmp_path / "words.tsv"
    words.write_text("film\t2.0\n")
    tuned = copied / "policies/tiny.ppo"
    content = json.loads((tuned / MANIFEST).read_text())
    content["inputs"] |= input_digests({"reward": words})
    (tuned / MANIFEST).write_text(Manifest(**content).to_json())
    with pytest.warns(UserWarning, match="another policies/tiny.ppo"):
        study = rlsae.open_study(copied, "demo")
    assert study.prompts(2, words).reward([""], ["film"]) == [pytest.approx(0.4)]
    for given in (None, copied / "corpora/reviews/manifest.json"):
        with pytest.raises(RlsaeError, match=f"reward_file is {given}: .* a file of yours; give that one"):
            study.prompts(2, given)


# --- what is missing ---------------------------------------------------------------------------------------------


def test_a_study_that_is_not_there_is_refused_with_those_that_are(results):
    with pytest.raises(RlsaeError, match="holds no study 'dmeo'; its studies: demo, early"):
        rlsae.open_study(results, "dmeo")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(RlsaeError, match="holds no study 'demo'; expected a folder with divergence/ and comparison/ in it"):
        rlsae.open_study(tmp_path, "demo")


@pytest.mark.parametrize("stage", TABLES)
def test_an_unfinished_study_names_the_stage_and_the_target_that_makes_it(copied, stage):
    (copied / stage / "demo" / MANIFEST).unlink()
    with pytest.raises(
        RlsaeError, match=rf"not finished: \S+{stage}/demo has no manifest.json; .* snakemake --cores all {stage}"
    ):
        rlsae.open_study(copied, "demo")


def test_an_artifact_that_was_replaced_since_is_told(copied):
    finish(copied / "comparison/demo", "comparison", parameters={"dictionaries": NAMES}, metrics={"another": 1})
    with pytest.warns(UserWarning, match="interpretation/demo was made from another comparison/demo; run the workflow again"):
        rlsae.open_study(copied, "demo")


def test_what_is_large_may_be_left_behind(copied):
    shutil.rmtree(copied / "activations")
    study = rlsae.open_study(copied, "demo")
    assert "tiny against tiny.ppo on reviews" in repr(study)
    assert len(study.tables["comparison/latents"]) == 1
    assert len(study.documents) == 300
    assert "tuned activations" not in study.manifests
    model, sae = study.model("tuned"), study.sae("tuned", LAYER, "small")
    assert rlsae.latents_at(model, study.tokenizer, sae, TEXT).shape[1] == sae.latents
    assert len(study.prompts(2).answers(model)) == 2
    with pytest.raises(RlsaeError, match="layers-1 holds no activation store"):
        study.store("tuned")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("tunde", LAYER, "small"), "role is 'tunde'; expected 'base' or 'tuned'"),
        (("base", 7, "small"), "no dictionary 'small' of layer 7; layers: 1; dictionaries: small, big"),
        (("base", LAYER, "huge"), "no dictionary 'huge' of layer 1; layers: 1; dictionaries: small, big"),
        (("base", LAYER, "small", 0), "dictionary 'small' of layer 1 has no seed 0; seeds: 1, 2"),
    ],
)
def test_a_dictionary_that_is_not_there_is_refused_with_those_that_are(study, asked, message):
    with pytest.raises(RlsaeError, match=message):
        study.sae(*asked)


@pytest.mark.parametrize("read", ["store", "model"])
def test_a_role_that_is_not_there_is_refused(study, read):
    with pytest.raises(RlsaeError, match="role is 'tunde'; expected 'base' or 'tuned'"):
        getattr(study, read)("tunde")


def test_a_layer_that_a_store_does_not_hold_is_refused(study):
    with pytest.raises(RlsaeError, match="layer 0 is not in this store; it holds \\[1\\]"):
        study.dataset("base", 0)


def test_without_xarray_the_store_itself_is_pointed_to(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(RlsaeError, match=r"pip install xarray; or read study.store\(role\).acts\(layer\)"):
        study.dataset("base", LAYER)


def test_the_package_tells_what_it_offers():
    assert {"open_study", "attach", "latents_at", "__version__"} <= set(dir(rlsae))
    with pytest.raises(AttributeError, match="module 'rlsae' has no attribute 'opne_study'"):
        rlsae.opne_study  # noqa: B018
