"""Artifacts that are named in their manifests as their stages do it, and ways to damage them."""

from __future__ import annotations

import os

from small_artifacts import finish

from rlsae.artifacts import MANIFEST, PROVENANCE, Manifest, digest


def seal(folder, stage=None):
    """Name everything in a folder in its manifest, as a stage does. Returns the folder."""
    old = None if stage else Manifest.read(folder)
    outputs = {path.name: digest(path) for path in folder.iterdir() if path.name not in (MANIFEST, PROVENANCE)}
    kept = {"inputs": old.inputs, "metrics": old.metrics} if old else {}
    return finish(folder, stage or old.stage, outputs=outputs, **kept)


def flip(path, place=5):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path, size=100):
    """Keep the first bytes of a file."""
    path.write_bytes(path.read_bytes()[:size])


def swap(one, other):
    """Exchange the contents of two files."""
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def age(folder):
    """Let every file be as old as the manifest. Returns the folder."""
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    return folder
