"""The tags of a latent. Light, for the report reads them without torch."""

from __future__ import annotations

TAGS = ("unchanged", "removed", "added", "rotated", "rescaled", "untestable", "dead")
CHANGED = TAGS[1:5]
UNTESTED = TAGS[5:]
