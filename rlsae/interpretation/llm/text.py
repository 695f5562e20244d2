"""How prompts are filled, and how windows look in them: as JSON strings, which no text inside them can leave."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.windows import Window

HIGHLIGHT = 0.3
"""Share of the largest activation above which a token is highlighted (as in delphi)."""
OPEN, CLOSE = "\ue000", "\ue001"
"""Stand for << and >> until those of the corpus are broken up; characters of private use."""
LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x7f\x85\u2028\u2029"}


@cache
def _template(name: str) -> Template:
    return Template((Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8").strip())


def prompt(name: str, **values: str | int) -> str:
    """The prompt of a file, with its `$names` filled."""
    return _template(name).substitute(values)


def quoted(text: str) -> str:
    """A text as a JSON string on one line; halves of characters, which tokenizers refuse, become question marks."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return json.dumps(whole, ensure_ascii=False).translate(LINE_BREAKS)


def numbered(texts: Sequence[str]) -> str:
    """Texts as JSON strings, one a line, numbered from 1."""
    return "\n".join(f"{number}. {quoted(text)}" for number, text in enumerate(texts, 1))


def plain(window: Window) -> str:
    return "".join(window.tokens)


def highlighted(window: Window, mark_T: NDArray[np.bool_]) -> str:
    """A window's text with the marked stretches of tokens between << and >>; those of the text itself are broken up."""
    text = ""
    for marked, stretch in itertools.groupby(zip(window.tokens, mark_T.tolist(), strict=True), key=lambda pair: pair[1]):
        part = re.sub(f"[{OPEN}{CLOSE}]", "", "".join(token for token, _ in stretch))
        text += f"{OPEN}{part}{CLOSE}" if marked else part
    text = re.sub(f"<(?=[<{OPEN}])|[>{CLOSE}](?=>)", r"\g<0> ", text)
    return text.replace(OPEN, "<<").replace(CLOSE, ">>")
