"""What the stages store is plain Zarr v3: other readers find the same numbers, names and attributes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray

from rlsae.activations import extract, store
from rlsae.activations.store import STORE, ActivationStore, Geometry
from rlsae.artifacts import MANIFEST, digest
from rlsae.config import Activation
from tests.unit.small_artifacts import dump, random_documents, tokens_of, write_policy, write_tokens

LENGTHS = [12, 1, 30, 7, 3, 22, 64, 2, 9, 17, 5, 40, 1, 28, 11, 6, 33]
ROWS, CHANNELS, ROWS_PER_PART = sum(LENGTHS), 32, 128
ARRAYS = {
    "token": ("int32", ["row"]),
    "document": ("int32", ["row"]),
    "position": ("int32", ["row"]),
    "start": ("int64", ["document_edge"]),
    "held_out": ("bool", ["document"]),
    **{f"layer/{layer}/acts": ("float16", ["row", "channel"]) for layer in range(2)},
    **{f"layer/{layer}/{name}": ("float64", ["channel"]) for layer in range(2) for name in ("mean", "second_moment")},
}
"""Type and dimensions of every array of a store of two layers."""
READ = """
import json, sys
import numpy, zarr
path, out = sys.argv[1:]
group = zarr.open_group(path, mode="r", use_consolidated=True)
arrays = {name: node for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
numpy.savez(out, **{name: array[:] for name, array in arrays.items()})
print(json.dumps({
    "arrays": {name: [str(array.dtype), list(array.metadata.dimension_names)] for name, array in arrays.items()},
    "attributes": dict(group.attrs),
    "shards": {name: layer.attrs["shards"] for name, layer in group["layer"].groups()},
    "uses rlsae": "rlsae" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory, random_model, tokenizer):
    return write_policy(tmp_path_factory.mktemp("results") / "models/tiny", random_model("gpt_neox"), tokenizer)


@pytest.fixture(scope="module")
def tokens(policy):
    return write_tokens(policy.parents[1] / "tokens/tiny.random", tokens_of(random_documents(LENGTHS)))


@pytest.fixture(scope="module")
def stored(policy, tokens):
    """Function of a codec: the artifact that the stages make, with shards of 128 rows in chunks of 16."""

    def artifact(codec):
        out = policy.parents[1] / f"activations/tiny.random/{codec}"
        if not out.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RLSAE_DEVICE", "cpu")
                patch.setattr(store, "CHUNK_BYTES", 16 * CHANNELS * 2)
                patch.setattr(extract, "BATCH_TOKENS", 96)
                dump(out, policy, tokens, codec=codec, rows_per_part=ROWS_PER_PART)
        acts = ActivationStore(out).acts(0)
        assert (acts.shape, acts.chunks, acts.shards) == ((ROWS, CHANNELS), (16, CHANNELS), (ROWS_PER_PART, CHANNELS))
        return out

    return artifact


@pytest.fixture(scope="module")
def acts(random_model, tokens):
    """Rows of both layers by plain hooks, one document at a time."""
    model, kept = random_model("gpt_neox"), {0: [], 1: []}
    for layer, block in enumerate(model.gpt_neox.layers):
        block.mlp.register_forward_hook(lambda module, given, output, rows=kept[layer]: rows.append(output[0]))
    with torch.no_grad():
        for ids in random_documents(LENGTHS):
            model(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
    return {layer: torch.cat(rows).numpy() for layer, rows in kept.items()}


def assert_rows(found_ND, expected_ND):
    assert np.abs(expected_ND).max() > 0.1
    np.testing.assert_allclose(found_ND.astype(np.float32), expected_ND, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_plain_zarr_in_another_process_reads_numbers_names_and_attributes(stored, policy, tokens, acts, tmp_path, codec):
    artifact = stored(codec)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-W", "error", "-c", READ, str(artifact / STORE), str(tmp_path / "read.npz")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, values = json.loads(done.stdout), np.load(tmp_path / "read.npz")
    assert found["uses rlsae"] is False
    assert found["arrays"] == {name: list(facts) for name, facts in ARRAYS.items()}
    assert found["attributes"] == {
        "schema": 1,
        "policy": "tiny",
        "inputs": {"models/tiny": digest(policy / MANIFEST), "tokens/tiny.random": digest(tokens / MANIFEST)},
        "hook": "mlp",
        "precision": "float32",
        "modules": {str(layer): f"gpt_neox.layers.{layer}.mlp" for layer in range(2)},
    }
    documents = random_documents(LENGTHS)
    assert values["token"].tolist() == np.concatenate(documents).tolist()
    assert values["document"].tolist() == np.repeat(np.arange(len(LENGTHS)), LENGTHS).tolist()
    assert values["position"].tolist() == [position for length in LENGTHS for position in range(length)]
    assert values["start"].tolist() == [0, *np.cumsum(LENGTHS).tolist()]
    assert values["held_out"].tolist() == [document % 4 == 3 for document in range(len(LENGTHS))]
    for layer in range(2):
        assert_rows(values[f"layer/{layer}/acts"], acts[layer])
        rows = values[f"layer/{layer}/acts"].astype(np.float64)
        np.testing.assert_allclose(values[f"layer/{layer}/mean"], rows.mean(0))
        np.testing.assert_allclose(values[f"layer/{layer}/second_moment"], (rows**2).mean(0))
        files = [artifact / STORE / f"layer/{layer}/acts/c/{number}/0" for number in range(3)]
        edges = [0, 128, 256, ROWS]
        assert found["shards"][str(layer)] == [
            {"rows": edges[number : number + 2], "bytes": file.stat().st_size, "digest": digest(file)}
            for number, file in enumerate(files)
        ]


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_tensorstore_reads_every_array(stored, acts, codec):
    tensorstore = pytest.importorskip("tensorstore")
    group = ActivationStore(stored(codec)).group
    for name, (dtype, dimensions) in ARRAYS.items():
        kvstore = {"driver": "file", "path": str(stored(codec) / STORE / name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()
        assert (array.dtype.name, list(array.domain.labels)) == (dtype, dimensions)
        assert np.array_equal(array.read().result(), group[name][:])
    for layer in range(2):
        kvstore = {"driver": "file", "path": str(stored(codec) / STORE / f"layer/{layer}/acts")}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()
        assert_rows(array[100:140].read().result(), acts[layer][100:140])


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("layer", [0, 1])
def test_xarray_opens_a_layer_lazily_with_named_dimensions(stored, acts, codec, layer):
    with xarray.open_zarr(stored(codec) / STORE, group=f"layer/{layer}", consolidated=True) as opened:
        assert dict(opened.sizes) == {"row": ROWS, "channel": CHANNELS}
        assert opened.acts.dims == ("row", "channel")
        some = opened.acts.isel(row=slice(100, 140))
        assert not opened.acts.variable._in_memory
        assert not some.variable._in_memory
        assert_rows(some.values, acts[layer][100:140])


def test_a_store_of_a_hundred_gigabytes_is_less_than_a_thousand_shards():
    channels, itemsize, rows_per_part = 512, 2, Activation().rows_per_part
    rows = 100 * 10**9 // (channels * itemsize)
    geometry = Geometry.of(channels, itemsize, rows_per_part)
    parts = [min(rows_per_part, rows - first) for first in range(0, rows, rows_per_part)]
    assert 100 < sum(-(-part // geometry.shard_rows) for part in parts) < 1000
