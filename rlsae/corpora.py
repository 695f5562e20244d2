"""Documents and preference pairs: written by a grammar, read from a local file, or loaded from the hub.

The artifact is `documents.parquet`: `document` (position in the source), `text`, `held_out`; generated reviews also have
`label`, the sign of their polarity. Of preferences it is `pairs.parquet`: `document`, `prompt`, `chosen`, `rejected`,
`held_out`. What is held out trains nothing in any later stage.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlsae.config import AnyCorpus, FileCorpus, GeneratedCorpus, HubCorpus
from rlsae.errors import RlsaeError
from rlsae.hub import load_rows
from rlsae.preferences import check_pairs, write_pairs
from rlsae.resumable import Stage
from rlsae.review_grammar import write_reviews

DOCUMENTS = "documents.parquet"
PAIRS = "pairs.parquet"


def build_corpus(entry: AnyCorpus, settings: dict[str, Any], out: Path, work: Path | None, source: Path | None) -> None:
    """Stage `corpora`: write a corpus's documents or preference pairs.

    Args:
        entry: where they come from, and how many.
        settings: what the manifest records.
        out: folder of the artifact.
        source: the local file of a file corpus.
    """
    with Stage("corpora", out, settings, {"source": source} if source else {}, work) as stage:
        documents = read_documents(entry, source)
        documents.to_parquet(stage.staging / (DOCUMENTS if entry.kind == "documents" else PAIRS), index=False)
        stage.publish({"documents": len(documents), "held_out": int(documents.held_out.sum())})


def read_documents(entry: AnyCorpus, source: Path | None = None) -> pd.DataFrame:
    """The documents or pairs of a corpus, thinned and split by its seed.

    Raises:
        RlsaeError: no documents, a document that is no text or no pair, or too few for the asked number or split.
    """
    rng = np.random.default_rng(entry.seed)
    if isinstance(entry, GeneratedCorpus):
        write = write_reviews if entry.kind == "documents" else write_pairs
        documents = write(entry.documents, rng)
    elif entry.kind == "preferences":
        documents = check_pairs(_read_rows(entry, source, ("chosen", "rejected")), _name(entry, source))
    else:
        texts = [row[entry.text_field] for row in _read_rows(entry, source, (entry.text_field,))]
        documents = pd.DataFrame({"text": check_texts(texts, _name(entry, source))})
    documents.insert(0, "document", np.arange(len(documents), dtype=np.int32))
    if entry.documents and len(documents) < entry.documents:
        raise RlsaeError(f"documents: {entry.documents} are asked for, the source has {len(documents)}; ask for fewer")
    if entry.documents and len(documents) > entry.documents:
        keep = np.sort(rng.permutation(len(documents))[: entry.documents])
        documents = documents.iloc[keep].reset_index(drop=True)
    held_out = np.zeros(len(documents), dtype=bool)
    held_out[rng.permutation(len(documents))[: round(entry.held_out * len(documents))]] = True
    if entry.held_out and not 0 < held_out.sum() < len(documents):
        raise RlsaeError(
            f"held_out: a share of {entry.held_out} of {len(documents)} documents leaves one side empty; "
            "use more documents or another share"
        )
    documents["held_out"] = held_out
    return documents


def check_texts(texts: list[Any], source: str) -> list[str]:
    """The texts themselves, if every one is a text and not only white space.

    Raises:
        RlsaeError: names the first document that is not, or says that there is none.
    """
    if not texts:
        raise RlsaeError(f"{source} holds no documents")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RlsaeError(f"{source}, document {number}: expected a text, found {type(text).__name__} {text!r:.60}")
        if not text.strip():
            raise RlsaeError(f"{source}, document {number}: the text is empty; remove it from the corpus")
    return texts


def _name(entry: FileCorpus | HubCorpus, source: Path | None) -> str:
    return str(source) if isinstance(entry, FileCorpus) else entry.dataset


def _read_rows(entry: FileCorpus | HubCorpus, source: Path | None, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a file or a data set, each with these fields at least.

    Raises:
        RlsaeError: the source cannot be read, or a row lacks a field.
    """
    if isinstance(entry, HubCorpus):
        return _read_hub(entry, fields)
    assert source is not None
    name = source.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        try:
            table = pd.read_parquet(source)
        except (OSError, ValueError) as error:
            raise RlsaeError(f"{source} is not a readable Parquet file: {error}") from None
        _require(fields, [str(column) for column in table.columns], f"{source} has no column")
        return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    if name.endswith(".txt") and entry.kind == "documents":
        return [{entry.text_field: line} for line in _read_lines(source) if line.strip()]
    if name.endswith(".jsonl"):
        return [_json_row(source, number, line, fields) for number, line in enumerate(_read_lines(source)) if line.strip()]
    expected = (
        ".jsonl, .parquet or .txt (or .jsonl.gz, .txt.gz)" if entry.kind == "documents" else ".jsonl, .jsonl.gz or .parquet"
    )
    raise RlsaeError(f"{source}: expected a name that ends in {expected}")


def _require(fields: tuple[str, ...], found: list[str], complaint: str) -> None:
    missing = next((field for field in fields if field not in found), None)
    if missing is not None:
        advice = "; set text_field" if len(fields) == 1 else "; preferences need chosen and rejected"
        raise RlsaeError(f"{complaint} {missing!r}; it has: {', '.join(found)}{advice}")


def _read_lines(path: Path) -> list[str]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RlsaeError(f"cannot read {path}: {error}") from None
    try:
        return io.StringIO(raw.decode("utf-8-sig"), newline=None).read().split("\n")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n")
        raise RlsaeError(f"{path}, document {number} (line {number + 1}): not valid UTF-8; convert the file first") from None


def _json_row(path: Path, number: int, line: str, fields: tuple[str, ...]) -> dict[str, Any]:
    where = f"{path}, document {number} (line {number + 1})"
    try:
        content = json.loads(line)
    except ValueError as error:
        raise RlsaeError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RlsaeError(f"{where}: expected an object, found {type(content).__name__}")
    _require(fields, list(content), f"{where}: no key")
    return content


def _read_hub(entry: HubCorpus, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    table = load_rows(entry.dataset, entry.subset, entry.split, entry.revision)
    _require(fields, table.column_names, f"{entry.dataset} has no column")
    kept = [name for name in ("prompt", *fields) if name in table.column_names]
    return list(table.select_columns(kept))
