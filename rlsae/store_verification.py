"""Whether a Zarr store is whole: its shards, its rows, what it says of documents and positions, and its statistics.

The group is opened directly, not as an `ActivationStore`, which ends at the first shard that is missing or cut.
Shapes: N rows, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from rlsae.inspection import UNREADABLE, why
from rlsae.progress import Progress

BLOCK = 1 << 20
"""Rows whose token, document and position are read at once."""
LONG = 1 << 28
"""Bytes from which on a check shows its progress."""
TOLERANCE = 1e-6
"""Relative difference from which on a stored statistic is wrong."""
ROUNDING = 1e-12
"""Difference of sums in float64, relative to the size of what is summed."""
PER_ROW = ("token", "document", "position")


class Severity(IntEnum):
    """Worst first."""

    LOST = 0
    DAMAGED = 1
    NOT_FINITE = 2
    CONTRADICTION = 3
    STATISTICS = 4
    UNNAMED = 5


Problem = tuple[Severity, str]
Add = Callable[[Severity, str], None]
Files = dict[str, str]
"""Digest of each file below a folder, by its path there; of a single file under `.`."""


def check_store(path: Path, files: Files, add: Add) -> Files:
    """Check a store of tokens or activations.

    Args:
        path: folder of the Zarr group.
        files: digests of the files below the folder that `path` lies in.
        add: takes each problem.

    Returns:
        The digests that the named shards had when they were written: of those that have another one now or are missing.
    """
    try:
        group = zarr.open_group(path, mode="r")
        names = set(dict(group.members()))
        layers = sorted(int(name) for name in group["layer"].group_keys()) if "layer" in names else []
        rows = {f"layer {layer}": group[f"layer/{layer}/acts"].shape[0] for layer in layers}
    except UNREADABLE as error:
        add(Severity.LOST, f"{path.name} cannot be opened: {why(error)}")
        return {}
    whole = {name: _vector(group, name, add) for name in ("start", "held_out", *(["document"] if not layers else []))}
    per_row = PER_ROW if layers else ("token",)
    rows |= {name: group[name].shape[0] for name in per_row if name in names}
    start = whole["start"]
    if start is not None and len(start):
        rows["start"] = int(start[-1])
        falls = np.flatnonzero(np.diff(start) < 0).tolist()
        if start[0] != 0 or falls:
            where = f"falls behind document {falls[0]}" if falls else f"begins at row {start[0]}"
            add(Severity.CONTRADICTION, f"start: {where}")
            start = None
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in rows.items())
        add(Severity.CONTRADICTION, f"the numbers of rows disagree: {counts}")
        start = None
    documents = {name: len(values) - (name == "start") for name, values in whole.items() if values is not None}
    if len(set(documents.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in documents.items())
        add(Severity.CONTRADICTION, f"the numbers of documents disagree: {counts}")
    size = sum(group[f"layer/{layer}/acts"].nbytes for layer in layers)
    tick = long_progress("rows", sum(rows[f"layer {layer}"] for layer in layers), "rows", size)
    largest = _check_rows(group, [name for name in per_row if name in names], start if layers else None, add)
    recorded = group.attrs.get("largest")
    if recorded is not None and largest is not None and largest != recorded:
        add(Severity.CONTRADICTION, f"token: the largest id is {largest}, the store says {recorded}")
    shards = [(layer, shard) for layer in layers for shard in group[f"layer/{layer}"].attrs.get("shards", [])]
    holders = {shard["digest"]: _place(layer, *shard["rows"]) for layer, shard in shards}
    restored: Files = {}
    for layer in layers:
        restored |= _check_layer(path, group[f"layer/{layer}"], layer, files, holders, add, tick)
    return restored


def long_progress(label: str, total: int, unit: str, size: int) -> Callable[[int], None]:
    """Counts units of work, and shows them where so many bytes take long."""
    return Progress(label, total, unit).update if size >= LONG else lambda count: None


def count(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number:,} {what}" + "s" * (number != 1)


def _vector(group: zarr.Group, name: str, add: Add) -> NDArray[Any] | None:
    try:
        return group[name][:]
    except UNREADABLE as error:
        add(Severity.DAMAGED, f"{name} cannot be read: {why(error)}")
        return None


def _place(layer: int, first: int, stop: int) -> str:
    return f"layer {layer}, rows {first} to {stop - 1}"


def _check_rows(group: zarr.Group, names: list[str], start: NDArray[np.int64] | None, add: Add) -> int | None:
    """Read what is stored per row and, where `start` is given, compare documents and positions with it.

    Returns:
        The largest token id; None where it cannot be told.
    """
    wrong: dict[str, list[tuple[int, int, int]]] = {}
    counts = dict.fromkeys(names, 0)
    offset, largest = None, -1
    for name in names:
        array = group[name]
        for first in range(0, array.shape[0], BLOCK):
            try:
                found_N = array[first : first + BLOCK].astype(np.int64)
            except UNREADABLE as error:
                add(Severity.DAMAGED, f"{name} cannot be read: {why(error)}")
                largest = -1 if name == "token" else largest
                break
            if name == "token":
                largest = max(largest, int(found_N.max(initial=-1)))
            if name == "token" or start is None:
                continue
            row_N = np.arange(first, first + len(found_N))
            expected_N = np.searchsorted(start, row_N, "right") - 1
            if name == "position":
                expected_N = row_N - start[expected_N]
                if offset is None:
                    # Dropped first positions: the same number for every document.
                    offsets, votes = np.unique(found_N - expected_N, return_counts=True)
                    offset = max(0, int(offsets[votes.argmax()]))
                expected_N += offset
            bad_N = np.flatnonzero(found_N != expected_N)
            counts[name] += len(bad_N)
            wrong.setdefault(name, []).extend((first + i, found_N[i], expected_N[i]) for i in bad_N[:1].tolist())
    for name, places in wrong.items():
        if places:
            row, found, expected = places[0]
            text = f"{name}: {count(counts[name], 'row')} not as start says, the first is row {row}"
            add(Severity.CONTRADICTION, f"{text}: {found} instead of {expected}")
    return largest if largest >= 0 else None


def _check_layer(
    path: Path, node: zarr.Group, layer: int, files: Files, holders: dict[str, str], add: Add, tick: Callable[[int], None]
) -> Files:
    """Check the shards, rows and statistics of one layer; returns the former digests of shards that changed."""
    acts = node["acts"]
    rows, size = acts.shape[0], (acts.shards or acts.chunks)[0]
    facts = {tuple(shard["rows"]): shard for shard in node.attrs.get("shards", [])}
    ranges = [(first, min(first + size, rows)) for first in range(0, rows, size)]
    if set(facts) != set(ranges):
        text = f"names shards that are not those of {rows} rows" if facts else "does not say what its shards held"
        add(Severity.CONTRADICTION, f"layer {layer} {text}")
    total_D, squares_D, whole = np.zeros(acts.shape[1]), np.zeros(acts.shape[1]), True
    restored: Files = {}
    for first, stop in ranges:
        name = f"{path.name}/layer/{layer}/acts/c/{first // size}/0"
        fact, place, problems = facts.get((first, stop), {}), _place(layer, first, stop), []
        if "digest" in fact and files.get(name) != fact["digest"]:
            restored[name] = fact["digest"]
        if name not in files:
            add(Severity.LOST, f"{place}: {name} is missing")
            whole = False
            tick(stop - first)
            continue
        stored = (path.parent / name).stat().st_size
        if stored != fact.get("bytes", stored):
            problems.append(f"{name} has {stored:,} bytes, {fact['bytes']:,} were written")
        elif name in restored:
            other = holders.get(files[name])
            problems.append(f"{name} has another digest than when it was written" + (f": it holds {other}" if other else ""))
        unread, not_finite = [], []
        for low in range(first, stop, acts.chunks[0]):
            high = min(low + acts.chunks[0], stop)
            try:
                rows_ND = acts[low:high].astype(np.float64)
            except UNREADABLE as error:
                unread.append((low, high, why(error)))
                continue
            with np.errstate(invalid="ignore"):
                total_D += rows_ND.sum(0)
                squares_D += np.square(rows_ND).sum(0)
            if not np.isfinite(squares_D).all():
                not_finite += (low + np.flatnonzero(~np.isfinite(rows_ND).all(1))).tolist()
        tick(stop - first)
        if unread:
            low, high, reason = unread[0]
            problems.append(f"{count(len(unread), 'chunk')} not readable, the first is rows {low} to {high - 1}: {reason}")
        if problems:
            add(Severity.DAMAGED, f"{place}: {'; '.join(problems)}")
        if not_finite:
            text = f"{place}: {count(len(not_finite), 'row')} with NaN or infinity, the first is row {not_finite[0]}"
            add(Severity.NOT_FINITE, text)
        whole &= not unread and not not_finite
    if whole and rows:
        _check_statistics(node, layer, total_D / rows, squares_D / rows, add)
    return restored


def _check_statistics(
    node: zarr.Group, layer: int, mean_D: NDArray[np.float64], second_moment_D: NDArray[np.float64], add: Add
) -> None:
    """Compare the stored statistics of a layer with those of its rows."""
    root_D = np.sqrt(second_moment_D)
    for name, expected_D, scale_D in (("mean", mean_D, root_D), ("second_moment", second_moment_D, second_moment_D)):
        try:
            stored_D = node[name][:]
        except UNREADABLE as error:
            add(Severity.DAMAGED, f"layer {layer}: {name} cannot be read: {why(error)}")
            continue
        if stored_D.shape != expected_D.shape:
            add(Severity.STATISTICS, f"layer {layer}: {name} is of {len(stored_D)} channels, the rows have {len(expected_D)}")
            continue
        # Written so that NaN is wrong too.
        bad = np.flatnonzero(~(np.abs(stored_D - expected_D) <= TOLERANCE * np.abs(expected_D) + ROUNDING * scale_D)).tolist()
        if bad:
            text = f"layer {layer}: {name} is wrong in {len(bad)} of {len(expected_D)} channels, the first is channel {bad[0]}"
            add(Severity.STATISTICS, f"{text}: {stored_D[bad[0]]:.9g} instead of {expected_D[bad[0]]:.9g}")
