"""Whether an artifact is whole: every file against the manifest, every store against itself.

A check goes on behind what it finds, so that one call names everything that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import zarr

from rlsae.artifacts import MANIFEST, PROVENANCE, Manifest, artifact_id, canonical_json, digest, stored_bytes, text_digest
from rlsae.errors import RlsaeError
from rlsae.inspection import UNREADABLE, tensor_header, why
from rlsae.status import BANNER
from rlsae.store_verification import Add, Files, Problem, Severity, check_store, count, long_progress

GUESSES = 2048
"""How many single changes of a folder are tried to name the one that was made."""
NEEDS = {
    "cfg.json": "sae_weights.safetensors",
    "sae_weights.safetensors": "cfg.json",
    "config.json": "model*.safetensors",
    "model*.safetensors": "config.json",
}
"""Files that make no sense without another one."""


def verify(folder: Path) -> tuple[list[str], str]:
    """Check an artifact.

    Returns:
        What is wrong, one line each, worst first; and a summary in one line.

    Raises:
        RlsaeError: there is no such folder.
    """
    if not folder.is_dir():
        raise RlsaeError(f"{folder} is no folder; expected the folder of an artifact, such as results/models/tiny")
    found: list[Problem] = []

    def add(severity: Severity, text: str) -> None:
        found.append((severity, text))

    manifest = None
    try:
        manifest = Manifest.read(folder)
    except RlsaeError as error:
        add(Severity.LOST, str(error))
    names = sorted(manifest.outputs) if manifest else ["store"]
    present = [name for name in names if (folder / name).exists()]
    digests = _digests(folder, present)
    for name in present:
        restored = dict(digests[name])
        for store in sorted(path.parent for path in (folder / name).glob("*/zarr.json")):
            restored |= check_store(store, digests[name], add)
        if manifest and manifest.outputs[name] not in (_whole(digests[name]), _whole(restored)):
            _explain(folder / name, manifest.outputs[name], restored, add)
    if manifest:
        known = {MANIFEST, PROVENANCE, *names} | ({BANNER} if manifest.stage == "reports" else set())
        for name in sorted(set(names) - set(present)):
            temporary = manifest.stage == "activations"
            add(Severity.LOST, f"{name} is missing" + (", as it may be where its activation has `keep: false`" * temporary))
        for name in sorted({path.name for path in folder.iterdir()} - known):
            stamp = manifest.stage == "activations" and name.startswith("part-")
            if not stamp and name != ".snakemake_timestamp":
                add(Severity.UNNAMED, f"{name}: the manifest does not name it")
    label = artifact_id(folder, manifest.stage) if manifest else str(folder)
    if found:
        return [text for _, text in sorted(found, key=lambda pair: pair[0])], f"{label}: {count(len(found), 'problem')}"
    files, size = sum(map(len, digests.values())), sum(stored_bytes(folder / name) for name in present)
    return [], f"{label} is whole: {count(len(names), 'output')}, {count(files, 'file')}, {size:,} bytes"


def _digests(folder: Path, names: list[str]) -> dict[str, Files]:
    """The digests of all files below some outputs."""
    files = {}
    for name in names:
        below = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else [folder / name]
        files[name] = [path for path in below if path.is_file() and path.name != ".snakemake_timestamp"]
    size = sum(path.stat().st_size for paths in files.values() for path in paths)
    tick = long_progress("digests", sum(map(len, files.values())), "files", size)
    found: dict[str, Files] = {name: {} for name in names}
    for name, paths in files.items():
        for path in paths:
            found[name][path.relative_to(folder / name).as_posix()] = digest(path)
            tick(1)
    return found


def _whole(files: Files) -> str:
    """The digest of an output, from those of its files: as `rlsae.artifacts.digest` has it."""
    return files["."] if "." in files else text_digest(canonical_json(files))


# --- a changed output --------------------------------------------------------------------------------------------


def _explain(path: Path, recorded: str, files: Files, add: Add) -> None:
    """Name what changed in an output whose digest is not the recorded one, as far as that can be known.

    Args:
        files: its digests, changed shards of a store put right: these are named already.
    """
    made = (path.parent / MANIFEST).stat().st_mtime_ns
    later = [name for name in files if (path / name).exists() and (path / name).stat().st_mtime_ns > made]
    for problems, guess in islice(_guesses(files, later), GUESSES):
        if _whole(guess) == recorded:
            for severity, text in problems:
                add(severity, f"{path.name}/{text}")
            return
    named = 0
    for severity, text in (*_absent(path), *_unreadable(path, files)):
        add(severity, text)
        named += 1
    hint = f", of {len(files)} files none says which" if len(files) > 1 and not named else ""
    if later and "." not in files:
        hint = f"; written after the manifest: {', '.join(later)}"
    add(Severity.DAMAGED, f"{path.name}: its content is not what the manifest names{hint}")


def _guesses(files: Files, later: list[str]) -> Iterator[tuple[list[Problem], Files]]:
    """Single changes that may have been made, with the digests as they were before."""
    for added in [later, *([name] for name in files)]:
        problems = [(Severity.UNNAMED, f"{name} was added") for name in added]
        yield problems, {name: files[name] for name in files if name not in added}
    for one, other in combinations(files, 2):
        yield [(Severity.DAMAGED, f"{one} and {other} were swapped")], files | {one: files[other], other: files[one]}


def _unreadable(path: Path, files: Files) -> Iterator[Problem]:
    """The files of an output that are not even of their format."""
    for name in files:
        file = path / name
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                tensor_header(file)
            elif file.suffix == ".parquet":
                import pyarrow.parquet as parquet

                parquet.read_table(file)
        except UNREADABLE as error:
            yield Severity.DAMAGED, f"{file.relative_to(path.parent).as_posix()} cannot be read: {why(error)}"


def _absent(path: Path) -> Iterator[Problem]:
    """The files that an output should hold by what else it holds."""
    for one, other in NEEDS.items():
        for folder in sorted({file.parent for file in path.rglob(one)}):
            if not any(folder.glob(other)):
                yield Severity.LOST, f"{folder.relative_to(path.parent).as_posix()}/{other} is missing"
    for store in sorted(file.parent for file in path.glob("*/zarr.json")):
        try:
            members = dict(zarr.open_group(store, mode="r").members(max_depth=None))
        except UNREADABLE:
            continue
        expected = [f"{name}/zarr.json" for name in members]
        for name, array in members.items():
            if isinstance(array, zarr.Array) and array.shards is None:
                expected += [f"{name}/c/{'/'.join(map(str, place))}" for place in np.ndindex(array.cdata_shape)]
        for name in sorted(expected):
            if not (store / name).exists():
                yield Severity.LOST, f"{store.name}/{name} is missing; a missing chunk reads as zeros"
