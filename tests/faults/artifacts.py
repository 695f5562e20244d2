"""What the tests of killed stages compare."""

from __future__ import annotations

from pathlib import Path

from rlsae.artifacts import PROVENANCE


def differing_files(one: Path, other: Path) -> list[str]:
    """Files that two artifacts do not have alike, byte for byte; the provenance does not count."""
    contents = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (one, other)
    ]
    names = (contents[0].keys() | contents[1].keys()) - {PROVENANCE}
    return sorted(name for name in names if contents[0].get(name) != contents[1].get(name))
