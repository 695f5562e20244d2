"""Contrastive triples of one's own."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlsae.config.probes import Probes
from rlsae.errors import RlsaeError
from rlsae.interpretation.probes.triples import VARIANTS, Triple, Triples, variants


def read_triples(
    entry: Probes, path: Path, polarity: dict[str, float], tokenizer: PreTrainedTokenizerBase, limit: int
) -> Triples:
    """The triples of a file of JSON lines with `context`, `positive`, `negative` and `neutral`, the first `entry.triples`.

    Raises:
        RlsaeError: names file and line where one is not a triple, its words do not have the polarity that they are said to
            have, or it is longer than the model's context; or the file cannot be read or holds none.
    """
    numbered = ((f"{path}, line {number}", line) for number, line in enumerate(_lines(path), 1) if line.strip())
    found = Triples.of((_triple(line, where, polarity, tokenizer, limit) for where, line in numbered), entry)
    if found.table.empty and not found.split:
        raise RlsaeError(f"{path} holds no triples")
    return found


def _triple(line: str, where: str, polarity: dict[str, float], tokenizer: PreTrainedTokenizerBase, limit: int) -> Triple:
    content = _checked(line, where, polarity)
    triple = variants(-1, content["context"].rstrip(), {name: content[name] for name in VARIANTS}, polarity, tokenizer)
    if triple.longest > limit:
        raise RlsaeError(f"{where}: {triple.longest} tokens, the model's context holds {limit}; shorten the context")
    return triple


def _lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8-sig").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RlsaeError(f"cannot read {path}: {error}") from None


def _checked(line: str, where: str, polarity: dict[str, float]) -> dict[str, str]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise RlsaeError(f"{where}: not valid JSON: {error}") from None
    for key in ("context", *VARIANTS):
        if not isinstance(content, dict) or not isinstance(content.get(key), str):
            raise RlsaeError(
                f"{where}: expected an object with the texts context, positive, negative and neutral; {key} is none"
            )
        if not content[key].strip() or (key != "context" and len(content[key].split()) != 1):
            raise RlsaeError(
                f"{where}: {key}: expected {'a text' if key == 'context' else 'one word'}, found {content[key]!r:.60}"
            )
    for key, fits, expected in (
        ("positive", lambda value: value > 0, "a word of positive polarity"),
        ("negative", lambda value: value < 0, "a word of negative polarity"),
        ("neutral", lambda value: value == 0, "a word that is not in the lexicon"),
    ):
        value = polarity.get(content[key].lower(), 0.0)
        if not fits(value):
            raise RlsaeError(f"{where}: {key}: expected {expected}, {content[key]!r} has {value:g} in the lexicon")
    return content
