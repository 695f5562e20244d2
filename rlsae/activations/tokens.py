"""Stage `tokens`: a corpus through a model's tokenizer, once, shared by the base and every policy tuned from it.

`tokens.zarr` is a group of `token` int32 [token], `start` int64 [document + 1] (token range of each document) and, per
document, `document` int32 (its number in the corpus) and `held_out` bool. Documents are shuffled by the corpus's seed, so
that any range of rows is a random sample of documents.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer
from zarr.codecs import Crc32cCodec

from rlsae.artifacts import stored_bytes
from rlsae.corpora import DOCUMENTS
from rlsae.errors import RlsaeError
from rlsae.resumable import Stage

STORE = "store/tokens.zarr"
VECTOR_CHUNK = 1 << 20
WHOLE: Any = {"write_empty_chunks": True}
"""Write chunks of zeros too: a missing file is then always a loss."""


def build_tokens(settings: dict[str, Any], out: Path, work: Path | None, model: Path, corpus: Path) -> None:
    """Tokenise a corpus.

    Args:
        settings: `seed`, `context_length` (tokens) and `drop_positions` of the corpus.
        model: artifact of the base model, whose tokenizer is used.
        corpus: corpus artifact.
    """
    length, drop = settings["context_length"], settings["drop_positions"]
    with Stage("tokens", out, settings, {"model": model, "corpus": corpus}, work) as stage:
        shape = AutoConfig.from_pretrained(model / "model", local_files_only=True, trust_remote_code=False).get_text_config()
        limit = getattr(shape, "max_position_embeddings", length)
        if length > limit:
            raise RlsaeError(f"context_length: {length} tokens, the model's context holds {limit}")
        tokenizer = AutoTokenizer.from_pretrained(model / "model", local_files_only=True, trust_remote_code=False)
        documents = pd.read_parquet(corpus / DOCUMENTS)
        # A stream of its own: the corpus drew its held-out documents from the seed alone, and they would all come first.
        rng = np.random.default_rng([settings["seed"], 1])
        documents = documents.iloc[rng.permutation(len(documents))]
        encoded = tokenizer(documents.text.tolist(), truncation=True, max_length=length)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded])
        if (lengths <= drop).all():
            raise RlsaeError(f"drop_positions: no document has more than {drop} tokens; lower it")

        token = np.concatenate([np.asarray(ids, np.int32) for ids in encoded])
        attributes = {"schema": 1, **settings, "largest": int(token.max())}
        group = zarr.create_group(stage.staging / STORE, attributes=attributes)
        write_vector(group, "token", token, "token")
        write_vector(group, "start", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), "document_edge")
        write_vector(group, "document", documents.document.to_numpy(np.int32), "document")
        write_vector(group, "held_out", documents.held_out.to_numpy(bool), "document")
        consolidate_metadata(group)
        rows = int(np.maximum(lengths - drop, 0).sum())
        dropped = int(lengths.sum()) - rows
        stage.publish(
            {"documents": len(documents), "rows": rows, "dropped_rows": dropped, "bytes": stored_bytes(stage.staging)}
        )


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus; the token ids stay on disk until they are read."""

    token: zarr.Array | NDArray[np.int32]
    start: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    drop_positions: int
    largest: int = 0
    """Largest token id."""

    @classmethod
    def open(cls, artifact: Path) -> Tokens:
        """Read the tokens of an artifact's folder.

        Raises:
            RlsaeError: it holds none.
        """
        if not (artifact / STORE).exists():
            raise RlsaeError(f"{artifact} holds no tokens; run the tokens stage")
        group = zarr.open_group(artifact / STORE, mode="r")
        return cls(
            group["token"],
            group["start"][:],
            group["held_out"][:],
            int(group.attrs["drop_positions"]),
            int(group.attrs["largest"]),
        )

    def ids(self, document: int) -> NDArray[np.int32]:
        """Token ids of one document."""
        return np.asarray(self.token[self.start[document] : self.start[document + 1]])

    def block(self, first: int, stop: int) -> Tokens:
        """The documents from `first` to `stop` alone, in memory."""
        start = self.start[first : stop + 1]
        token = np.asarray(self.token[start[0] : start[-1]])
        return Tokens(token, start - start[0], self.held_out[first:stop], self.drop_positions)

    def row_start(self) -> NDArray[np.int64]:
        """Row range of each document [document + 1]: its tokens but for the dropped first positions."""
        return self._row_start

    @cached_property
    def _row_start(self) -> NDArray[np.int64]:
        rows = np.maximum(np.diff(self.start) - self.drop_positions, 0)
        return np.concatenate([[0], np.cumsum(rows)])


def write_vector(group: zarr.Group, name: str, values: NDArray[Any], dimension: str) -> None:
    """Write a one-dimensional array, uncompressed, in chunks of about a million values with a checksum each."""
    group.create_array(
        name,
        data=values,
        chunks=(min(len(values), VECTOR_CHUNK),),
        compressors=Crc32cCodec(),
        dimension_names=[dimension],
        config=WHOLE,
        overwrite=True,
    )


def consolidate_metadata(group: zarr.Group) -> None:
    """Gather the metadata of a finished group in one file, which xarray reads; plain Zarr v3 readers ignore it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(group.store)
