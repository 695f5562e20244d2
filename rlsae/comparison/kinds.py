"""How a latent is named in every table, and its tags. Light, for the report reads them without torch."""

from __future__ import annotations

KEY = ["role", "layer", "dictionary", "seed", "latent"]
TAGS = ("unchanged", "removed", "added", "rotated", "rescaled", "untestable", "dead")
CHANGED = TAGS[1:5]
UNTESTED = TAGS[5:]
