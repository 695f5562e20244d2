"""The activation store: one Zarr v3 group that opens in any Zarr reader, and the row order that training reads it in.

    activations.zarr/            attributes: schema, stage settings, module path of each hook
      token, document, position  int32 [row]
      start                      int64 [document + 1]      row range of each document
      held_out                   bool [document]           documents that train nothing
      layer/{n}                  attributes: rows, bytes and digest of each shard
      layer/{n}/acts             float16 [row, channel]
      layer/{n}/mean, second_moment   float64 [channel]

Every chunk carries a checksum (crc32c), so that damage is noticed where it is read; a missing or cut file is noticed when
the store is opened, which plain Zarr would read as zeros.

Shapes: B rows of a batch, D channels.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from rlsae.activations.tokens import VECTOR_CHUNK, WHOLE, Tokens, write_vector
from rlsae.artifacts import digest
from rlsae.errors import RlsaeError

STORE = "store/activations.zarr"
CHUNK_BYTES = 4 << 20
SHARD_BYTES = 128 << 20
WINDOW_CHUNKS = 16
"""Chunks that are held in memory and shuffled together."""
READERS = 2
"""Chunks that are read at once."""


@dataclass(frozen=True)
class Geometry:
    """Rows per chunk and per shard: powers of two that divide the rows of a part, so that no shard crosses two parts."""

    chunk_rows: int
    shard_rows: int

    @classmethod
    def of(cls, channels: int, itemsize: int, rows_per_part: int) -> Geometry:
        def largest(limit: int, multiple: int = 1) -> int:
            rows = multiple
            while 2 * rows <= limit and rows_per_part % (2 * rows) == 0:
                rows *= 2
            return rows

        chunk_rows = largest(CHUNK_BYTES // (channels * itemsize))
        return cls(chunk_rows, largest(SHARD_BYTES // (channels * itemsize), multiple=chunk_rows))


class ActivationStore:
    """Read access to a finished store.

    Args:
        artifact: folder that holds `store/activations.zarr`.

    Raises:
        RlsaeError: there is no store, or a shard of it is missing or has another size: names layer and rows.
    """

    def __init__(self, artifact: Path) -> None:
        self.path = artifact / STORE
        if not self.path.exists():
            raise RlsaeError(f"{artifact} holds no activation store; run the activations stage")
        self.group = zarr.open_group(self.path, mode="r")
        for name, array in self.group.arrays():
            if array.nchunks_initialized != array.nchunks:
                raise RlsaeError(
                    f"{self.path}: chunks of {name} are missing; delete the store and run the activations stage again"
                )
        self.start: NDArray[np.int64] = self.group["start"][:]
        self.held_out: NDArray[np.bool_] = self.group["held_out"][:]
        self.layers = sorted(int(name) for name in self.group["layer"].group_keys())
        for layer in self.layers:
            for shard in self.shards(layer):
                first, stop = shard["rows"]
                file = shard_file(self.path, self.acts(layer), layer, first)
                if not file.exists() or file.stat().st_size != shard["bytes"]:
                    state = "is missing" if not file.exists() else "has another size than when it was written"
                    raise self._damaged(layer, first, stop, f"{file} {state}")

    @property
    def rows(self) -> int:
        return int(self.start[-1])

    def acts(self, layer: int) -> zarr.Array:
        """The lazy array of one layer [row, channel].

        Raises:
            RlsaeError: the store does not hold that layer.
        """
        if layer not in self.layers:
            raise RlsaeError(f"layer {layer} is not in this store; it holds {self.layers}")
        return self.group[f"layer/{layer}/acts"]

    def shards(self, layer: int) -> list[dict[str, Any]]:
        """`rows` [first, stop], `bytes` and `digest` of each file of a layer."""
        return list(self.group[f"layer/{layer}"].attrs["shards"])

    def read(self, layer: int, first: int, stop: int) -> NDArray[Any]:
        """Rows [row, channel] of one layer, in the stored format.

        Raises:
            RlsaeError: a checksum does not hold: names layer and rows.
        """
        try:
            return np.asarray(self.acts(layer)[first:stop])
        except (ValueError, RuntimeError, OSError) as error:
            raise self._damaged(layer, first, min(stop, self.rows), str(error)) from None

    def _damaged(self, layer: int, first: int, stop: int, why: str) -> RlsaeError:
        return RlsaeError(
            f"layer {layer}, rows {first} to {stop - 1} of {self.path} are damaged: {why}; delete the store and run the "
            "activations stage again"
        )

    def statistics(self, layer: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and mean square of each channel over all rows."""
        self.acts(layer)
        return self.group[f"layer/{layer}/mean"][:], self.group[f"layer/{layer}/second_moment"][:]

    def held_out_rows(self) -> NDArray[np.bool_]:
        """Whether each row belongs to a held-out document."""
        return np.repeat(self.held_out, np.diff(self.start))

    def row_order(self, layer: int, batch_rows: int, seed: int, epochs: int) -> RowOrder:
        """The order in which training reads the rows; equal for every store of the same tokens and geometry."""
        return RowOrder(self, layer, batch_rows, seed, epochs)


class RowOrder:
    """Batches of shuffled training rows, read in whole chunks.

    Each epoch permutes the chunks, takes them in windows of `WINDOW_CHUNKS`, and permutes the rows of a window in memory. A
    window's last rows that do not fill a batch are left out of that epoch.

    Raises:
        RlsaeError: the rows do not fill one batch.
    """

    def __init__(self, store: ActivationStore, layer: int, batch_rows: int, seed: int, epochs: int) -> None:
        self.store, self.layer, self.batch_rows, self.seed = store, layer, batch_rows, seed
        self.train = ~store.held_out_rows()
        self.shape, self.dtype = store.acts(layer).shape, store.acts(layer).dtype
        self.chunk_rows = store.acts(layer).chunks[0]
        chunks = -(-self.shape[0] // self.chunk_rows)
        per_chunk = np.add.reduceat(self.train, np.arange(0, len(self.train), self.chunk_rows), dtype=np.int64)
        self.windows: list[tuple[int, NDArray[np.int64], int]] = []
        """(epoch, chunks, batches) in the order of training."""
        for epoch in range(epochs):
            order = np.random.default_rng([seed, epoch]).permutation(chunks)
            for first in range(0, chunks, WINDOW_CHUNKS):
                window = order[first : first + WINDOW_CHUNKS]
                self.windows.append((epoch, window, int(per_chunk[window].sum()) // batch_rows))
        self.steps = sum(batches for _, _, batches in self.windows)
        if not self.steps:
            raise RlsaeError(
                f"batch_rows: {batch_rows} rows per step, but no window of the store has so many of its "
                f"{int(self.train.sum())} training rows; lower it or store more rows"
            )

    def batches(self, from_step: int = 0) -> Iterator[NDArray[Any]]:
        """Rows acts_BD of each step, in the store's dtype; `from_step` skips without reading."""
        step = 0
        window_ND = np.empty((min(WINDOW_CHUNKS * self.chunk_rows, self.shape[0] + self.chunk_rows), self.shape[1]), self.dtype)
        with ThreadPoolExecutor(READERS) as readers:
            for number, (_, window, batches) in enumerate(self.windows):
                if step + batches <= from_step:
                    step += batches
                    continue
                rows = self._read(window, window_ND, readers)
                order = rows[np.random.default_rng([self.seed, number, 1]).permutation(len(rows))]
                for batch in range(max(0, from_step - step), batches):
                    yield window_ND.take(order[batch * self.batch_rows : (batch + 1) * self.batch_rows], axis=0)
                step += batches

    def _read(self, window: NDArray[np.int64], window_ND: NDArray[Any], readers: ThreadPoolExecutor) -> NDArray[np.int64]:
        """Fill `window_ND` with some chunks, one after the other; returns where its training rows stand."""

        def read(place: int, chunk: int) -> NDArray[np.int64]:
            first, stop = chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, len(self.train))
            target = place * self.chunk_rows
            window_ND[target : target + stop - first] = self.store.read(self.layer, first, stop)
            return target + np.flatnonzero(self.train[first:stop])

        return np.concatenate(list(readers.map(read, range(len(window)), np.sort(window).tolist())))


def shard_file(path: Path, array: zarr.Array, layer: int, first: int) -> Path:
    """The file of the shard that starts at row `first`."""
    return path / f"layer/{layer}/acts/c/{first // array.shards[0]}/0"


# --- writing -----------------------------------------------------------------------------------------------------


def create(
    path: Path,
    tokens: Tokens,
    rows: int,
    layers: list[int],
    channels: int,
    dtype: str,
    rows_per_part: int,
    codec: str | None,
    **attributes: Any,
) -> None:
    """Lay out an empty store for the first `rows` rows of a tokenised corpus."""
    row_start = tokens.row_start()
    documents = int(np.searchsorted(row_start, rows))
    start = np.minimum(row_start[: documents + 1], rows)
    group = zarr.create_group(path, overwrite=True, attributes={"schema": 1, **attributes})
    per_row = {
        name: group.create_array(
            name,
            shape=(rows,),
            chunks=(min(rows, VECTOR_CHUNK),),
            dtype="int32",
            compressors=Crc32cCodec(),
            dimension_names=["row"],
            config=WHOLE,
        )
        for name in ("token", "document", "position")
    }
    for first in range(0, rows, VECTOR_CHUNK):
        number = np.arange(first, min(first + VECTOR_CHUNK, rows))
        document = np.searchsorted(start, number, "right") - 1
        position = number - start[document] + tokens.drop_positions
        source = tokens.start[document] + position
        per_row["token"][first : first + len(number)] = tokens.token[source[0] : source[-1] + 1][source - source[0]]
        per_row["document"][first : first + len(number)] = document.astype(np.int32)
        per_row["position"][first : first + len(number)] = position.astype(np.int32)
    write_vector(group, "start", start, "document_edge")
    write_vector(group, "held_out", tokens.held_out[:documents], "document")
    geometry = Geometry.of(channels, np.dtype(dtype).itemsize, rows_per_part)
    for layer in layers:
        group.create_array(
            f"layer/{layer}/acts",
            shape=(rows, channels),
            chunks=(geometry.chunk_rows, channels),
            shards=(geometry.shard_rows, channels),
            dtype=dtype,
            compressors=[*compressor(codec, np.dtype(dtype).itemsize), Crc32cCodec()],
            dimension_names=["row", "channel"],
            config=WHOLE,
        )


def compressor(codec: str | None, itemsize: int) -> list[dict[str, Any]]:
    """A codec of numcodecs as Zarr v3 writes it down; those of its specification by their own names, as any reader knows."""
    if codec is None:
        return []
    blosc = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": itemsize, "blocksize": 0}
    of_the_specification = {"zstd": {"level": 1, "checksum": False}, "gzip": {"level": 1}, "blosc": blosc}
    if codec in of_the_specification:
        return [{"name": codec, "configuration": of_the_specification[codec]}]
    return [{"name": f"numcodecs.{codec}", "configuration": {}}]


def write_shard(path: Path, array: zarr.Array, layer: int, first: int, acts_ND: NDArray[Any]) -> dict[str, Any]:
    """Write the shard of a layer that starts at row `first`; returns its `rows`, `bytes`, `digest`, `sum` and `squares`."""
    file = shard_file(path, array, layer, first)
    # zarr reads a shard before it writes it, and leaves its temporary file behind when it is killed.
    shutil.rmtree(file.parent, ignore_errors=True)
    array.with_config(WHOLE)[first : first + len(acts_ND)] = acts_ND
    total, squares = sums(acts_ND)
    return {
        "rows": [first, first + len(acts_ND)],
        "bytes": file.stat().st_size,
        "digest": digest(file),
        "sum": total.tolist(),
        "squares": squares.tolist(),
    }


def sums(acts_ND: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and sum of squares of each channel, in float64, a few rows at a time."""
    total, squares = np.zeros(acts_ND.shape[1]), np.zeros(acts_ND.shape[1])
    for first in range(0, len(acts_ND), 128):  # blocks that stay in the cache
        rows_ND = acts_ND[first : first + 128].astype(np.float64)
        total += rows_ND.sum(0)
        squares += np.square(rows_ND).sum(0)
    return total, squares


def finish(path: Path, layer: int, shards: Sequence[dict[str, Any]]) -> None:
    """Add a layer's statistics and the facts of its shards.

    Args:
        shards: `rows`, `bytes`, `digest`, `sum` and `squares` of each.
    """
    group = zarr.open_group(path, mode="a")[f"layer/{layer}"]
    rows = shards[-1]["rows"][1]
    write_vector(group, "mean", np.sum([shard["sum"] for shard in shards], 0) / rows, "channel")
    write_vector(group, "second_moment", np.sum([shard["squares"] for shard in shards], 0) / rows, "channel")
    group.attrs["shards"] = [{key: shard[key] for key in ("rows", "bytes", "digest")} for shard in shards]
