"""How values are written on the pages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from numbers import Integral
from typing import Any

MISSING = "n/a"
UNITS = ("B", "kB", "MB", "GB", "TB")
SPACES = str.maketrans({" ": "·", "\n": "⏎", "\r": "⏎", "\t": "⇥"})
UNSAFE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"} | {127: "␡"}
UNSAFE |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")
"""Control characters, which HTML cannot hold, and overrides of the direction, which would reach beyond their text."""
LONGEST = 48
"""Characters of a token that are shown."""


def number(value: Any, digits: int = 3, decimals: int | None = None) -> str:
    """Text of a number with thousands separators: `1,234`, `0.0521`, `−1.20`, `n/a`.

    Args:
        digits: significant ones, where the number of decimals is not given.
    """
    if value is None or math.isnan(value):
        return MISSING
    if isinstance(value, Integral):
        text = f"{int(value):,}"
    elif math.isinf(value):
        text = "∞" if value > 0 else "-∞"
    elif decimals is not None:
        text = f"{float(value):,.{decimals}f}"
    elif value == 0:
        text = "0"
    elif abs(value) < 1e-4:
        text = f"{float(value):.{digits - 1}e}"
    else:
        text = f"{float(value):,.{_decimals(float(value), digits)}f}"
    return text.replace("-", "−")


def _decimals(value: float, digits: int) -> int:
    """Decimals that leave so many significant digits after rounding."""
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return max(0, digits - 1 - exponent)


def alike(first: Any, second: Any) -> tuple[str, str]:
    """Texts of two numbers with the decimals of the larger one: `0.03` and `1.76`."""
    if MISSING in (number(first), number(second)):
        return number(first), number(second)
    decimals = _decimals(max(abs(first), abs(second)), 3)
    return number(first, decimals=decimals), number(second, decimals=decimals)


def interval(bounds: Any) -> str:
    """`1.65 to 1.81` of a 95 % interval [low, high]; `n/a` without one."""
    if bounds is None or any(number(bound) == MISSING for bound in bounds):
        return MISSING
    return f"{number(bounds[0])} to {number(bounds[1])}"


def spread(values: Iterable[float]) -> str:
    """`0.30 to 0.33` of several values, one number where they read the same; `n/a` without any."""
    known = [value for value in values if number(value) != MISSING]
    if not known:
        return MISSING
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low} to {high}"


def percent(share: Any) -> str:
    """`1.6 %` of a share of 1."""
    text = number(share * 100 if share is not None else None, 2)
    return text if text == MISSING else f"{text} %"


def size(count: int | None) -> str:
    """`68.7 MB` of a number of bytes."""
    if count is None:
        return MISSING
    power = min((len(str(count)) - 1) // 3, len(UNITS) - 1)
    return f"{number(count / 1000**power if power else count)} {UNITS[power]}"


def listing(items: Iterable[Any]) -> str:
    """`2, 3 and 5`."""
    texts = [str(item) for item in items]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def tenths(share: float) -> int:
    """0 to 9 of a share of 1."""
    return min(int(share * 10), 9)


def visible(token: str) -> str:
    """A token with its spaces, tabs and line ends drawn; a very long one is cut."""
    return (token if len(token) <= LONGEST else token[:LONGEST] + "…").translate(SPACES)


def harmless(value: Any) -> Any:
    """A text with characters that no page may hold drawn or replaced; anything else as it is."""
    return value.translate(UNSAFE) if type(value) is str else value


def quoted(explanation: str) -> str:
    """An explanation with the spaces of the tokens that it quotes (`‹ the›`) drawn."""
    return re.sub("‹(.*?)›", lambda match: f"‹{visible(match[1])}›", explanation, flags=re.DOTALL)
