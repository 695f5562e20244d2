"""What `verify` finds wrong with the files of an artifact, and that it finds nothing wrong with a whole one."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from damaged_artifacts import age, cut, flip, seal, swap
from small_artifacts import dump, finish, write_dictionaries, write_policy
from typer.testing import CliRunner

from rlsae import cli
from rlsae import verification as module
from rlsae.activations.tokens import build_tokens
from rlsae.artifacts import MANIFEST, PROVENANCE
from rlsae.errors import RlsaeError
from rlsae.models import save
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.verification import verify

SURVEY = "activations/tiny.reviews/mlp/survey"


def problems(folder):
    return verify(folder)[0]


@pytest.fixture(scope="module")
def made(random_model, tokenizer, corpus, tmp_path_factory):
    """Results folder of real stages, and of a policy with checkpoints and dictionaries."""
    results = tmp_path_factory.mktemp("made") / "results"
    base = seal(write_policy(results / "models/tiny", random_model("gpt_neox"), tokenizer))
    policy = results / "policies/tiny.ppo"
    for number, name in enumerate(("model", "checkpoints/1", "checkpoints/2")):
        model = random_model("gpt_neox")
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1 + number)
        save(model, tokenizer, policy / name)
    seal(policy, "policies")
    tokens = results / "tokens/tiny.reviews"
    build_tokens({"seed": 0, "context_length": 64, "drop_positions": 1}, tokens, None, base, corpus)
    dump(results / SURVEY, base, tokens, rows=300, codec="zstd")
    sae = SparseAutoencoder(torch.zeros(4, 8), torch.zeros(8), torch.zeros(8, 4), torch.zeros(4))
    seal(write_dictionaries(results / "dictionaries/small", {0: sae, 1: sae}))
    shutil.copytree(corpus, results / "corpora/reviews")
    return age(results)


@pytest.fixture
def results(made, tmp_path):
    """A copy of them that may be damaged."""
    return shutil.copytree(made, tmp_path / "results")


# --- what is whole -----------------------------------------------------------------------------------------------


def test_artifacts_as_their_stages_leave_them_are_whole(made):
    folders = [path.parent for path in made.rglob(MANIFEST)]
    assert len(folders) == 6
    for folder in folders:
        found, summary = verify(folder)
        assert found == []
        assert "is whole: " in summary


def test_what_stands_beside_the_outputs_by_right_is_no_problem(results, tmp_path):
    for name in (PROVENANCE, ".snakemake_timestamp", "part-0.json", "store/.snakemake_timestamp"):
        (results / SURVEY / name).write_text("{}")
    assert problems(results / SURVEY) == []
    report = finish(tmp_path / "reports/main", "reports")
    (report / "status.js").write_text("")
    assert problems(report) == []


# --- other files -------------------------------------------------------------------------------------------------


def test_a_changed_table_is_found(results):
    flip(results / "corpora/reviews/documents.parquet", place=2000)
    assert problems(results / "corpora/reviews")[-1].startswith("documents.parquet: its content is not what the manifest names")


def test_a_table_that_was_cut_is_found_with_what_is_wrong(results):
    cut(results / "corpora/reviews/documents.parquet")
    assert problems(results / "corpora/reviews")[0].startswith("documents.parquet cannot be read: ")


def test_weights_that_were_cut_are_found_with_their_sizes(results):
    weights = results / "models/tiny/model/model.safetensors"
    size = weights.stat().st_size
    cut(weights, size - 4)
    assert f"model/model.safetensors cannot be read: {size - 4} bytes, its header asks for {size}" in problems(
        results / "models/tiny"
    )


@pytest.mark.parametrize(
    ("artifact", "gone", "line"),
    [
        ("models/tiny", "model/model.safetensors", "model/model*.safetensors is missing"),
        ("models/tiny", "model/config.json", "model/config.json is missing"),
        ("dictionaries/small", "saes/seed1/cfg.json", "saes/seed1/cfg.json is missing"),
        ("dictionaries/small", "saes/seed0/sae_weights.safetensors", "saes/seed0/sae_weights.safetensors is missing"),
        ("tokens/tiny.reviews", "store/tokens.zarr/start/zarr.json", "tokens.zarr/start/zarr.json is missing"),
    ],
)
def test_a_file_without_which_others_make_no_sense_is_missed(results, artifact, gone, line):
    (results / artifact / gone).unlink()
    assert problems(results / artifact)[0].startswith(line)


def test_a_file_that_was_added_to_an_output_is_named(results):
    (results / "dictionaries/small/saes/seed0/notes.json").write_text("no JSON")
    assert problems(results / "dictionaries/small") == ["saes/seed0/notes.json was added"]
    os.utime(results / "dictionaries/small/saes/seed0/notes.json", (1, 1))
    assert problems(results / "dictionaries/small") == ["saes/seed0/notes.json was added"]


def test_several_files_that_were_added_later_are_named(results):
    for name in ("a", "b"):
        (results / "models/tiny/model" / name).write_text("")
    assert problems(results / "models/tiny") == ["model/a was added", "model/b was added"]


def test_swapped_checkpoints_are_named(results):
    folder = results / "policies/tiny.ppo"
    swap(*(folder / f"checkpoints/{number}/model.safetensors" for number in (1, 2)))
    assert problems(folder) == ["checkpoints/1/model.safetensors and 2/model.safetensors were swapped"]


def test_a_file_that_was_written_after_the_manifest_is_suspected(results):
    path = results / "models/tiny/model/config.json"
    path.write_text(path.read_text() + " ")
    assert problems(results / "models/tiny") == [
        "model: its content is not what the manifest names; written after the manifest: config.json"
    ]
    os.utime(path, (1, 1))
    count = sum(1 for file in path.parent.rglob("*") if file.is_file())
    assert problems(results / "models/tiny") == [
        f"model: its content is not what the manifest names, of {count} files none says which"
    ]


def test_an_output_that_is_missing_is_named(results):
    shutil.rmtree(results / "policies/tiny.ppo/model")
    shutil.rmtree(results / SURVEY / "store")
    assert problems(results / "policies/tiny.ppo") == ["model is missing"]
    assert problems(results / SURVEY) == ["store is missing, as it may be where its activation has `keep: false`"]


def test_a_file_beside_the_outputs_is_named(results):
    (results / "policies/tiny.ppo/part-0.json").write_text("")
    assert problems(results / "policies/tiny.ppo") == ["part-0.json: the manifest does not name it"]


def test_no_guess_is_tried_without_end(results, monkeypatch):
    monkeypatch.setattr(module, "GUESSES", 0)
    (results / "dictionaries/small/saes/seed0/notes.txt").write_text("")
    assert problems(results / "dictionaries/small") == [
        "saes: its content is not what the manifest names; written after the manifest: seed0/notes.txt"
    ]


# --- the manifest ------------------------------------------------------------------------------------------------


def test_a_missing_manifest_is_named(results):
    (results / "models/tiny" / MANIFEST).unlink()
    [line] = problems(results / "models/tiny")
    assert f"has no {MANIFEST}; run the stage that makes it" in line


def test_a_path_that_is_no_folder_is_refused_with_what_is_expected(tmp_path):
    with pytest.raises(RlsaeError, match="is no folder; expected the folder of an artifact"):
        verify(tmp_path / "nothing")


# --- the command line --------------------------------------------------------------------------------------------


def test_a_whole_artifact_ends_with_status_0_and_a_summary(results):
    result = CliRunner().invoke(cli.app, ["verify", str(results / "dictionaries/small")])
    assert result.exit_code == 0
    size = sum(path.stat().st_size for path in (results / "dictionaries/small/saes").glob("*/*"))
    assert result.output == f"dictionaries/small is whole: 1 output, 4 files, {size:,} bytes\n"


def test_a_damaged_artifact_ends_with_status_1_a_line_per_problem_and_their_number(results):
    (results / SURVEY / "store/activations.zarr/layer/1/acts/c/2/0").unlink()
    (results / SURVEY / "notes.txt").write_text("")
    result = CliRunner().invoke(cli.app, ["verify", str(results / SURVEY)])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "layer 1, rows 128 to 191: activations.zarr/layer/1/acts/c/2/0 is missing",
        "notes.txt: the manifest does not name it",
        f"{SURVEY}: 2 problems",
    ]
