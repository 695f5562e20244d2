"""The activation store: its geometry, what any Zarr reader finds in it, and the order in which training reads it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from small_artifacts import random_documents, tokens_of, write_store

from rlsae.activations import store as module
from rlsae.activations.store import STORE, ActivationStore, Geometry
from rlsae.errors import RlsaeError

LENGTHS = [1 + (7 * i) % 23 for i in range(90)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 rows and shards of 32 for four channels of float32, windows of 4 chunks."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * 16)
    monkeypatch.setattr(module, "SHARD_BYTES", 32 * 16)
    monkeypatch.setattr(module, "WINDOW_CHUNKS", 4)


@pytest.fixture
def tokens():
    return tokens_of(random_documents(LENGTHS))


def numbered(tokens, offset=0.0):
    """Rows that say their own number in every channel."""
    return np.tile(np.arange(tokens.start[-1], dtype=np.float64)[:, None] + offset, (1, 4))


@pytest.fixture
def store(small_chunks, tokens, tmp_path):
    """A store of two layers whose rows say their own number."""
    return ActivationStore(write_store(tmp_path / "numbered", tokens, {0: numbered(tokens), 1: numbered(tokens)}))


def row_numbers(order, from_step=0):
    """The rows of each step."""
    return [batch[:, 0].astype(int).tolist() for batch in order.batches(from_step)]


# --- geometry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_part", [1024, 3 * 1024, 5 * 2048, 65_536, 96 * 1024, 1_048_576])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", [1, 16, 100, 768, 4096, 3_000_000])
def test_no_chunk_crosses_a_shard_and_no_shard_crosses_a_part(channels, itemsize, rows_per_part):
    geometry = Geometry.of(channels, itemsize, rows_per_part)
    assert geometry.shard_rows % geometry.chunk_rows == 0
    assert rows_per_part % geometry.shard_rows == 0


@pytest.mark.parametrize("channels", [16, 100, 768, 4096])
def test_chunks_and_shards_fill_their_sizes_where_the_part_is_long_enough(channels):
    geometry = Geometry.of(channels, 2, 2**40)
    assert 2 << 20 < geometry.chunk_rows * channels * 2 <= 4 << 20
    assert 64 << 20 < geometry.shard_rows * channels * 2 <= 128 << 20


def test_a_row_that_is_larger_than_a_chunk_has_a_chunk_of_its_own():
    assert Geometry.of(3_000_000, 4, 1024).chunk_rows == 1


# --- what is stored ----------------------------------------------------------------------------------------------


def test_rows_know_their_token_document_and_position(store, tokens):
    token, document, position = (store.group[name][:] for name in ("token", "document", "position"))
    assert token.tolist() == tokens.token.tolist()
    for row in range(store.rows):
        assert token[row] == tokens.ids(document[row])[position[row]]
    assert np.array_equal(store.start, tokens.start)


def test_a_store_may_end_within_a_document(small_chunks, tokens, tmp_path):
    rows = int(tokens.start[10]) - 2
    short = ActivationStore(write_store(tmp_path / "short", tokens, {0: numbered(tokens)[:rows]}))
    assert short.rows == rows
    assert short.start.tolist() == [*tokens.start[:10].tolist(), rows]
    assert np.array_equal(short.held_out, tokens.held_out[:10])


def test_every_row_of_a_held_out_document_is_held_out(store, tokens):
    assert np.array_equal(store.held_out_rows(), tokens.held_out[store.group["document"][:]])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_statistics_are_those_of_all_stored_rows(small_chunks, tokens, tmp_path, dtype):
    acts = np.random.default_rng(0).normal(3, 50, (int(tokens.start[-1]), 4))
    written = ActivationStore(write_store(tmp_path / "a", tokens, {2: acts}, dtype=dtype))
    assert written.rows > 10 * written.acts(2).shards[0]
    rows = written.acts(2)[:].astype(np.float64)
    mean, second_moment = written.statistics(2)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(second_moment, (rows**2).mean(0), rtol=1e-12)


def test_a_layer_that_is_not_stored_is_refused_with_those_that_are(store):
    for ask in (store.acts, store.statistics):
        with pytest.raises(RlsaeError, match=r"layer 7 is not in this store; it holds \[0, 1\]"):
            ask(7)


def test_a_folder_without_a_store_is_named_with_its_stage(tmp_path):
    with pytest.raises(RlsaeError, match="holds no activation store; run the activations stage"):
        ActivationStore(tmp_path)


def test_a_store_of_the_same_tokens_is_told_by_every_token_and_document(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "VECTOR_CHUNK", 64)
    store = ActivationStore(write_store(tmp_path / "store", tokens, {0: numbered(tokens)}))
    store.check_same_tokens(ActivationStore(write_store(tmp_path / "same", tokens, {0: numbered(tokens, 0.5)})))
    documents = np.split(tokens.token, tokens.start[1:-1])
    last = [*documents[:-1], documents[-1] + 1]
    cut_elsewhere = np.split(tokens.token, [*tokens.start[1:-2], tokens.start[-2] + 1])
    for name, others in {"token": last, "document": cut_elsewhere}.items():
        other = ActivationStore(write_store(tmp_path / name, tokens_of(others), {0: numbered(tokens)}))
        with pytest.raises(
            RlsaeError, match=rf"{name}/store/activations.zarr holds other tokens than .*/store/store/.*; dump both"
        ):
            store.check_same_tokens(other)


def test_plain_zarr_and_xarray_open_a_store_without_this_package(store, tmp_path):
    code = """if True:
        import json, sys, xarray, zarr
        group = zarr.open_group(sys.argv[1], mode="r", use_consolidated=True)
        layer = xarray.open_zarr(sys.argv[1], group="layer/1")
        rows = xarray.open_zarr(sys.argv[1], drop_variables=["start"])
        print(json.dumps({
            "zarr": {n: [str(a.dtype), list(a.metadata.dimension_names)] for n, a in group.arrays()},
            "xarray": {n: [str(a.dtype), list(a.dims)] for n, a in layer.variables.items()},
            "row": layer.acts.isel(row=17).values.tolist(),
            "rows": dict(rows.sizes),
            "attributes": dict(group.attrs),
            "uses": "rlsae" in sys.modules,
        }))
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path / "numbered" / STORE)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout)
    assert found["zarr"] == {
        **{name: ["int32", ["row"]] for name in ("token", "document", "position")},
        "start": ["int64", ["document_edge"]],
        "held_out": ["bool", ["document"]],
    }
    assert found["xarray"] == {
        "acts": ["float32", ["row", "channel"]],
        "mean": ["float64", ["channel"]],
        "second_moment": ["float64", ["channel"]],
    }
    assert found["row"] == [17.0] * 4
    assert found["rows"] == {"row": store.rows, "document": len(LENGTHS)}
    modules = {"0": "blocks.0.mlp", "1": "blocks.1.mlp"}
    assert found["attributes"] == {"schema": 1, "policy": "tiny", "hook": "mlp", "modules": modules}
    assert found["uses"] is False


def test_the_metadata_of_every_array_stand_in_one_file(store, tmp_path):
    root = json.loads((tmp_path / "numbered" / STORE / "zarr.json").read_text())
    names = set(root["consolidated_metadata"]["metadata"])
    assert {"token", "start", "held_out", "layer/0/acts", "layer/1/acts", "layer/1/mean", "layer/1/second_moment"} <= names


# --- the order of training ---------------------------------------------------------------------------------------


def test_no_row_of_a_held_out_document_is_ever_trained_on(store):
    held_out = set(np.flatnonzero(store.held_out_rows()))
    trained = {row for batch in row_numbers(store.row_order(0, 10, seed=0, epochs=3)) for row in batch}
    assert held_out
    assert not trained & held_out


def test_an_epoch_reads_a_training_row_at_most_once_and_leaves_out_less_than_a_batch_per_window(store):
    order = store.row_order(0, 10, seed=0, epochs=1)
    read = [row for batch in row_numbers(order) for row in batch]
    assert len(read) == len(set(read))
    left = int((~store.held_out_rows()).sum()) - len(read)
    assert len(order.windows) > 10
    assert 0 < left < 10 * len(order.windows)


def test_every_batch_is_full_and_there_are_as_many_as_steps(store):
    order = store.row_order(0, 10, seed=0, epochs=2)
    batches = row_numbers(order)
    assert {len(batch) for batch in batches} == {10}
    assert len(batches) == order.steps


def test_the_rows_of_a_batch_come_from_several_documents_out_of_order(store):
    document = store.group["document"][:]
    for batch in row_numbers(store.row_order(0, 10, seed=0, epochs=1)):
        assert len(set(document[batch])) > 1
        assert batch != sorted(batch)


def test_each_epoch_has_an_order_of_its_own(store):
    order = store.row_order(0, 10, seed=0, epochs=2)
    batches = row_numbers(order)
    first, second = batches[: order.steps // 2], batches[order.steps // 2 :]
    assert not {tuple(batch) for batch in first} & {tuple(batch) for batch in second}


def test_a_window_mixes_chunks_from_all_over_the_store_and_every_chunk_has_its_turn(store):
    order = store.row_order(0, 10, seed=0, epochs=1)
    chunks = -(-store.rows // order.chunk_rows)
    assert sorted(np.concatenate([window for _, window, _ in order.windows])) == list(range(chunks))
    reaches = [np.ptp(window) for _, window, _ in order.windows if len(window) == 4]
    assert np.mean(reaches) > chunks / 3


def test_the_rows_of_one_window_come_in_another_order_in_every_epoch(store, monkeypatch):
    monkeypatch.setattr(module, "WINDOW_CHUNKS", 10_000)
    order = store.row_order(0, 10, seed=0, epochs=2)
    batches = row_numbers(order)
    assert batches[: order.steps // 2] != batches[order.steps // 2 :]


def test_stores_of_the_same_tokens_are_read_in_the_same_order(store, small_chunks, tokens, tmp_path):
    shifted = ActivationStore(write_store(tmp_path / "tuned", tokens, {0: numbered(tokens, 0.25)}))
    expected = row_numbers(store.row_order(0, 10, seed=0, epochs=2))
    assert row_numbers(shifted.row_order(0, 10, seed=0, epochs=2)) == expected
    assert row_numbers(store.row_order(1, 10, seed=0, epochs=2)) == expected


def test_the_order_depends_on_the_seed_and_on_nothing_that_happened_before(store):
    expected = row_numbers(store.row_order(0, 10, seed=0, epochs=1))
    np.random.seed(5)
    assert row_numbers(store.row_order(0, 10, seed=0, epochs=1)) == expected
    assert row_numbers(store.row_order(0, 10, seed=1, epochs=1)) != expected


def test_the_first_epoch_is_the_same_however_many_follow(store):
    one = row_numbers(store.row_order(0, 10, seed=0, epochs=1))
    assert row_numbers(store.row_order(0, 10, seed=0, epochs=3))[: len(one)] == one


def test_an_order_goes_on_exactly_from_any_step(store):
    order = store.row_order(0, 10, seed=0, epochs=2)
    whole = row_numbers(order)
    for step in range(order.steps + 1):
        assert row_numbers(order, step) == whole[step:]


@pytest.fixture
def chunks_read(store, monkeypatch):
    """The numbers of the chunks that were read, in order."""
    read, original = [], store.read_chunk
    monkeypatch.setattr(
        store, "read_chunk", lambda layer, chunk, out: read.append(chunk) or original(layer, chunk, out), raising=True
    )
    return read


def test_what_was_trained_on_before_is_not_read_again(store, chunks_read):
    order = store.row_order(0, 10, seed=0, epochs=1)
    list(order.batches(order.steps - 1))
    assert sorted(chunks_read) == next(sorted(window.tolist()) for _, window, batches in reversed(order.windows) if batches)


def test_a_layer_that_fits_into_memory_is_read_once(store, chunks_read):
    list(store.row_order(0, 10, seed=0, epochs=3).batches())
    assert sorted(chunks_read) == list(range(-(-store.rows // 8)))


def test_a_layer_that_does_not_fit_is_read_in_every_epoch_and_gives_the_same_batches(store, chunks_read, monkeypatch):
    resident = row_numbers(store.row_order(0, 10, seed=0, epochs=3))
    chunks_read.clear()
    monkeypatch.setattr(module, "RESIDENT_BYTES", 0)
    assert row_numbers(store.row_order(0, 10, seed=0, epochs=3)) == resident
    assert len(chunks_read) == 3 * -(-store.rows // 8)


def test_rows_that_do_not_fill_one_batch_are_refused_with_the_key_and_the_number(store):
    rows = int((~store.held_out_rows()).sum())
    with pytest.raises(RlsaeError, match=rf"batch_rows: 33 rows per step, .* its {rows} training rows; lower it"):
        store.row_order(0, 33, seed=0, epochs=9)
