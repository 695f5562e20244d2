"""Options that several verbs share, and how they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rlsae.errors import RlsaeError
from rlsae.gpus import grant
from rlsae.progress import say

Out = Annotated[Path, typer.Option(help="Folder of the artifact to write.")]
Work = Annotated[Path | None, typer.Option(help="Folder for partial state; beside --out by default.")]
Settings = Annotated[str, typer.Option(help="The entry's settings as JSON, as in the configuration but for paths.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")]
Gpus = Annotated[
    int | None, typer.Option(min=0, max=1, help="GPUs that this job may use, 0 or 1; by default whatever torch sees.")
]
Folder = Annotated[Path, typer.Option(help="Folder of an input artifact.")]
MaybeFile = Annotated[Path | None, typer.Option(help="The entry's own file or folder, where it has one.")]
Named = Annotated[list[str], typer.Option(help="KEY=FOLDER, repeated.")]
ConfigFile = Annotated[Path, typer.Argument(help="Configuration file.")]
DUMP = ("hook", "layers", "rows", "rows_per_part", "dtype", "precision", "codec", "checkpoint")
"""Settings of a dump."""


def configure(threads: int | None, gpus: int | None) -> None:
    """Threads, GPU and number formats of torch for this process; `RLSAE_DEVICE` overrides which device is used."""
    if gpus is not None and "RLSAE_DEVICE" not in os.environ:
        say(grant(gpus))
    from rlsae.compute import configure as set_up

    set_up(threads)


def read_json(text: str, *required: str) -> dict[str, Any]:
    """The object that --settings holds; it must have the required keys."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise RlsaeError(f"--settings is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise RlsaeError(f"--settings: expected an object, found {text!r:.60}")
    missing = [key for key in required if key not in given]
    if missing:
        raise RlsaeError(f"--settings: the key {missing[0]} is missing; expected: {', '.join(required)}")
    return given


def as_text(values: dict[str, Any]) -> str:
    """Settings as the JSON that `--settings` holds."""
    return json.dumps(values)


def with_path(text: str, path: Path | None) -> str:
    """Settings with the path that was given beside them."""
    return as_text(read_json(text) | {"path": str(path)}) if path else text


def pairs(named: list[str]) -> dict[str, Path]:
    """KEY=FOLDER options as a mapping."""
    found = {}
    for text in named:
        key, equals, folder = text.partition("=")
        if not equals:
            raise RlsaeError(f"expected KEY=FOLDER, found {text!r}")
        found[key] = Path(folder)
    return found


def dictionaries(named: list[str]) -> dict[tuple[str, int, str], Path]:
    """ROLE/LAYER/NAME=FOLDER options as a mapping."""
    found = {}
    for key, folder in pairs(named).items():
        role, _, rest = key.partition("/")
        layer, _, name = rest.partition("/")
        if role not in ("base", "tuned") or not layer.isdigit() or not name:
            raise RlsaeError(f"--dictionary: expected base/LAYER/NAME=FOLDER or tuned/LAYER/NAME=FOLDER, found {key!r}")
        found[role, int(layer), name] = folder
    return found
