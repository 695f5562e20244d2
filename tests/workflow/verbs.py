"""The command lines of single stages, with more work in them than the finished run had."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.workflow.conftest import clean_environment

STAGES = {
    "model": ("models/tiny", {"steps": 60}),
    "tune": ("policies/tiny.ppo", {"batches": 12}),
    "dictionary": ("dictionaries/tiny.texts/mlp/layers-*/layer*/big", {"epochs": 40}),
}


def command(finished, verb: str, out: Path) -> tuple[list[str], Path]:
    """The command line of a stage with more work in it than the finished run had, and its work folder."""
    results = finished.workdir / "results"
    pattern, changes = STAGES[verb]
    (folder,) = results.glob(pattern)
    settings = json.loads((folder / "manifest.json").read_text())["parameters"]
    (settings["tuning"] if verb == "tune" else settings).update(changes)
    work = out.with_name(out.name + ".work")
    data = {"model": {"corpus": "corpora/reviews"}, "tune": {"base": "models/tiny", "corpus": "corpora/reviews"}}.get(verb, {})
    options = [text for name, path in data.items() for text in (f"--{name}", results / path)]
    if verb == "tune":
        options += ["--reward-file", finished.workdir / "inputs/words.tsv"]
    if verb == "dictionary":
        kind, layer = folder.parents[1].name, folder.parent.name.removeprefix("layer")
        options += ["--layer", layer, "--activations", results / f"activations/tiny.texts/mlp/{kind}"]
        options += ["--weights", results / "models/tiny/model", "--tokens", results / "tokens/tiny.texts"]
    shared = ["--settings", json.dumps(settings), "--threads", "1", "--out", out, "--work", work]
    return [sys.executable, "-m", "rlsae", verb, *map(str, options), *map(str, shared)], work


def extraction(finished, part: int, stamp: Path, work: Path, **changes) -> list[str]:
    """The command line of one part of the finished run's dump, with changed settings."""
    options = ["--part", part, "--stamp", stamp, "--work", work, "--threads", 1]
    options += ["--weights", finished.workdir / "results/models/tiny/model"]
    return [sys.executable, "-m", "rlsae", "extract", *map(str, options), *dump_options(finished, **changes)]


def dump_options(finished, **changes) -> list[str]:
    """What extract and consolidate are both told of the finished run's dump."""
    results = finished.workdir / "results"
    (folder,) = results.glob("activations/tiny.texts/mlp/layers-*")
    settings = json.loads((folder / "manifest.json").read_text())["parameters"] | changes
    inputs = ["--policy", results / "models/tiny", "--tokens", results / "tokens/tiny.texts"]
    return ["--settings", json.dumps(settings), *map(str, inputs)]


def environment() -> dict[str, str]:
    return clean_environment() | {"RLSAE_SAVE_SECONDS": "0", "PYTHONPATH": str(Path(__file__).parents[2])}


def run_to_the_end(arguments: list[str]) -> str:
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr
