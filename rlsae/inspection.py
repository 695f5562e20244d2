"""What an artifact holds, for people and for scripts, told from headers and a bounded sample of rows.

Nothing here reads a whole array or loads a weight: a store of any size is described in seconds.
Shapes: N rows, D channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from rlsae.artifacts import MANIFEST, PROVENANCE, Manifest, artifact_id, stored_bytes
from rlsae.errors import RlsaeError
from rlsae.layout import LAYER_KEYS, WIDTH_KEYS, model_of
from rlsae.statistics import OUTLIER

PIECES, PIECE_ROWS = 16, 4096
"""Rows are sampled in pieces spread evenly over a layer: at most 65,536 of them."""
CONTEXT = 12
"""Tokens on either side of the row that is shown in its context."""
SHOWN_TOKENS = 64
"""Tokens of the document that is shown."""
MADE_BY = ("rlsae", "commit", "device", "threads", "wall_seconds", "peak_memory_mb")
SIZES = {"layers": LAYER_KEYS, "width": WIDTH_KEYS, "vocabulary": ("vocab_size",)}
"""What configurations of transformers call these, by family."""
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError)
"""What the readers of damaged JSON, Parquet, safetensors and Zarr raise."""


def inspect(folder: Path) -> dict[str, Any]:
    """The facts of an artifact, ready for JSON: no NaN, the same keys for every artifact and for every kind of output.

    `outputs` maps each name to its `kind` (`transformers`, `table`, `tensors`, `zarr`, `folder`, `file`, `missing`,
    `damaged`), its `bytes` on disk and what that kind tells.

    Raises:
        RlsaeError: the folder has no manifest, or none that this version can read.
    """
    if not (folder / MANIFEST).exists():
        raise RlsaeError(f"{folder} has no {MANIFEST}; expected the folder of an artifact, such as results/models/tiny")
    manifest = Manifest.read(folder)
    identity = artifact_id(folder, manifest.stage)
    models = folder.absolute().parents[len(Path(identity).parts) - 1] / "models"
    base = next((Path(name).name for name in manifest.inputs if name.startswith("models/")), None)
    try:
        content = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        made = {key: content.get(key) for key in MADE_BY}
    except (OSError, ValueError, AttributeError):
        made = None
    facts = {
        "artifact": identity,
        "stage": manifest.stage,
        "bytes": stored_bytes(folder),
        "inputs": manifest.inputs,
        "parameters": manifest.parameters,
        "metrics": manifest.metrics,
        "provenance": made,
        "outputs": {name: _describe(folder / name, models, base) for name in sorted(manifest.outputs)},
    }
    return _without_nan(facts)


def tensor_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name → `dtype`, `shape`, `data_offsets` of each tensor of a safetensors file, without its data.

    Raises:
        ValueError: the file is no safetensors file, or is longer or shorter than its header says.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the header is cut or is none of safetensors")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if expected != path.stat().st_size:
        raise ValueError(f"{path.stat().st_size} bytes, its header asks for {expected}")
    return header


def why(error: Exception) -> str:
    """One line that says why something cannot be read."""
    if isinstance(error, KeyError):
        return "it is not there"
    return "its checksum does not hold" if "checksum" in str(error) else str(error).partition("\n")[0]


def _without_nan(value: Any) -> Any:
    """Values as JSON has them: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- outputs -----------------------------------------------------------------------------------------------------


def _describe(path: Path, models: Path, base: str | None) -> dict[str, Any]:
    """The facts of one file or folder; `models` is where base models lie, `base` the one of the artifact's inputs."""
    if not path.exists():
        return {"kind": "missing", "bytes": 0}
    facts = {"kind": "file", "bytes": stored_bytes(path)}
    try:
        if (path / "zarr.json").exists():
            return facts | {"kind": "zarr"} | _zarr(path, models, base)
        if (path / "config.json").exists():
            return facts | {"kind": "transformers"} | _transformers(path)
        if path.suffix == ".safetensors":
            tensors = {name: {"dtype": t["dtype"], "shape": t["shape"]} for name, t in tensor_header(path).items()}
            return facts | {"kind": "tensors", "tensors": tensors}
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            file = parquet.ParquetFile(path)
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            return facts | {"kind": "table", "rows": file.metadata.num_rows, "columns": columns}
    except UNREADABLE as error:
        return facts | {"kind": "damaged", "problem": f"cannot be read: {why(error)}"}
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        return facts | {"kind": "folder", "entries": {e.name: _describe(e, models, base) for e in entries}}
    return facts


def _transformers(path: Path) -> dict[str, Any]:
    """Sizes of a model; `parameters` counts what its weight files hold, shared weights once."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    tensors = [tensor for file in sorted(path.glob("*.safetensors")) for tensor in tensor_header(file).values()]
    sizes = {name: next((text[key] for key in keys if key in text), None) for name, keys in SIZES.items()}
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    return {"architecture": architecture, **sizes, "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors)}


def _zarr(path: Path, models: Path, base: str | None) -> dict[str, Any]:
    group = zarr.open_group(path, mode="r")
    arrays = {}
    for name, array in sorted(group.members(max_depth=None)):
        if isinstance(array, zarr.Array):
            stored = stored_bytes(path / name / "c")
            sizes: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype), "chunks": list(array.chunks)}
            sizes["shards"] = list(array.shards) if array.shards else None
            arrays[name] = sizes | {"bytes": stored, "compression_ratio": array.nbytes / stored if stored else None}
    facts: dict[str, Any] = {"attributes": dict(group.attrs), "arrays": arrays}
    if not {"token", "start", "held_out"} <= set(arrays):
        return facts
    policy = group.attrs.get("policy")
    tokenizer = _tokenizer(models, model_of(str(policy)) if policy else base)
    start, held_out = group["start"][:], group["held_out"][:]
    facts |= {"documents": len(held_out), "held_out_share": float(held_out.mean()) if len(held_out) else None}
    if "layer" not in group:
        return facts | {"sample": _sample_document(group, start, tokenizer)}
    layers = sorted(int(name) for name in group["layer"].group_keys())
    facts |= {"rows": int(start[-1]), "layers": {str(layer): _norms(path, group, layer) for layer in layers}}
    return facts | {"sample": _sample_row(group, start, tokenizer)}


def _norms(path: Path, group: zarr.Group, layer: int) -> dict[str, Any]:
    """Statistics of the row norms of a sample; they are null, and `problem` says why, where rows cannot be read."""
    names = ("rows_read", "not_finite", "mean", "median", "max", "max_row", "outlier_share", "problem")
    facts: dict[str, Any] = dict.fromkeys(names)
    acts = group[f"layer/{layer}/acts"]
    for shard in group[f"layer/{layer}"].attrs.get("shards", []):
        file = path / f"layer/{layer}/acts/c/{shard['rows'][0] // acts.shards[0]}/0"
        if not file.exists() or file.stat().st_size != shard["bytes"]:
            return facts | {
                "problem": f"the shard of rows {shard['rows'][0]} to {shard['rows'][1] - 1} is missing or has another size"
            }
    edges = np.linspace(0, acts.shape[0], PIECES + 1).astype(int).tolist()
    pieces = [slice(first, min(stop, first + PIECE_ROWS)) for first, stop in pairwise(edges)]
    try:
        norm_N = np.concatenate([np.linalg.norm(acts[piece].astype(np.float64), axis=1) for piece in pieces])
    except UNREADABLE as error:
        return facts | {"problem": f"rows cannot be read: {why(error)}"}
    row_N, read = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces]), len(norm_N)
    row_N, norm_N = row_N[np.isfinite(norm_N)], norm_N[np.isfinite(norm_N)]
    facts |= {"rows_read": read, "not_finite": read - len(norm_N)}
    if len(norm_N):
        median = float(np.median(norm_N))
        facts |= {"mean": float(norm_N.mean()), "median": median}
        facts |= {"max": float(norm_N.max()), "max_row": int(row_N[norm_N.argmax()])}
        facts["outlier_share"] = float((norm_N > OUTLIER * median).mean()) if median else None
    return facts


def _tokenizer(models: Path, model: str | None) -> Any:
    """The tokenizer of a base model; None where there is none that can be read."""
    path = models / (model or "") / "model" / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises nothing narrower
        return None


def _decode(tokenizer: Any, ids: Sequence[int] | NDArray[Any]) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _sample_document(group: zarr.Group, start: NDArray[Any], tokenizer: Any) -> dict[str, Any] | None:
    """The beginning of the document in the middle of the corpus."""
    if len(start) < 2:
        return None
    place = (len(start) - 1) // 2
    ids = group["token"][start[place] : min(start[place + 1], start[place] + SHOWN_TOKENS)]
    text = _decode(tokenizer, ids) if tokenizer else None
    return {"document": place, "tokens": int(start[place + 1] - start[place]), "ids": ids.tolist(), "text": text}


def _sample_row(group: zarr.Group, start: NDArray[Any], tokenizer: Any) -> dict[str, Any] | None:
    """The row in the middle of the store between its neighbours; `place` is where in `ids` its own token stands."""
    if not start[-1]:
        return None
    row = int(start[-1]) // 2
    document, position = int(group["document"][row]), int(group["position"][row])
    low = max(int(start[document]), row - CONTEXT)
    ids, place = group["token"][low : min(int(start[document + 1]), row + CONTEXT + 1)], row - low
    parts = (ids[:place], ids[place : place + 1], ids[place + 1 :])
    text = "{}‹{}›{}".format(*(_decode(tokenizer, part) for part in parts)) if tokenizer else None
    return {"row": row, "document": document, "position": position, "place": place, "ids": ids.tolist(), "text": text}
