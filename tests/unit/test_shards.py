"""Shard files: byte for byte what zarr writes, and every damage is noticed."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from rlsae.activations import shards
from rlsae.activations.tokens import WHOLE

CHUNK_ROWS, CHUNKS, CHANNELS = 4, 3, 5


@pytest.fixture(params=["float16", "float32"])
def array(request, tmp_path):
    """Function of a number of rows: an array that zarr wrote, with its values."""

    def written(rows):
        values = np.random.default_rng(0).standard_normal((rows, CHANNELS)).astype(request.param)
        made = zarr.create_array(
            tmp_path / "by-zarr",
            shape=values.shape,
            chunks=(CHUNK_ROWS, CHANNELS),
            shards=(CHUNKS * CHUNK_ROWS, CHANNELS),
            dtype=values.dtype,
            compressors=Crc32cCodec(),
            config=WHOLE,
        )
        made[:] = values
        return made, values

    return written


@pytest.fixture
def shard(tmp_path):
    """A shard of ten rows and its values."""
    values = np.arange(10 * CHANNELS, dtype=np.float32).reshape(10, CHANNELS)
    shards.write(tmp_path / "c/0/0", values, CHUNK_ROWS, CHUNKS)
    return tmp_path / "c/0/0", values


@pytest.mark.parametrize("rows", [1, 4, 7, 12])
def test_a_shard_is_byte_for_byte_what_zarr_writes(array, tmp_path, rows):
    _, values = array(rows)
    shards.write(tmp_path / "ours", values, CHUNK_ROWS, CHUNKS)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "by-zarr/c/0/0").read_bytes()


def test_chunks_that_zarr_wrote_are_read(array, tmp_path):
    _, values = array(24)
    for number in range(6):
        out = np.empty((CHUNK_ROWS, CHANNELS), values.dtype)
        shards.read_chunk(tmp_path / f"by-zarr/c/{number // CHUNKS}/0", number % CHUNKS, CHUNKS, out)
        assert np.array_equal(out, values[number * CHUNK_ROWS : (number + 1) * CHUNK_ROWS])


def test_a_chunk_that_is_not_full_is_filled_up_with_zeros(shard):
    file, values = shard
    out = np.empty((CHUNK_ROWS, CHANNELS), np.float32)
    shards.read_chunk(file, 2, CHUNKS, out)
    assert np.array_equal(out, np.concatenate([values[8:], np.zeros((2, CHANNELS))]))


def test_a_chunk_behind_the_end_is_refused(tmp_path):
    shards.write(tmp_path / "short", np.ones((4, CHANNELS), np.float32), CHUNK_ROWS, CHUNKS)
    with pytest.raises(ValueError, match="the shard says that its chunk 1 has"):
        shards.read_chunk(tmp_path / "short", 1, CHUNKS, np.empty((CHUNK_ROWS, CHANNELS), np.float32))


@pytest.mark.parametrize("what", ["index", "chunk 1"])
def test_a_flipped_bit_is_noticed_where_it_is(shard, what):
    file, values = shard
    content = bytearray(file.read_bytes())
    content[-10 if what == "index" else values[:CHUNK_ROWS].nbytes + 10] ^= 1
    file.write_bytes(content)
    out = np.empty((CHUNK_ROWS, CHANNELS), np.float32)
    with pytest.raises(ValueError, match=f"the checksum of its {what} does not hold"):
        shards.read_chunk(file, 1, CHUNKS, out)
    if what != "index":
        shards.read_chunk(file, 0, CHUNKS, out)
        assert np.array_equal(out, values[:CHUNK_ROWS])


@pytest.mark.parametrize("kept", [0, 3, 30, -1])
def test_a_cut_shard_is_refused(shard, kept):
    file, _ = shard
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises((ValueError, OSError)):
        shards.read_chunk(file, 0, CHUNKS, np.empty((CHUNK_ROWS, CHANNELS), np.float32))


@pytest.mark.parametrize(("codec", "plain"), [(None, True), ("zstd", False), ("blosc", False)])
def test_compressed_arrays_are_left_to_zarr(tmp_path, codec, plain):
    from rlsae.activations.store import compressor

    made = zarr.create_array(
        tmp_path / "array",
        shape=(8, CHANNELS),
        chunks=(CHUNK_ROWS, CHANNELS),
        shards=(8, CHANNELS),
        dtype="float32",
        compressors=[*compressor(codec, 4), Crc32cCodec()],
    )
    assert shards.are_plain(made) is plain
