"""The shard files of an uncompressed layer, read and written without the copies that a general library makes.

A shard is a row of chunks, each followed by its crc32c; then an index, for each chunk where it begins and how long it is (two
uint64, all ones for a chunk behind the end of the array); then the crc32c of the index. That is the codec `sharding_indexed`
of the Zarr v3 specification (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed), and byte for byte what
zarr writes. Shapes: N rows, D channels.
"""

from __future__ import annotations

from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

ABSENT = 2**64 - 1
CHECKSUM_BYTES = 4


def are_plain(array: zarr.Array) -> bool:
    """Whether an array's shards are of this form: nothing is compressed."""
    (sharding,) = array.metadata.codecs
    return isinstance(sharding, ShardingCodec) and list(map(type, sharding.codecs)) == [BytesCodec, Crc32cCodec]


def write(file: Path, rows_ND: NDArray[Any], chunk_rows: int, chunks: int) -> None:
    """Write the rows of a shard that has room for `chunks` chunks; the last one is filled up with zeros."""
    file.parent.mkdir(parents=True, exist_ok=True)
    size = chunk_rows * rows_ND[:1].nbytes + CHECKSUM_BYTES
    index = np.full((chunks, 2), ABSENT, "<u8")
    try:
        with file.open("wb") as out:
            for number, first in enumerate(range(0, len(rows_ND), chunk_rows)):
                chunk_ND = rows_ND[first : first + chunk_rows]
                if len(chunk_ND) < chunk_rows:
                    chunk_ND = np.pad(chunk_ND, [(0, chunk_rows - len(chunk_ND)), (0, 0)])
                out.write(chunk_ND.data)
                out.write(checksum(chunk_ND))
                index[number] = number * size, size
            out.write(index.data)
            out.write(checksum(index))
    except OSError:
        file.unlink(missing_ok=True)  # what does not fit must not fill the disk either
        raise


def read_chunk(file: Path, number: int, chunks: int, out_ND: NDArray[Any]) -> None:
    """Fill `out_ND` with a whole chunk of a shard.

    Raises:
        ValueError: a checksum does not hold, or the shard does not hold that chunk.
    """
    with file.open("rb", buffering=0) as shard:
        index = np.empty((chunks, 2), "<u8")
        shard.seek(-index.nbytes - CHECKSUM_BYTES, 2)
        _fill(shard, index, "index")
        offset, size = index[number].tolist()
        if size != out_ND.nbytes + CHECKSUM_BYTES:
            raise ValueError(f"the shard says that its chunk {number} has {size} bytes")
        shard.seek(offset)
        _fill(shard, out_ND, f"chunk {number}")


def _fill(shard: FileIO, values: NDArray[Any], what: str) -> None:
    """Read an array and the checksum behind it."""
    if shard.readinto(values.data.cast("B")) != values.nbytes or shard.read(CHECKSUM_BYTES) != checksum(values):
        raise ValueError(f"the checksum of its {what} does not hold")


def checksum(values: NDArray[Any]) -> bytes:
    """crc32c of an array's bytes, little-endian."""
    view = values.view()
    view.flags.writeable = False  # the library takes nothing that could change under it
    return int(google_crc32c.value(view)).to_bytes(CHECKSUM_BYTES, "little")
