"""Stores that are damaged, dumps that cannot be made, and the choices of a dump: codec, module, precision."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import zarr
from small_artifacts import DUMP, dump, random_documents, rows_of, tokens_of, write_policy, write_store, write_tokens

from rlsae.activations import extract
from rlsae.activations import store as module
from rlsae.activations.extract import consolidate, extract_part
from rlsae.activations.store import STORE, ActivationStore, shard_file
from rlsae.activations.tokens import Tokens
from rlsae.artifacts import digest
from rlsae.config import Activation
from rlsae.errors import RlsaeError
from rlsae.resumable import OUTPUTS

LENGTHS = [12, 1, 30, 7, 3, 22, 64, 2, 9, 17, 5, 40, 1, 28, 11, 6, 33]
CODECS = [name for kind in get_args(Activation.model_fields["codec"].annotation) for name in get_args(kind)]


@pytest.fixture(autouse=True)
def on_the_cpu_in_small_batches(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")
    monkeypatch.setattr(extract, "BATCH_TOKENS", 96)


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path / "tokens/tiny.random", tokens_of(random_documents(LENGTHS)))


@pytest.fixture
def policy(random_model, tokenizer, tmp_path):
    return write_policy(tmp_path / "models/tiny", random_model("gpt_neox"), tokenizer)


@torch.no_grad()
def hooked(model, tokens, path):
    """Rows of one module by a plain hook, one document at a time."""
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, given, output: kept.append(output[0]))
    for document in range(len(tokens.held_out)):
        model(input_ids=torch.from_numpy(tokens.ids(document).astype(np.int64))[None])
    handle.remove()
    return torch.cat(kept).numpy()


# --- damage ------------------------------------------------------------------------------------------------------

CHUNK_ROWS, SHARD_ROWS = 8, 32


@pytest.fixture
def artifact(monkeypatch, tmp_path):
    """A store of layers 0 and 3 whose shards of 32 rows hold four chunks."""
    monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK_ROWS * 16)
    monkeypatch.setattr(module, "SHARD_BYTES", SHARD_ROWS * 16)
    tokens = tokens_of(random_documents(LENGTHS))
    rows_ND = np.random.default_rng(0).normal(size=(sum(LENGTHS), 4)).astype(np.float32)
    return write_store(tmp_path / "damaged", tokens, {0: rows_ND, 3: -rows_ND})


def shard(artifact, layer, number):
    path = artifact / STORE
    return shard_file(path, zarr.open_group(path)[f"layer/{layer}/acts"], layer, number * SHARD_ROWS)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "rows"),
    [(5, "64 to 71"), (CHUNK_ROWS * 16 + 30, "72 to 79"), (-10, "64 to 71")],
    ids=["first chunk", "second chunk", "index"],
)
def test_a_flipped_bit_is_refused_where_it_is_read_with_layer_and_rows(artifact, place, rows):
    flip(shard(artifact, 3, 2), place)
    store = ActivationStore(artifact)
    with pytest.raises(RlsaeError, match=rf"layer 3, rows {rows} of .* are damaged: .*checksum"):
        store.read(3, 64, 96)
    assert store.read(0, 64, 96).shape == (32, 4)
    assert np.array_equal(store.read(3, 32, 64), -store.read(0, 32, 64))


def test_a_flipped_bit_harms_its_own_chunk_alone(artifact):
    flip(shard(artifact, 3, 2), CHUNK_ROWS * 16 + 30)
    store = ActivationStore(artifact)
    assert np.array_equal(store.read(3, 64, 72), -store.read(0, 64, 72))
    with pytest.raises(RlsaeError, match="rows 72 to 79"):
        store.read(3, 72, 80)
    assert np.array_equal(store.read(3, 80, 96), -store.read(0, 80, 96))


def test_training_stops_at_a_flipped_bit_with_layer_and_rows(artifact):
    flip(shard(artifact, 3, 2), CHUNK_ROWS * 16 + 30)
    store = ActivationStore(artifact)
    assert sum(1 for _ in store.row_order(0, 16, seed=0, epochs=1).batches()) > 1
    with pytest.raises(RlsaeError, match=r"layer 3, rows 72 to 79 of .* are damaged"):
        list(store.row_order(3, 16, seed=0, epochs=1).batches())


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "has another size than when it was written"),
        (lambda path: path.write_bytes(b""), "has another size than when it was written"),
    ],
    ids=["deleted", "cut off", "empty"],
)
@pytest.mark.parametrize(("number", "rows"), [(1, "32 to 63"), (9, "288 to 290")])
def test_a_shard_that_is_missing_or_cut_off_is_refused_when_the_store_is_opened(artifact, damage, state, number, rows):
    path = shard(artifact, 3, number)
    damage(path)
    with pytest.raises(RlsaeError, match=rf"layer 3, rows {rows} of .* are damaged: {re.escape(str(path))} {state}; delete"):
        ActivationStore(artifact)


# --- codecs, modules, precision ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
@pytest.mark.parametrize("codec", CODECS)
def test_rows_come_back_from_every_codec(policy, tokens, tmp_path, codec):
    plain, packed = dump(tmp_path / "plain", policy, tokens), dump(tmp_path / codec, policy, tokens, codec=codec)
    for layer in range(2):
        assert np.array_equal(rows_of(packed, layer), rows_of(plain, layer))
        files = [[f.stat().st_size for f in a.rglob(f"{layer}/acts/c/*/0")] for a in (packed, plain)]
        assert len(files[0]) == len(files[1]) == 5
        assert sum(files[0]) != sum(files[1])


@pytest.mark.parametrize(("hook", "channels"), [("mlp.act", 48), ("mlp.dense_h_to_4h", 48), ("input_layernorm", 32)])
def test_the_module_at_a_path_inside_each_block_is_stored(policy, tokens, tmp_path, random_model, hook, channels):
    out = dump(tmp_path / "a", policy, tokens, hook=hook, dtype="float32")
    for layer in range(2):
        path = f"gpt_neox.layers.{layer}.{hook}"
        assert rows_of(out, layer).shape == (sum(LENGTHS), channels)
        np.testing.assert_allclose(
            rows_of(out, layer), hooked(random_model("gpt_neox"), Tokens.open(tokens), path), rtol=1e-4, atol=1e-5
        )
        assert ActivationStore(out).group.attrs["modules"][str(layer)] == path


def test_a_path_that_no_block_has_is_refused_with_those_it_has(policy, tokens, tmp_path):
    with pytest.raises(RlsaeError, match=r"GPTNeoXLayer has no module 'mlp.gate'; it has: .*mlp\.dense_h_to_4h.*mlp\.act"):
        dump(tmp_path / "a", policy, tokens, hook="mlp.gate")
    assert not (tmp_path / "a").exists()


def test_the_forward_pass_is_in_float32_unless_asked_otherwise():
    assert Activation().precision == "float32"


def test_a_forward_pass_in_bfloat16_changes_only_late_digits(policy, tokens, tmp_path):
    exact = dump(tmp_path / "float32", policy, tokens, dtype="float32")
    rough = dump(tmp_path / "bfloat16", policy, tokens, dtype="float32", precision="bfloat16")
    assert [ActivationStore(a).group.attrs["precision"] for a in (exact, rough)] == ["float32", "bfloat16"]
    for layer in range(2):
        exact_ND, rough_ND = rows_of(exact, layer), rows_of(rough, layer)
        error = np.linalg.norm(rough_ND - exact_ND) / np.linalg.norm(exact_ND)
        assert 1e-4 < error < 3e-2
        assert np.array_equal(torch.from_numpy(rough_ND).bfloat16().float().numpy(), rough_ND)


# --- dumps that cannot be made -----------------------------------------------------------------------------------


def test_tokens_of_a_larger_vocabulary_are_refused_before_anything_is_written(policy, tokenizer, tmp_path):
    other = write_tokens(tmp_path / "tokens/other", tokens_of(random_documents(LENGTHS, vocabulary=5 * len(tokenizer))))
    largest = Tokens.open(other).largest
    with pytest.raises(RlsaeError, match=rf"tokens go up to id {largest}, the model embeds {len(tokenizer)}: .*another model"):
        dump(tmp_path / "a", policy, other)
    assert not (tmp_path / ".a.parts").exists()


def test_too_little_room_on_the_disk_is_refused_before_anything_is_written(policy, tokens, tmp_path, monkeypatch):
    needed = sum(LENGTHS) * 32 * 2 * 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
        with pytest.raises(RlsaeError, match=r"the store needs 0.00 GB, .* has 0.00 GB free; lower `rows`"):
            dump(tmp_path / "a", policy, tokens)
    assert not (tmp_path / ".a.parts" / OUTPUTS).exists()
    assert not (tmp_path / "part-0.json").exists()
    assert ActivationStore(dump(tmp_path / "a", policy, tokens)).rows == sum(LENGTHS)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_in_the_middle_of_a_shard_leaves_no_shard_that_counts_as_done(policy, tmp_path, small_disk):
    tokens = write_tokens(tmp_path / "tokens/long", tokens_of(random_documents([64] * 64)))
    settings = DUMP | {"rows_per_part": 1024, "dtype": "float32"}
    shard_bytes = 1024 * 32 * 4
    work, inputs = small_disk / "work", (policy, policy / "model", tokens)
    stamps = [tmp_path / f"stamps/part-{part}.json" for part in range(2)]
    whole = dump(tmp_path / "whole", policy, tokens, **settings)

    with pytest.raises(RlsaeError, match=r"the disk of .* has 0.00 GB free"):
        extract_part(settings, 0, stamps[0], work, *inputs)
    settings |= {"rows": 2048}
    extract_part(settings, 0, stamps[0], work, *inputs)
    ballast = small_disk / "ballast"
    # Room for the shard of layer 0 and for half of that of layer 1.
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - shard_bytes * 3 // 2))
    with pytest.raises(OSError, match="No space left on device"):
        extract_part(settings, 1, stamps[1], work, *inputs)
    assert [path.name for path in (work / "done").iterdir()] == ["0"]
    assert [stamp.exists() for stamp in stamps] == [True, False]
    with pytest.raises(RlsaeError, match="layer 0: the shard from row 1024 on is missing or damaged"):
        consolidate(settings, tmp_path / "out", work, policy, tokens, stamps)

    ballast.unlink()
    extract_part(settings, 1, stamps[1], work, *inputs)
    for layer in range(2):
        names = [work / OUTPUTS / STORE / f"layer/{layer}/acts/c/{number}" for number in range(2)]
        kept = [whole / STORE / f"layer/{layer}/acts/c/{number}" for number in range(2)]
        assert [digest(name) for name in names] == [digest(name) for name in kept]
