"""Dictionaries as a folder for a model hub: names, files, the model card, and what is refused."""

from __future__ import annotations

import pytest
from small_artifacts import finish
from small_dictionaries import autoencoder
from typer.testing import CliRunner

from rlsae.artifacts import MANIFEST, digest
from rlsae.cli import app
from rlsae.errors import RlsaeError
from rlsae.sae.dictionary import CONFIG, SPARSITY, WEIGHTS
from rlsae.sae.hub import export

SCORES = {"fvu": 0.0512345, "l0": 5.5, "dead_share": 0.25, "ce_recovered": 0.9584, "kl_recovered": None}
FILES = [CONFIG, WEIGHTS, SPARSITY]


def write(results, policy="tiny", dictionary="small", layer=3, kind="layers-3"):
    """A dictionaries artifact of two seeds."""
    folder = results / "dictionaries" / f"{policy}.reviews" / "mlp" / kind / f"layer{layer}" / dictionary
    for seed in (0, 1):
        facts = {"seed": seed, "layer": layer, "settings": {"l1": 0.01}, "activations": "sha256:ac"}
        metadata = {"model_name": policy, "hook_name": f"gpt_neox.layers.{layer}.mlp", "training_architecture": "tied_relu"}
        sae = autoencoder([[1, 0]], [0, seed], [[1], [0]], [5], metadata=metadata | {"rlsae": facts})
        sae.save(folder / "saes" / f"seed{seed}", sae.b_enc_F)
    metrics = {f"seed{seed}": SCORES for seed in (0, 1)}
    return finish(folder, "dictionaries", outputs={"saes": digest(folder / "saes")}, metrics=metrics)


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def test_every_autoencoder_gets_a_folder_named_by_policy_hook_dictionary_and_seed(results, tmp_path):
    folders = [write(results), write(results, "tiny.ppo"), write(results, dictionary="big")]
    names = export(folders, tmp_path / "hub")
    assert names == [
        f"{policy}/gpt_neox.layers.3.mlp/{dictionary}/seed{seed}"
        for policy, dictionary in [("tiny", "small"), ("tiny.ppo", "small"), ("tiny", "big")]
        for seed in (0, 1)
    ]
    expected = {f"{name}/{file}" for name in names for file in FILES} | {"README.md"}
    assert {
        path.relative_to(tmp_path / "hub").as_posix() for path in (tmp_path / "hub").rglob("*.*") if path.is_file()
    } == expected
    for file in FILES:
        assert (tmp_path / "hub" / names[1] / file).read_bytes() == (folders[0] / "saes" / "seed1" / file).read_bytes()


def test_the_card_tells_hook_architecture_scores_and_where_it_comes_from(results, tmp_path):
    folder = write(results)
    (name, _) = export([folder], tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: saelens\ntags:\n- sparse-autoencoder\n")
    assert f'SAE.from_pretrained("OWNER/REPOSITORY", "{name}")' in card
    what = f"| `{name}` | tiny | `gpt_neox.layers.3.mlp` | tied_relu | 1 | 2 |"
    assert f"{what} 0.05123 | 5.5 | 0.25 | 0.9584 | n/a |" in card
    made = f"| `dictionaries/tiny.reviews/mlp/layers-3/layer3/small` | `{digest(folder / MANIFEST)}` | `sha256:ac` |"
    assert card.count(f'{made} `{{"l1":0.01}}` |') == 1


@pytest.mark.parametrize(("license_id", "stated"), [(None, False), ("mit", True)])
def test_a_licence_is_stated_only_where_it_is_given(results, tmp_path, license_id, stated):
    export([write(results)], tmp_path / "hub", license_id)
    front = (tmp_path / "hub" / "README.md").read_text().split("---")[1]
    assert ("license: mit\n" in front) == ("license" in front) == stated


def test_a_folder_that_holds_something_is_refused_and_left_alone(results, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "notes.txt").write_text("mine")
    with pytest.raises(RlsaeError, match="hub is not empty; choose another folder"):
        export([write(results)], tmp_path / "hub")
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["notes.txt"]


def test_an_artifact_of_another_stage_is_refused_before_anything_is_written(results, tmp_path):
    model = finish(results / "models" / "tiny", "models")
    with pytest.raises(RlsaeError, match="tiny is an artifact of the stage models; expected a folder of dictionaries"):
        export([write(results), model], tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_what_changed_since_it_was_written_is_refused(results, tmp_path):
    folder = write(results)
    (folder / "saes" / "seed1" / WEIGHTS).write_bytes(b"")
    with pytest.raises(RlsaeError, match=r"saes changed since it was written; run `rlsae verify"):
        export([folder], tmp_path / "hub")


def test_two_dictionaries_of_one_name_are_refused(results, tmp_path):
    with pytest.raises(RlsaeError, match=r"would both be tiny/gpt_neox\.layers\.3\.mlp/small/seed0; export them into two"):
        export([write(results), write(results, kind="layers-2-3")], tmp_path / "hub")


def test_the_verb_prints_the_names(results, tmp_path):
    done = CliRunner().invoke(app, ["export", str(write(results)), "--hub-layout", str(tmp_path / "hub"), "--license", "mit"])
    assert done.exit_code == 0
    assert done.stdout.split() == [f"tiny/gpt_neox.layers.3.mlp/small/seed{seed}" for seed in (0, 1)]
