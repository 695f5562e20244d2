"""Artifacts on disk: digests, the manifest that ends every stage folder, and the provenance beside it.

A manifest holds only what follows from the configuration and the inputs: no time, host, path or version. Equal work
therefore gives equal bytes, and a consumer that depends on the manifest reruns only when the content changed. What a
run took and where it ran goes to `provenance.json`, which is an input of nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlsae import __version__
from rlsae.errors import RlsaeError

SCHEMA = 1
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
LIBRARIES = [
    "torch",
    "transformers",
    "trl",
    "tokenizers",
    "zarr",
    "numcodecs",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def digest(path: Path, known: Mapping[Path, str] | None = None) -> str:
    """SHA-256 of a file, or of the names and digests of all files below a folder; those of `known` are not read again."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != ".snakemake_timestamp")
        return text_digest(canonical_json({p.relative_to(path).as_posix(): (known or {}).get(p) or digest(p) for p in files}))
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: `manifest.json` of its folder."""

    stage: str
    parameters: dict[str, Any]
    """Settings of the entry that shaped it, without paths."""
    inputs: dict[str, str]
    """Identifier of each input artifact, or `file:name`, with the digest of its manifest or content."""
    outputs: dict[str, str]
    """Path inside the folder, with the digest of its content."""
    metrics: dict[str, Any]
    schema: int = SCHEMA

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of an artifact's folder.

        Raises:
            RlsaeError: there is none, or it is not one that this version can read.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RlsaeError(f"{folder} is no finished artifact: it has no {MANIFEST}; run the stage that makes it") from None
        except ValueError:
            raise RlsaeError(f"{path} is not valid JSON; delete it and rerun the stage that makes it") from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise RlsaeError(f"{path} has schema {schema}; this version of rlsae reads schema {SCHEMA}")
        try:
            return cls(**content)
        except TypeError:
            raise RlsaeError(f"{path} is no manifest of an artifact; delete it and rerun the stage that makes it") from None

    def to_json(self) -> str:
        """The bytes that are written and digested."""
        return json.dumps(asdict(self), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def artifact_id(folder: Path, stage: str) -> str:
    """Identifier of an artifact wherever the results lie: its path from the stage's folder on (`models/tiny`)."""
    parts = folder.absolute().parts
    if stage in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index(stage) :])
    return folder.name


def input_digests(inputs: dict[str, Path]) -> dict[str, str]:
    """Identifier and digest of each input: of the manifest for an artifact's folder, of the content otherwise.

    Raises:
        RlsaeError: an input does not exist.
    """
    found = {}
    for label, path in inputs.items():
        if not path.exists():
            raise RlsaeError(f"{label}: {path} does not exist")
        if (path / MANIFEST).exists():
            found[artifact_id(path, Manifest.read(path).stage)] = digest(path / MANIFEST)
        else:
            found[f"file:{label}"] = digest(path)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def provenance(wall_seconds: float, details: dict[str, Any]) -> dict[str, Any]:
    """How and where an artifact was made; `details` adds what only the stage knows (device, throughput)."""
    torch = sys.modules.get("torch")
    return {
        "rlsae": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "host": os.uname().nodename,
        "threads": torch.get_num_threads() if torch else 1,
        "matmul": torch.get_float32_matmul_precision() if torch else None,
        "wall_seconds": round(wall_seconds, 2),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "command": sys.argv,
        **details,
    }


def _commit() -> str | None:
    """Commit of the checkout that runs, with `-dirty` when it was changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def stored_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
