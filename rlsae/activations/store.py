"""The activation store: one Zarr v3 group that opens in any Zarr reader, and the row order that training reads it in.

    activations.zarr/            attributes: schema, stage settings, module path of each hook
      token, document, position  int32 [row]
      start                      int64 [document + 1]      row range of each document
      held_out                   bool [document]           documents that train nothing
      layer/{n}/acts             float16 [row, channel]
      layer/{n}/mean, second_moment   float64 [channel]

Shapes: B rows of a batch, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from rlsae.activations.tokens import Tokens, consolidate_metadata, write_vector
from rlsae.errors import RlsaeError

STORE = "store/activations.zarr"
CHUNK_BYTES = 4 << 20
SHARD_BYTES = 128 << 20
WINDOW_CHUNKS = 16
"""Chunks that are held in memory and shuffled together."""


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
    """

    def __init__(self, artifact: Path) -> None:
        path = artifact / STORE
        if not path.exists():
            raise RlsaeError(f"{artifact} holds no activation store; run the activations stage")
        self.group = zarr.open_group(path, mode="r")
        self.start: NDArray[np.int64] = self.group["start"][:]
        self.held_out: NDArray[np.bool_] = self.group["held_out"][:]
        self.layers = sorted(int(name) for name in self.group["layer"].group_keys())

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

    def statistics(self, layer: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and mean square of each channel over all rows."""
        self.acts(layer)
        return self.group[f"layer/{layer}/mean"][:], self.group[f"layer/{layer}/second_moment"][:]

    def held_out_rows(self) -> NDArray[np.bool_]:
        """Whether each row belongs to a held-out document."""
        return np.repeat(self.held_out, np.diff(self.start))

    def row_order(self, layer: int, batch_rows: int, seed: int, epochs: int) -> RowOrder:
        """The order in which training reads the rows; equal for every store of the same tokens and geometry."""
        return RowOrder(self.acts(layer), ~self.held_out_rows(), batch_rows, seed, epochs)


class RowOrder:
    """Batches of shuffled training rows, read in whole chunks.

    Each epoch permutes the chunks, takes them in windows of `WINDOW_CHUNKS`, and permutes the rows of a window in memory. A
    window's last rows that do not fill a batch are left out of that epoch.

    Raises:
        RlsaeError: the rows do not fill one batch.
    """

    def __init__(self, acts: zarr.Array, train: NDArray[np.bool_], batch_rows: int, seed: int, epochs: int) -> None:
        self.acts, self.train, self.batch_rows, self.seed = acts, train, batch_rows, seed
        self.chunk_rows = acts.chunks[0]
        chunks = -(-acts.shape[0] // self.chunk_rows)
        per_chunk = np.add.reduceat(train, np.arange(0, len(train), self.chunk_rows), dtype=np.int64)
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
                f"{int(train.sum())} training rows; lower it or store more rows"
            )

    def batches(self, from_step: int = 0) -> Iterator[NDArray[Any]]:
        """Rows acts_BD of each step, in the store's dtype; `from_step` skips without reading."""
        step = 0
        for number, (_, window, batches) in enumerate(self.windows):
            if step + batches <= from_step:
                step += batches
                continue
            acts_ND = self._read(window)
            order = np.random.default_rng([self.seed, number, 1]).permutation(len(acts_ND))
            for batch in range(max(0, from_step - step), batches):
                yield acts_ND[order[batch * self.batch_rows : (batch + 1) * self.batch_rows]]
            step += batches

    def _read(self, window: NDArray[np.int64]) -> NDArray[Any]:
        """The training rows of some chunks, in the order of the store."""
        parts = []
        for chunk in np.sort(window):
            rows = slice(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, len(self.train)))
            parts.append(self.acts[rows][self.train[rows]])
        return np.concatenate(parts)


# --- writing -----------------------------------------------------------------------------------------------------


def create(
    path: Path,
    tokens: Tokens,
    rows: int,
    layers: list[int],
    channels: int,
    dtype: str,
    rows_per_part: int,
    **attributes: Any,
) -> None:
    """Lay out an empty store for the first `rows` rows of a tokenised corpus."""
    row_start = tokens.row_start()
    documents = int(np.searchsorted(row_start, rows))
    start = np.minimum(row_start[: documents + 1], rows)
    counts = np.diff(start)
    document = np.repeat(np.arange(documents, dtype=np.int32), counts)
    position = (np.arange(rows) - start[document] + tokens.drop_positions).astype(np.int32)
    group = zarr.create_group(path, overwrite=True, attributes={"schema": 1, **attributes})
    write_vector(group, "token", tokens.token[tokens.start[document] + position], "row")
    write_vector(group, "document", document, "row")
    write_vector(group, "position", position, "row")
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
            compressors=None,
            dimension_names=["row", "channel"],
        )


def finish(path: Path) -> None:
    """Add the statistics of every layer, one shard at a time, and consolidate the metadata."""
    group = zarr.open_group(path, mode="a")
    for name in sorted(group["layer"].group_keys(), key=int):
        acts = group[f"layer/{name}/acts"]
        total, squares = np.zeros(acts.shape[1]), np.zeros(acts.shape[1])
        for first in range(0, acts.shape[0], acts.shards[0]):
            rows_ND = acts[first : first + acts.shards[0]].astype(np.float64)
            total += rows_ND.sum(0)
            squares += np.square(rows_ND).sum(0)
        write_vector(group[f"layer/{name}"], "mean", total / acts.shape[0], "channel")
        write_vector(group[f"layer/{name}"], "second_moment", squares / acts.shape[0], "channel")
    consolidate_metadata(group)
