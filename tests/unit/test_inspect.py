"""What `inspect` tells about each kind of artifact, to people and to scripts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from damaged_artifacts import seal
from small_artifacts import dump, finish, random_documents, tokens_of, write_dictionaries, write_policy, write_store
from typer.testing import CliRunner

from rlsae import cli
from rlsae import inspection as module
from rlsae.activations.store import STORE
from rlsae.activations.tokens import STORE as TOKENS
from rlsae.activations.tokens import build_tokens
from rlsae.artifacts import MANIFEST, PROVENANCE
from rlsae.cli.tree import render
from rlsae.errors import RlsaeError
from rlsae.inspection import PIECE_ROWS, PIECES, inspect
from rlsae.sae.dictionary import SparseAutoencoder

NORMS = {"rows_read", "not_finite", "mean", "median", "max", "max_row", "outlier_share", "problem"}
LENGTHS = [12, 1, 30, 7, 3, 22, 64]
"""139 tokens."""


@pytest.fixture(scope="module")
def made(random_model, tokenizer, corpus, tmp_path_factory):
    """Results folder of real stages: a base model, a policy, tokens and the activations of that policy."""
    results = tmp_path_factory.mktemp("made") / "results"
    base = seal(write_policy(results / "models/tiny", random_model("gpt2"), tokenizer))
    write_policy(results / "policies/tiny.ppo", random_model("gpt2"), tokenizer)
    policy = seal(finish(results / "policies/tiny.ppo", "policies"))
    tokens = results / "tokens/tiny.reviews"
    build_tokens({"seed": 0, "context_length": 64, "drop_positions": 1}, tokens, None, base, corpus)
    dump(results / "activations/tiny.ppo.reviews/mlp/survey", policy, tokens, rows=300, dtype="float32", codec="zstd")
    return results


@pytest.fixture
def results(made, tmp_path):
    """A copy of them that may be changed."""
    return shutil.copytree(made, tmp_path / "results")


@pytest.fixture
def store(tmp_path):
    """Function of rows by layer: the facts of an activation store that holds them."""

    def facts(acts, **options):
        folder = write_store(tmp_path / "results/activations/a", tokens_of(random_documents(LENGTHS)), acts, **options)
        return store_facts(seal(folder))

    return facts


def store_facts(folder):
    return inspect(folder)["outputs"]["store"]["entries"]["activations.zarr"]


def unit_rows():
    """139 rows of norm one."""
    rows = np.random.default_rng(0).normal(size=(139, 4))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# --- tables, models and tensors ----------------------------------------------------------------------------------


def test_a_table_has_its_rows_and_its_columns_with_types(corpus):
    facts = inspect(corpus)
    assert facts["stage"] == "corpora"
    assert facts["artifact"] == "corpora/reviews"
    table = facts["outputs"]["documents.parquet"]
    columns = {"document": "int32", "text": "large_string", "label": "int8", "held_out": "bool"}
    assert (table["kind"], table["rows"], table["columns"]) == ("table", 300, columns)
    assert table["bytes"] == (corpus / "documents.parquet").stat().st_size


def test_a_model_of_every_family_has_its_sizes(model, tokenizer, tmp_path):
    facts = inspect(seal(write_policy(tmp_path / "models/tiny", model, tokenizer)))["outputs"]["model"]
    assert facts["kind"] == "transformers"
    assert facts["architecture"] == type(model).__name__
    assert (facts["layers"], facts["width"], facts["vocabulary"]) == (2, 32, len(tokenizer))
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_parameters_of_a_large_model_are_counted_without_its_weights(tmp_path):
    folder = tmp_path / "models/large/model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["Large"], "hidden_size": 16384}')
    tensor = {"dtype": "F32", "shape": [1 << 20, 1 << 14], "data_offsets": [0, 1 << 36]}
    header = json.dumps({"weight": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 36))
    facts = inspect(finish(folder.parent, "models", outputs={"model": "sha256:0"}))["outputs"]["model"]
    assert (facts["parameters"], facts["width"], facts["layers"]) == (1 << 34, 16384, None)


def test_dictionaries_have_their_tensors_with_shapes_and_types_below_their_seeds(tmp_path):
    sae = SparseAutoencoder(torch.zeros(4, 8), torch.zeros(8), torch.zeros(8, 4), torch.zeros(4))
    facts = inspect(seal(write_dictionaries(tmp_path / "dictionaries/small", {0: sae, 1: sae})))["outputs"]["saes"]
    assert list(facts["entries"]) == ["seed0", "seed1"]
    weights = facts["entries"]["seed1"]["entries"]["sae_weights.safetensors"]
    shapes = {"W_enc": [4, 8], "b_enc": [8], "W_dec": [8, 4], "b_dec": [4]}
    assert weights["tensors"] == {name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}


def test_other_files_have_their_size_and_folders_the_sum_of_their_files(tmp_path):
    folder = finish(tmp_path / "reports/main", "reports")
    (folder / "pages").mkdir()
    for name, size in {"a.html": 3, "b.html": 40}.items():
        (folder / "pages" / name).write_bytes(b"x" * size)
    pages = inspect(seal(folder))["outputs"]["pages"]
    assert pages["bytes"] == 43
    assert pages["entries"] == {"a.html": {"kind": "file", "bytes": 3}, "b.html": {"kind": "file", "bytes": 40}}


# --- stores ------------------------------------------------------------------------------------------------------


def test_every_array_of_a_store_has_its_shape_type_chunks_shards_and_compression(results):
    folder = results / "activations/tiny.ppo.reviews/mlp/survey"
    arrays = store_facts(folder)["arrays"]
    assert {"token", "start", "layer/0/acts", "layer/1/acts", "layer/1/second_moment"} <= set(arrays)
    acts = arrays["layer/1/acts"]
    stored = sum(path.stat().st_size for path in (folder / STORE / "layer/1/acts/c").glob("*/0"))
    assert acts["shape"] == [300, 32]
    assert acts["dtype"] == "float32"
    assert acts["chunks"] == acts["shards"] == [64, 32]
    assert acts["bytes"] == stored
    assert acts["compression_ratio"] == pytest.approx(300 * 32 * 4 / stored)
    assert arrays["token"]["shards"] is None


def test_equal_rows_have_a_high_ratio_of_compression(tmp_path, results):
    arrays = store_facts(results / "activations/tiny.ppo.reviews/mlp/survey")["arrays"]
    group = zarr.open_group(results / "activations/tiny.ppo.reviews/mlp/survey" / STORE, mode="a")
    group["layer/0/acts"][:] = np.ones((300, 32), np.float32)
    after = store_facts(results / "activations/tiny.ppo.reviews/mlp/survey")["arrays"]
    assert after["layer/0/acts"]["compression_ratio"] > 5 * arrays["layer/0/acts"]["compression_ratio"]


def test_an_attention_sink_is_told_by_the_norms_of_its_layer(store):
    rows = unit_rows()
    rows[[5, 77]] *= [[50.0], [900.0]]
    norms = store({0: unit_rows(), 3: rows})["layers"]
    assert set(norms) == {"0", "3"}
    assert [norms["0"][key] for key in ("mean", "median", "max")] == pytest.approx([1, 1, 1], rel=1e-6)
    assert norms["0"]["outlier_share"] == 0
    assert (norms["3"]["max"], norms["3"]["max_row"]) == (pytest.approx(900, rel=1e-6), 77)
    assert norms["3"]["median"] == pytest.approx(1, rel=1e-6)
    assert norms["3"]["mean"] == pytest.approx((137 + 950) / 139, rel=1e-6)
    assert norms["3"]["outlier_share"] == pytest.approx(2 / 139)


def test_a_row_of_exactly_ten_medians_is_no_outlier(store):
    rows = np.zeros((139, 4))
    rows[:, 0] = 2
    rows[3, 0], rows[4, 0] = 20, 20.5
    assert store({0: rows})["layers"]["0"]["outlier_share"] == pytest.approx(1 / 139)


def test_rows_that_are_not_finite_are_counted_and_spoil_no_statistic(store, tmp_path):
    store({0: unit_rows()})
    zarr.open_group(tmp_path / "results/activations/a" / STORE, mode="a")["layer/0/acts"][[3, 9], 1] = [np.nan, np.inf]
    norms = store_facts(tmp_path / "results/activations/a")["layers"]["0"]
    assert (norms["rows_read"], norms["not_finite"]) == (139, 2)
    assert norms["max"] == pytest.approx(1, rel=1e-6)


def test_a_layer_of_zeros_has_no_share_of_outliers(store):
    rows = np.zeros((139, 4))
    rows[::64] = 1
    assert store({0: rows})["layers"]["0"]["outlier_share"] is None


def test_a_small_store_is_read_whole_and_a_large_one_in_pieces_from_all_over_it(store, monkeypatch):
    numbered = np.arange(139.0)[:, None] * [1, 0, 0, 0]
    assert store({0: numbered})["layers"]["0"]["rows_read"] == 139
    monkeypatch.setattr(module, "PIECES", 4)
    monkeypatch.setattr(module, "PIECE_ROWS", 3)
    norms = store({0: numbered})["layers"]["0"]
    assert norms["rows_read"] == 12
    assert norms["max_row"] == norms["max"] == 104 + 2
    assert norms["mean"] == pytest.approx(np.mean([0, 1, 2, 34, 35, 36, 69, 70, 71, 104, 105, 106]))
    assert PIECES * PIECE_ROWS <= 65_536


def test_a_store_tells_its_rows_documents_and_share_of_held_out_ones(store):
    facts = store({0: unit_rows()})
    assert (facts["rows"], facts["documents"]) == (139, 7)
    assert facts["held_out_share"] == pytest.approx(1 / 7)
    assert facts["attributes"]["policy"] == "tiny"


def test_a_row_is_shown_between_its_neighbours_with_its_token_marked(results, tokenizer):
    folder = results / "activations/tiny.ppo.reviews/mlp/survey"
    sample = store_facts(folder)["sample"]
    group = zarr.open_group(folder / STORE, mode="r")
    assert sample["row"] == 150
    assert sample["document"] == group["document"][150]
    assert sample["position"] == group["position"][150]
    assert sample["ids"][sample["place"]] == group["token"][150]
    assert set(group["document"][150 - sample["place"] : 150 - sample["place"] + len(sample["ids"])]) == {sample["document"]}
    marked = tokenizer.decode([int(group["token"][150])])
    assert f"‹{marked}›" in sample["text"]
    assert sample["text"].replace("‹", "").replace("›", "") == tokenizer.decode(sample["ids"])


def test_a_document_of_tokens_is_shown_as_text(results, tokenizer):
    folder = results / "tokens/tiny.reviews"
    facts = inspect(folder)["outputs"]["store"]["entries"]["tokens.zarr"]
    group = zarr.open_group(folder / TOKENS, mode="r")
    sample, start = facts["sample"], group["start"][:]
    assert sample["document"] == 150
    assert sample["tokens"] == start[151] - start[150]
    assert sample["ids"] == group["token"][start[150] : start[151]].tolist()
    assert sample["text"] == tokenizer.decode(sample["ids"])
    assert facts["documents"] == 300
    assert "layers" not in facts


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")], ids=["missing", "cut"])
def test_without_a_tokenizer_there_are_ids_alone(results, damage):
    damage(results / "models/tiny/model/tokenizer.json")
    folder = results / "activations/tiny.ppo.reviews/mlp/survey"
    sample = store_facts(folder)["sample"]
    assert sample["text"] is None
    assert " ".join(map(str, sample["ids"])) in render(inspect(folder))


# --- what is not whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "nothing"])
def test_a_path_without_a_manifest_is_refused_with_what_is_expected(tmp_path, path):
    with pytest.raises(RlsaeError, match=r"has no manifest.json; expected the folder of an artifact"):
        inspect(tmp_path / path)


@pytest.mark.parametrize("size", [None, 100], ids=["missing", "cut"])
def test_a_shard_that_is_missing_or_cut_is_named_and_the_other_layers_are_described(results, size):
    folder = results / "activations/tiny.ppo.reviews/mlp/survey"
    shard = folder / STORE / "layer/1/acts/c/2/0"
    shard.unlink() if size is None else shard.write_bytes(shard.read_bytes()[:size])
    layers = store_facts(folder)["layers"]
    assert layers["1"]["problem"] == "the shard of rows 128 to 191 is missing or has another size"
    assert layers["1"]["mean"] is None
    assert layers["0"]["problem"] is None
    assert set(layers["0"]) == set(layers["1"]) == NORMS
    assert "rows 128 to 191 is missing or has another size; `rlsae verify` names" in render(inspect(folder))


def test_a_damaged_chunk_is_told_and_the_other_layers_are_described(results):
    folder = results / "activations/tiny.ppo.reviews/mlp/survey"
    shard = folder / STORE / "layer/0/acts/c/0/0"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    layers = store_facts(folder)["layers"]
    assert layers["0"]["problem"] == "rows cannot be read: its checksum does not hold"
    assert layers["1"]["rows_read"] == 300


def test_outputs_that_are_missing_or_unreadable_are_told_as_such(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "corpora/reviews")
    (folder / "documents.parquet").write_text("no table")
    outputs = inspect(folder)["outputs"]
    assert outputs["documents.parquet"]["kind"] == "damaged"
    assert "documents.parquet: 8 bytes, cannot be read" in render(inspect(folder))
    (folder / "documents.parquet").unlink()
    assert inspect(folder)["outputs"] == {"documents.parquet": {"kind": "missing", "bytes": 0}}
    assert render(inspect(folder)).endswith("└─ documents.parquet: missing")


# --- for scripts and for people ----------------------------------------------------------------------------------


def test_the_json_holds_the_same_keys_for_every_artifact(results, corpus):
    keys = {"artifact", "stage", "bytes", "inputs", "parameters", "metrics", "provenance", "outputs"}
    folders = [path.parent for path in results.rglob(MANIFEST)]
    assert len(folders) == 4
    for folder in [*folders, corpus]:
        result = CliRunner().invoke(cli.app, ["inspect", str(folder), "--json"])
        assert result.exit_code == 0
        facts = json.loads(result.output, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert set(facts) == keys
        assert facts == inspect(folder)


def test_values_that_are_not_finite_become_null(results, store, tmp_path):
    (results / "models/tiny" / PROVENANCE).write_text('{"wall_seconds": NaN, "threads": 2}')
    made = inspect(results / "models/tiny")["provenance"]
    assert made == {"rlsae": None, "commit": None, "device": None, "threads": 2} | dict.fromkeys(
        ("wall_seconds", "peak_memory_mb")
    )
    store({0: unit_rows()})
    folder = tmp_path / "results/activations/a"
    zarr.open_group(folder / STORE, mode="a")["layer/0/acts"][:] = np.full((139, 4), np.nan, np.float32)
    assert json.loads(json.dumps(inspect(folder), allow_nan=False)) == inspect(folder)
    assert store_facts(folder)["layers"]["0"]["mean"] is None
    assert "layer 0: 139 rows read, 139 not finite" in render(inspect(folder))


@pytest.mark.parametrize("text", [None, "{"], ids=["missing", "cut"])
def test_an_artifact_may_lack_its_provenance(results, text):
    folder = results / "tokens/tiny.reviews"
    (folder / PROVENANCE).unlink() if text is None else (folder / PROVENANCE).write_text(text)
    assert inspect(folder)["provenance"] is None
    assert "provenance" not in render(inspect(folder))


def test_people_read_a_tree_of_all_that(results):
    output = CliRunner().invoke(cli.app, ["inspect", str(results / "activations/tiny.ppo.reviews/mlp/survey")]).output
    lines = [line.strip("│├└─ ") for line in output.splitlines()]
    assert lines[0].startswith("activations/tiny.ppo.reviews/mlp/survey (stage activations, ")
    assert {"policies/tiny.ppo", "tokens/tiny.reviews", "hook: mlp", "layers: 0, 1", "rows: 300", "codec: zstd"} <= set(lines)
    for beginning in (
        "commit: ",
        "wall time: ",
        "peak memory: ",
        "layer/0/acts: float32 300 × 32, chunks 64 × 32 in shards 64 × 32, ",
        "documents: ",
        "layer 1: norm mean ",
        "row 150, position ",
    ):
        assert any(line.startswith(beginning) for line in lines), beginning
    assert "‹" in lines[-1]


def test_people_read_the_first_metrics_alone_and_how_many_more_there_are(tmp_path):
    metrics = {"layers": {str(layer): {"mmcs": layer / 3} for layer in range(30)}}
    lines = render(inspect(finish(tmp_path / "comparison/main", "comparison", metrics=metrics))).splitlines()
    assert lines[2].endswith("layers.0.mmcs: 0")
    assert lines[3].endswith("layers.1.mmcs: 0.3333")
    assert lines[-1].endswith("… and 10 more")


def test_a_table_is_listed_with_its_columns(tmp_path):
    folder = finish(tmp_path / "divergence/main", "divergence")
    pd.DataFrame({"layer": [0, 1], "value": [0.5, 1.5]}).to_parquet(folder / "layers.parquet")
    lines = render(inspect(seal(folder))).splitlines()
    assert lines[-3].startswith("└─ layers.parquet: table of 2 rows, ")
    assert [line.strip("│├└─ ") for line in lines[-2:]] == ["layer: int64", "value: double"]
