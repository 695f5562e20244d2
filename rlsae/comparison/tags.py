"""From changes to tags: which latents changed by more than the bulk of the layer does, and how.

A latent is tagged when its change Δ exceeds τ, tested at a false discovery rate of 5 % (Benjamini and Hochberg 1995) over the
latents of both dictionaries of a pair:

    τ = max(0.35, median Δ + 2.5 · 1.4826 · MAD(Δ))

0.35 is a turn by 20° or a rescaling by a third. The second part follows the bulk: where all latents move, a change is news
only if it stands out (the outlier rule of Hampel 1974, by the median and the median absolute deviation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsae.comparison.write_change import MIN_FIRINGS, WriteChange

MIN_EFFECT = 0.35
BULK_DEVIATIONS = 2.5
FALSE_DISCOVERY_RATE = 0.05
GONE = 0.35
"""Ratio of lengths below which a write counts as gone."""
DIFFUSE = 2 * np.sin(np.radians(15))
"""τ above which a turn by 30 degrees is no longer tagged: the layer moves as a whole."""


@dataclass(frozen=True)
class Tags:
    """The tags of a dictionary's latents."""

    p: NDArray[np.float64]
    """[F]; nan for latents that are not tested."""
    q: NDArray[np.float64]
    """Smallest false discovery rate at which a latent would be tagged [F]."""
    tag: NDArray[np.str_]
    """One of `rlsae.comparison.kinds.TAGS` [F]."""


def minimum_effect(change: NDArray[np.floating]) -> float:
    """τ for the changes of the testable latents."""
    if not len(change):
        return MIN_EFFECT
    median = np.median(change)
    deviation = 1.4826 * np.median(np.abs(change - median))
    return float(max(MIN_EFFECT, median + BULK_DEVIATIONS * deviation))


def benjamini_hochberg(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """Adjusted p-values: q_(i) = min over k ≥ i of p_(k) m / k."""
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q


def kinds(own: str | NDArray[np.str_], ratio: NDArray[np.floating], angle: NDArray[np.floating]) -> NDArray[np.str_]:
    """What a changed write is: gone in the other model, turned more than rescaled, or rescaled.

    Args:
        own: model whose write is the measure, `base` or `tuned`.
    """
    gone = np.where(np.equal(own, "base"), "removed", "added")
    turned = ratio * np.sin(np.radians(np.minimum(angle, 90))) > np.abs(ratio - 1)
    return np.where(ratio < GONE, gone, np.where(turned, "rotated", "rescaled"))


def tag_pair(changes: dict[str, WriteChange]) -> tuple[dict[str, Tags], float]:
    """Test the latents of all dictionaries of one recipe and seed together.

    Args:
        changes: by role of the dictionary.

    Returns:
        tags by role, and τ.
    """
    testable = {role: found.firings >= MIN_FIRINGS for role, found in changes.items()}
    tested = np.concatenate([found.change[testable[role]] for role, found in changes.items()])
    tolerance = minimum_effect(tested)
    p = {role: found.p_values(tolerance) for role, found in changes.items()}
    adjusted = benjamini_hochberg(np.concatenate([p[role][testable[role]] for role in changes]))
    q = dict(zip(changes, np.split(adjusted, np.cumsum([tested.sum() for tested in testable.values()])[:-1]), strict=True))
    return {role: _tags(found, testable[role], p[role], q[role]) for role, found in changes.items()}, tolerance


def moved_share(changes: dict[str, WriteChange]) -> float:
    """Share of the tested latents of both dictionaries that change by more than 0.35, whatever the bulk does; nan without any.

    Tags are few where a layer moves as a whole; this is many.
    """
    p = np.concatenate([found.p_values(MIN_EFFECT)[found.firings >= MIN_FIRINGS] for found in changes.values()])
    return float((benjamini_hochberg(p) <= FALSE_DISCOVERY_RATE).mean()) if len(p) else float("nan")


def _tags(
    found: WriteChange,
    testable: NDArray[np.bool_],
    p: NDArray[np.float64],
    q_of_testable: NDArray[np.float64],
) -> Tags:
    q = np.full(len(p), np.nan)
    q[testable] = q_of_testable
    tag = np.where(q <= FALSE_DISCOVERY_RATE, kinds(found.own, found.ratio, found.angle), "unchanged")
    untested = np.where(found.firings > 0, "untestable", "dead")
    return Tags(np.where(testable, p, np.nan), q, np.where(testable, tag, untested))
