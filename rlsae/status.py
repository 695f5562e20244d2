"""What a configuration names, and whether it is there and current: told from the manifests alone, without `.snakemake/`.

An artifact is current when its manifest holds the settings that the configuration gives it, and its inputs are the ones that
lie there now and are current themselves.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsae.artifacts import MANIFEST, Manifest, digest, write_atomically
from rlsae.config import Config
from rlsae.errors import RlsaeError
from rlsae.layout import RESULTS, Artifact, Layout

BANNER = "status.js"
"""Loaded by the pages of a report; says what is stale."""


@dataclass(frozen=True)
class State:
    """Whether one artifact is current."""

    artifact: Artifact
    problem: str | None
    """Why it is not; None for a current one."""
    missing: bool = False


def check(config: Config) -> dict[Path, State]:
    """The state of every artifact that a configuration names, upstream ones first."""
    layout = Layout(config)
    states: dict[Path, State] = {}
    for study in sorted(config.studies, key=lambda name: layout.layer_source(name) != name):
        for artifact in layout.artifacts(study):
            if artifact.folder not in states:
                states[artifact.folder] = _state(artifact, states)
        if layout.chosen_layers(study) is None:
            folder = RESULTS / "reports" / study
            states[folder] = State(Artifact("reports", folder, {}), "its layers are not chosen yet", missing=True)
    return states


def _state(artifact: Artifact, states: dict[Path, State]) -> State:
    if not (artifact.folder / MANIFEST).exists():
        return State(artifact, "not there", missing=True)
    try:
        manifest = Manifest.read(artifact.folder)
    except RlsaeError as error:
        return State(artifact, str(error))
    differing = sorted(k for k in _flat(manifest.parameters) ^ _flat(artifact.settings))
    if differing:
        return State(artifact, f"made with other settings: {', '.join(sorted({key for key, _ in differing}))}")
    for name in manifest.outputs:
        if not (artifact.folder / name).exists() and not artifact.temporary:
            return State(artifact, f"{name} is missing")
    expected = {folder.relative_to(RESULTS).as_posix() for folder in artifact.inputs}
    for identity, made_from in manifest.inputs.items():
        if identity.startswith("file:"):
            source = artifact.files.get(identity.removeprefix("file:"))
            if source is None or not source.exists() or digest(source) != made_from:
                return State(artifact, f"made from another {identity.removeprefix('file:')} file")
            continue
        if identity not in expected:
            return State(artifact, f"made from {identity}, which it should not be")
        folder = RESULTS / identity
        if not (folder / MANIFEST).exists() or digest(folder / MANIFEST) != made_from:
            return State(artifact, f"made from another {identity}")
        if folder in states and states[folder].problem:
            return State(artifact, f"made from {identity}, which is not current")
    if missing := expected - set(manifest.inputs):
        return State(artifact, f"not made from {min(missing)}, as it should be")
    return State(artifact, None)


def _flat(settings: Any, key: str = "") -> set[tuple[str, str]]:
    """(dotted key, value as JSON) of nested settings."""
    if isinstance(settings, dict):
        return {pair for k, v in settings.items() for pair in _flat(v, f"{key}.{k}" if key else k)}
    return {(key, json.dumps(settings))}


def mark_reports(config: Config) -> None:
    """Put a banner on the report of every study that is not current, and take it off the others."""
    states = check(config)
    for study in config.studies:
        folder = RESULTS / "reports" / study
        state = states.get(folder)
        if state and (folder / MANIFEST).exists():
            write_banner(folder, state.problem)


def write_banner(folder: Path, problem: str | None) -> None:
    """What the pages of a report say about its being current."""
    write_atomically(folder / BANNER, f"window.rlsaeStale = {json.dumps(problem)};\n".replace("<", "\\u003c"))


def orphans(config: Config) -> list[Path]:
    """Artifact folders under the results that the configuration does not name.

    What lies behind a choice of layers that has yet to be made may be named once it is: it is no orphan.
    """
    layout = Layout(config)
    named = {artifact.folder for study in config.studies for artifact in layout.artifacts(study)}
    named |= {folder for study in config.studies for pattern in layout.waiting(study) for folder in RESULTS.glob(pattern)}
    found = sorted(path.parent for path in RESULTS.rglob(MANIFEST) if path.parent not in named)
    return [folder for folder in found if not any(parent in found for parent in folder.parents)]


def delete(folders: list[Path]) -> None:
    """Delete artifact folders."""
    for folder in folders:
        shutil.rmtree(folder)
