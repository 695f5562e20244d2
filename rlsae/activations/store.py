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

import math
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

from rlsae.activations import shards
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
RESIDENT_BYTES = 1 << 30
"""Layers of at most this size stay in memory once they have been read."""


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
        self._acts = {int(name): self.group[f"layer/{name}/acts"] for name in self.group["layer"].group_keys()}
        self._plain = all(shards.are_plain(array) for array in self._acts.values())
        self.layers = sorted(self._acts)
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
        return self._acts[layer]

    def shards(self, layer: int) -> list[dict[str, Any]]:
        """`rows` [first, stop], `bytes` and `digest` of each file of a layer."""
        return list(self.group[f"layer/{layer}"].attrs["shards"])

    def read(self, layer: int, first: int, stop: int) -> NDArray[Any]:
        """Rows [row, channel] of one layer, in the stored format.

        Raises:
            RlsaeError: a checksum does not hold: names layer and rows.
        """
        array, stop = self.acts(layer), min(stop, self.rows)
        size = array.chunks[0]
        rows_ND = np.empty((max(0, stop - first), array.shape[1]), array.dtype)
        for chunk in range(first // size, -(-stop // size)):
            low, high = max(first, chunk * size), min(stop, (chunk + 1) * size)
            self.read_chunk(layer, chunk, rows_ND[low - first : high - first], low - chunk * size)
        return rows_ND

    def read_chunk(self, layer: int, chunk: int, out_ND: NDArray[Any], skipped: int = 0) -> None:
        """Fill `out_ND` with rows of one chunk, but for the first `skipped` of it."""
        array = self.acts(layer)
        size, per_shard = array.chunks[0], array.shards[0] // array.chunks[0]
        first = chunk * size + skipped
        try:
            if not self._plain:
                out_ND[:] = array[first : first + len(out_ND)]
                return
            file = shard_file(self.path, array, layer, first)
            whole_ND = out_ND if len(out_ND) == size else np.empty((size, array.shape[1]), array.dtype)
            shards.read_chunk(file, chunk % per_shard, per_shard, whole_ND)
        except (ValueError, RuntimeError, OSError) as error:
            raise self._damaged(layer, first, first + len(out_ND), str(error)) from None
        if whole_ND is not out_ND:
            out_ND[:] = whole_ND[skipped : skipped + len(out_ND)]

    def _damaged(self, layer: int, first: int, stop: int, why: str) -> RlsaeError:
        return RlsaeError(
            f"layer {layer}, rows {first} to {stop - 1} of {self.path} are damaged: {why}; delete the store and run the "
            "activations stage again"
        )

    def statistics(self, layer: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and mean square of each channel over all rows."""
        self.acts(layer)
        return self.group[f"layer/{layer}/mean"][:], self.group[f"layer/{layer}/second_moment"][:]

    def check_same_tokens(self, other: ActivationStore) -> None:
        """
        Raises:
            RlsaeError: the other store holds other tokens, or cuts them into other documents.
        """
        tokens = [store.group["token"] for store in (self, other)]
        if not np.array_equal(self.start, other.start) or any(
            not np.array_equal(*(token[first : first + VECTOR_CHUNK] for token in tokens))
            for first in range(0, self.rows, VECTOR_CHUNK)
        ):
            raise RlsaeError(
                f"{other.path} holds other tokens than {self.path}; dump both policies with the same tokens and rows"
            )

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
        """Rows acts_BD of each step, in the store's dtype, until the next step; `from_step` skips without reading."""
        step = 0
        # Buffers that are reused: the first touch of new memory costs as much as the copy.
        batch_BD = np.empty((self.batch_rows, self.shape[1]), self.dtype)
        chunks = -(-self.shape[0] // self.chunk_rows)
        resident = math.prod(self.shape) * self.dtype.itemsize <= RESIDENT_BYTES
        held = chunks if resident else min(WINDOW_CHUNKS, chunks)
        rows_ND = np.empty((held * self.chunk_rows, self.shape[1]), self.dtype)
        places: dict[int, int] = {}
        with ThreadPoolExecutor(READERS) as readers:
            for number, (_, window, batches) in enumerate(self.windows):
                if step + batches <= from_step:
                    step += batches
                    continue
                if not resident:
                    places.clear()
                rows = self._load(np.sort(window).tolist(), rows_ND, places, readers)
                order = rows[np.random.default_rng([self.seed, number, 1]).permutation(len(rows))]
                for batch in range(max(0, from_step - step), batches):
                    rows_B = order[batch * self.batch_rows : (batch + 1) * self.batch_rows]
                    yield rows_ND.take(rows_B, axis=0, out=batch_BD, mode="clip")  # "raise" would copy once more
                step += batches

    def _load(
        self, window: list[int], rows_ND: NDArray[Any], places: dict[int, int], readers: ThreadPoolExecutor
    ) -> NDArray[np.int64]:
        """Read the chunks that have no place in memory yet; returns where the window's training rows stand."""
        new = [chunk for chunk in window if chunk not in places]
        places |= {chunk: len(places) + number for number, chunk in enumerate(new)}

        def read(chunk: int) -> None:
            rows = min(self.chunk_rows, self.shape[0] - chunk * self.chunk_rows)
            self.store.read_chunk(self.layer, chunk, rows_ND[places[chunk] * self.chunk_rows :][:rows])

        list(readers.map(read, new))
        train = [np.flatnonzero(self.train[chunk * self.chunk_rows :][: self.chunk_rows]) for chunk in window]
        return np.concatenate([places[chunk] * self.chunk_rows + rows for chunk, rows in zip(window, train, strict=True)])


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
    """Write the shard of a layer that starts at row `first`; returns its `rows`, `bytes`, `sum` and `squares`.

    Raises:
        RlsaeError: a value is not finite: NaN or infinity in the model, or more than float16 can hold.
    """
    with np.errstate(invalid="ignore"):
        total, squares = sums(acts_ND)
    if not np.isfinite(squares).all():
        raise not_finite(acts_ND, layer, first)
    file = shard_file(path, array, layer, first)
    # zarr reads a shard before it writes it, and leaves its temporary file behind when it is killed.
    shutil.rmtree(file.parent, ignore_errors=True)
    if shards.are_plain(array):
        shards.write(file, acts_ND, array.chunks[0], array.shards[0] // array.chunks[0])
    else:
        array.with_config(WHOLE)[first : first + len(acts_ND)] = acts_ND
    return {
        "rows": [first, first + len(acts_ND)],
        "bytes": file.stat().st_size,
        "sum": total.tolist(),
        "squares": squares.tolist(),
    }


def not_finite(acts_ND: NDArray[Any], layer: int, first: int) -> RlsaeError:
    """Says which row holds what cannot be stored, and what to do."""
    row = first + int(np.flatnonzero(~np.isfinite(acts_ND).all(1))[0])
    if acts_ND.dtype == np.float16 and not np.isnan(acts_ND).any():
        limit = f"{np.finfo(acts_ND.dtype).max:,.0f}"
        why = f"a value beyond {limit} or an infinite one does not fit float16; set `dtype: float32` in its activation"
    else:
        why = "the model put out values that are not finite; check its weights"
    return RlsaeError(f"layer {layer}, row {row}: {why}")


def sums(acts_ND: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and sum of squares of each channel, in float64, a few rows at a time."""
    total, squares = np.zeros(acts_ND.shape[1]), np.zeros(acts_ND.shape[1])
    for first in range(0, len(acts_ND), 128):  # blocks that stay in the cache
        rows_ND = acts_ND[first : first + 128].astype(np.float64)
        total += rows_ND.sum(0)
        squares += np.square(rows_ND).sum(0)
    return total, squares


def is_whole(path: Path, array: zarr.Array, layer: int, written: dict[str, Any]) -> bool:
    """Whether a shard is as it was written: its size, and the checksum of every chunk."""
    first, stop = written["rows"]
    file, rows = shard_file(path, array, layer, first), array.chunks[0]
    if not file.exists() or file.stat().st_size != written["bytes"]:
        return False
    try:
        if not shards.are_plain(array):
            array[first:stop]
            return True
        chunk_ND = np.empty((rows, array.shape[1]), array.dtype)
        for number in range(-(-(stop - first) // rows)):
            shards.read_chunk(file, number, array.shards[0] // rows, chunk_ND)
    except (ValueError, RuntimeError, OSError):
        return False
    return True


def finish(path: Path, layer: int, written: Sequence[dict[str, Any]]) -> dict[Path, str]:
    """Add a layer's statistics and the facts of its shards.

    Args:
        written: `rows`, `bytes`, `sum` and `squares` of each shard.

    Returns:
        The digest of each shard's file.
    """
    group = zarr.open_group(path, mode="a")[f"layer/{layer}"]
    rows = written[-1]["rows"][1]
    write_vector(group, "mean", np.sum([shard["sum"] for shard in written], 0) / rows, "channel")
    write_vector(group, "second_moment", np.sum([shard["squares"] for shard in written], 0) / rows, "channel")
    files = [shard_file(path, group["acts"], layer, shard["rows"][0]) for shard in written]
    digests = {file: digest(file) for file in files}
    group.attrs["shards"] = [
        {"rows": shard["rows"], "bytes": shard["bytes"], "digest": digests[file]}
        for shard, file in zip(written, files, strict=True)
    ]
    return digests
