"""What `verify` finds wrong with the rows of a store, and that it finds nothing wrong with a whole one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import zarr
from damaged_artifacts import age, cut, flip, seal, swap
from small_artifacts import random_documents, tokens_of, write_policy, write_store

from rlsae import store_verification as module
from rlsae.activations import store as zarr_store
from rlsae.activations.store import STORE
from rlsae.activations.tokens import STORE as TOKENS
from rlsae.activations.tokens import build_tokens, consolidate_metadata, write_vector
from rlsae.artifacts import MANIFEST
from rlsae.verification import verify

LENGTHS = [12, 1, 30, 7, 3, 22, 64]
"""139 tokens: two shards of 64 rows and one of 11."""


def problems(folder):
    return verify(folder)[0]


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A store of two layers in chunks of 16 rows and shards of 64."""
    monkeypatch.setattr(zarr_store, "CHUNK_BYTES", 16 * 16)
    rows = np.random.default_rng(0).normal(3, 50, (2, 139, 4))
    tokens = tokens_of(random_documents(LENGTHS))
    return age(seal(write_store(tmp_path / "activations/a", tokens, {0: rows[0], 3: rows[1]})))


def acts_file(store, layer, number):
    return store / STORE / f"layer/{layer}/acts/c/{number}/0"


def rewrite(store, name, change):
    """Store changed values of an array as if they had been written so."""
    group = zarr.open_group(store / STORE, mode="a")
    node = group if "/" not in name else group[name.rpartition("/")[0]]
    array = group[name]
    write_vector(node, name.rpartition("/")[2], change(array[:]), array.metadata.dimension_names[0])
    consolidate_metadata(group)
    return seal(store)


@pytest.fixture(scope="module")
def made_tokens(random_model, tokenizer, corpus, tmp_path_factory):
    """A tokens artifact of the real stage."""
    results = tmp_path_factory.mktemp("made") / "results"
    base = seal(write_policy(results / "models/tiny", random_model("gpt_neox"), tokenizer))
    out = results / "tokens/tiny.reviews"
    build_tokens({"seed": 0, "context_length": 64, "drop_positions": 1}, out, None, base, corpus)
    return age(out)


@pytest.fixture
def tokens(made_tokens, tmp_path):
    """A copy of it that may be damaged."""
    return shutil.copytree(made_tokens, tmp_path / "tokens/tiny.reviews")


# --- what is whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_positions", [0, 2, 7])
def test_a_store_may_drop_first_positions_and_whole_short_documents(tmp_path, drop_positions):
    tokens = tokens_of(random_documents(LENGTHS), drop_positions=drop_positions)
    rows = np.random.default_rng(0).normal(size=(int(tokens.row_start()[-1]), 4))
    assert problems(seal(write_store(tmp_path / "activations/a", tokens, {0: rows}))) == []


@pytest.mark.parametrize("rows", [1, 64, 137])
def test_a_store_may_end_within_a_document(tmp_path, rows):
    acts = np.random.default_rng(0).normal(size=(rows, 4))
    assert problems(seal(write_store(tmp_path / "a", tokens_of(random_documents(LENGTHS)), {0: acts}))) == []


# --- shards ------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_in_its_layer_shard_and_chunk_and_nothing_else_is(store):
    flip(acts_file(store, 3, 1), place=300)
    assert problems(store) == [
        "layer 3, rows 64 to 127: activations.zarr/layer/3/acts/c/1/0 has another digest than when it was written; "
        "1 chunk not readable, the first is rows 80 to 95: its checksum does not hold"
    ]


def test_a_deleted_shard_is_found(store):
    acts_file(store, 0, 2).unlink()
    assert problems(store) == ["layer 0, rows 128 to 138: activations.zarr/layer/0/acts/c/2/0 is missing"]


def test_a_shard_that_was_cut_is_found(store):
    size = acts_file(store, 0, 0).stat().st_size
    cut(acts_file(store, 0, 0))
    [line] = problems(store)
    found = f"layer 0, rows 0 to 63: activations.zarr/layer/0/acts/c/0/0 has 100 bytes, {size:,} were written"
    assert line.startswith(f"{found}; 4 chunks not readable, the first is rows 0 to 15: ")


@pytest.mark.parametrize("other", [(0, 1), (3, 0)], ids=["of one layer", "of two layers"])
def test_swapped_shards_are_found_and_it_is_told_where_each_belongs(store, other):
    swap(acts_file(store, 0, 0), acts_file(store, *other))
    layer, number = other
    place = f"layer {layer}, rows {64 * number} to {64 * number + 63}"
    found = [line for line in problems(store) if "mean" not in line and "second_moment" not in line]
    assert len(found) == 2
    assert found[0].startswith("layer 0, rows 0 to 63: ")
    assert found[0].endswith(f"it holds {place}")
    assert found[1].startswith(place)
    assert found[1].endswith("it holds layer 0, rows 0 to 63")


def test_everything_is_named_at_once_the_worst_first(store):
    acts_file(store, 3, 1).unlink()
    flip(acts_file(store, 0, 0))
    (store / "notes.txt").write_text("")
    rewritten = zarr.open_group(store / STORE, mode="a")["position"]
    rewritten[70] = 5
    found = problems(store)
    starts = ["layer 3, rows 64 to 127", "layer 0, rows 0 to 63", "store: its content", "position: 1 row ", "notes.txt: the"]
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts


def test_without_its_attributes_a_layer_does_not_say_what_its_shards_held(store):
    group = zarr.open_group(store / STORE, mode="a", use_consolidated=False)
    del group["layer/0"].attrs["shards"]
    consolidate_metadata(group)
    assert problems(seal(store)) == ["layer 0 does not say what its shards held"]


# --- rows and statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found_with_their_rows(store, value):
    zarr.open_group(store / STORE, mode="a")["layer/3/acts"][[70, 71, 130], 2] = value
    found = problems(store)
    assert [line for line in found if "NaN" in line] == [
        "layer 3, rows 64 to 127: 2 rows with NaN or infinity, the first is row 70",
        "layer 3, rows 128 to 138: 1 row with NaN or infinity, the first is row 130",
    ]
    assert [line for line in found if "another digest" in line] == found[:2]
    assert len(found) == 4


@pytest.mark.parametrize("name", ["mean", "second_moment"])
def test_wrong_statistics_are_found_with_their_channel(store, name):
    factor = np.array([1, 1, 1 + 2e-6, 1])
    [line] = problems(rewrite(store, f"layer/3/{name}", lambda values: values * factor))
    assert line.startswith(f"layer 3: {name} is wrong in 1 of 4 channels, the first is channel 2: ")


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_statistics_that_are_lost_are_wrong(store, value):
    [line] = problems(rewrite(store, "layer/0/mean", lambda values: np.full(4, value)))
    assert line.startswith("layer 0: mean is wrong in 4 of 4 channels")


def test_rounding_is_no_wrong_statistic(store):
    assert problems(rewrite(store, "layer/3/mean", lambda values: values * (1 + 1e-8))) == []


def test_channels_whose_mean_is_zero_but_for_rounding_are_whole(tmp_path):
    rows = np.random.default_rng(0).normal(size=(70, 4)).astype(np.float32)
    folder = write_store(tmp_path / "a", tokens_of(random_documents([140])), {0: np.concatenate([rows, -rows])})
    assert problems(seal(folder)) == []


@pytest.mark.parametrize("name", ["document", "position"])
def test_rows_that_disagree_with_the_documents_are_found(store, name):
    def change(values):
        values[[0, 20]] += 1
        return values

    [line] = problems(rewrite(store, name, change))
    assert line.startswith(f"{name}: 2 rows not as start says, the first is row 0: 1 instead of 0")


@pytest.mark.parametrize("name", ["token", "document", "position"])
def test_numbers_of_rows_that_disagree_are_found(store, name):
    [line] = problems(rewrite(store, name, lambda values: values[:-1]))
    assert line.startswith("the numbers of rows disagree: ")
    assert f"{name} 138" in line
    assert "layer 3 139" in line


def test_a_start_that_falls_or_does_not_begin_at_zero_is_found(store):
    begins_late = rewrite(store, "start", lambda start: np.maximum(start, 1))
    assert problems(begins_late) == ["start: begins at row 1"]
    falls = rewrite(store, "start", lambda start: np.where(start <= 1, 0, np.where(start == 12, 14, start)))
    assert problems(falls) == ["start: falls behind document 1"]


def test_numbers_of_documents_that_disagree_are_found(store):
    found = problems(rewrite(store, "held_out", lambda held_out: held_out[:-1]))
    assert found == ["the numbers of documents disagree: start 7, held_out 6"]


def test_a_store_that_does_not_open_is_found(store):
    cut(store / STORE / "zarr.json")
    found = problems(store)
    assert found[0].startswith("activations.zarr cannot be opened: ")
    assert any(line.startswith("store/activations.zarr/zarr.json cannot be read: ") for line in found)


# --- tokens ------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_tokens_is_found(tokens):
    flip(tokens / TOKENS / "token/c/0")
    assert "token cannot be read: its checksum does not hold" in problems(tokens)


def test_tokens_that_plain_zarr_would_read_as_zeros_are_found(tokens):
    (tokens / TOKENS / "token/c/0").unlink()
    found = problems(tokens)
    assert "tokens.zarr/token/c/0 is missing; a missing chunk reads as zeros" in found
    assert any(line.startswith("token: the largest id is 0, the store says ") for line in found)


def test_numbers_of_tokens_and_documents_that_disagree_are_found(tokens):
    group = zarr.open_group(tokens / TOKENS, mode="a")
    length = group["token"].shape[0]
    group["start"][-1] = length - 1
    group["document"].resize((299,))
    consolidate_metadata(group)
    found = problems(seal(tokens))
    assert f"the numbers of rows disagree: token {length}, start {length - 1}" in found
    assert "the numbers of documents disagree: start 300, held_out 300, document 299" in found


# --- without help from the manifest, and at length ---------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "{", '{"schema": 7}'], ids=["missing", "cut", "of another schema"])
def test_without_a_manifest_a_store_is_still_checked(store, text):
    (store / MANIFEST).unlink() if text is None else (store / MANIFEST).write_text(text)
    acts_file(store, 3, 1).unlink()
    found = problems(store)
    assert MANIFEST in found[0]
    assert found[1:] == ["layer 3, rows 64 to 127: activations.zarr/layer/3/acts/c/1/0 is missing"]


def test_a_long_check_shows_its_progress_and_a_short_one_does_not(store, monkeypatch, capsys):
    verify(store)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "LONG", 0)
    verify(store)
    shown = capsys.readouterr().err
    assert "digests: " in shown
    assert "rows: 278 of 278 rows" in shown
