"""The histogram on the page of a latent. Drawn by hand: thousands of pages have one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup

from rlsae.plots import ACCENT, FIXED
from rlsae.report.formatting import number

BAR, HEIGHT = 12, 90


@dataclass(frozen=True)
class Histogram:
    """Numbers of rows by activation, on a logarithmic scale."""

    svg: Markup
    """With the number of each bar on hover."""
    svg_link: str
    csv_link: str


def histogram(counts: Sequence[int], largest: float) -> Histogram:
    """Draw it.

    Args:
        counts: rows in bins of equal width from 0 to the largest activation.
    """
    width = largest / len(counts)
    unit = HEIGHT / math.log1p(max([*counts, 1]))
    bars = [
        (f'<rect x="{BAR * i}" y="{HEIGHT - (tall := unit * math.log1p(count)):.1f}" width="{BAR - 1}" height="{tall:.1f}"',
         f"{number(i * width)} to {number((i + 1) * width)}: {number(count)} rows")
        for i, count in enumerate(counts) if count
    ]  # fmt: skip
    view = f'viewBox="0 0 {BAR * len(counts)} {HEIGHT + 14}"'
    axis = f'<text x="0" y="{HEIGHT + 12}" font-size="10">0</text>'
    axis += f'<text x="{BAR * len(counts)}" y="{HEIGHT + 12}" font-size="10" text-anchor="end">{number(largest)}</text>'
    inline = "".join(f"{bar}><title>{told}</title></rect>" for bar, told in bars)
    file = f'<svg xmlns="http://www.w3.org/2000/svg" {view} fill="{FIXED[ACCENT]}">'
    file += "".join(f"{bar}/>" for bar, _ in bars) + axis + "</svg>"
    rows = [f"{i * width:.6g},{(i + 1) * width:.6g},{count}" for i, count in enumerate(counts)]
    return Histogram(
        Markup(f'<svg {view} role="img" aria-label="Histogram of activations" class="bars">{inline}{axis}</svg>'),
        "data:image/svg+xml," + quote(file),
        "data:text/csv," + quote("\n".join(["from,to,rows", *rows]) + "\n"),
    )
