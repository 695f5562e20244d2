"""Documents: written by a grammar, read from a local file, or loaded from the hub.

The artifact is `documents.parquet`: `document` (position in the source), `text`, `held_out`; generated reviews also have
`label`, the sign of their polarity. Held-out documents train nothing in any later stage.
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
from rlsae.resumable import Stage
from rlsae.review_grammar import write_reviews

DOCUMENTS = "documents.parquet"


def build_corpus(entry: AnyCorpus, settings: dict[str, Any], out: Path, work: Path | None, source: Path | None) -> None:
    """Stage `corpora`: write a corpus's documents.

    Args:
        entry: where the documents come from, and how many.
        settings: what the manifest records.
        out: folder of the artifact.
        source: the local file of a file corpus.
    """
    with Stage("corpora", out, settings, {"source": source} if source else {}, work) as stage:
        documents = read_documents(entry, source)
        documents.to_parquet(stage.staging / DOCUMENTS, index=False)
        stage.publish({"documents": len(documents), "held_out": int(documents.held_out.sum())})


def read_documents(entry: AnyCorpus, source: Path | None = None) -> pd.DataFrame:
    """The documents of a corpus, thinned and split by its seed.

    Raises:
        RlsaeError: no documents, a document that is no text, or too few for the asked number or split.
    """
    rng = np.random.default_rng(entry.seed)
    if isinstance(entry, GeneratedCorpus):
        documents = write_reviews(entry.documents, rng)
    elif isinstance(entry, FileCorpus):
        assert source is not None
        documents = pd.DataFrame({"text": check_texts(_read_file(source, entry.text_field), str(source))})
    else:
        documents = pd.DataFrame({"text": check_texts(_read_hub(entry), entry.dataset)})
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


def _read_file(path: Path, field: str) -> list[Any]:
    """Texts of a .jsonl, .parquet or .txt file, the first and last also as .gz."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise RlsaeError(f"{path} is not a readable Parquet file: {error}") from None
        if field not in table:
            raise RlsaeError(f"{path} has no column {field!r}; it has: {', '.join(map(str, table.columns))}; set text_field")
        return table[field].tolist()
    lines = _read_lines(path)
    if name.endswith(".txt"):
        return [line for line in lines if line.strip()]
    if name.endswith(".jsonl"):
        return [_json_text(path, number, line, field) for number, line in enumerate(lines) if line.strip()]
    raise RlsaeError(f"{path}: expected a name that ends in .jsonl, .parquet or .txt (or .jsonl.gz, .txt.gz)")


def _read_lines(path: Path) -> list[str]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RlsaeError(f"cannot read {path}: {error}") from None
    try:
        return io.StringIO(raw.decode("utf-8"), newline=None).read().split("\n")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n")
        raise RlsaeError(f"{path}, document {number} (line {number + 1}): not valid UTF-8; convert the file first") from None


def _json_text(path: Path, number: int, line: str, field: str) -> Any:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise RlsaeError(f"{path}, document {number} (line {number + 1}): not valid JSON: {error}") from None
    if not isinstance(content, dict) or field not in content:
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise RlsaeError(f"{path}, document {number} (line {number + 1}): no key {field!r}; found: {found}; set text_field")
    return content[field]


def _read_hub(entry: HubCorpus) -> list[Any]:
    import datasets

    try:
        table = datasets.load_dataset(entry.dataset, entry.subset, split=entry.split, revision=entry.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RlsaeError(
            f"cannot load the data set {entry.dataset} (split {entry.split}): {error}\n"
            f"Offline? Download it where there is a network: "
            f"python -c \"import datasets; datasets.load_dataset('{entry.dataset}', split='{entry.split}')\""
        ) from None
    if entry.text_field not in table.column_names:
        raise RlsaeError(f"{entry.dataset} has no column {entry.text_field!r}; it has: {', '.join(table.column_names)}")
    return list(table[entry.text_field])
