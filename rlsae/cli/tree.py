"""The facts of an artifact as a tree that people read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Node = tuple[str, list[Any]]
"""A line and the nodes below it."""
SHOWN = 20
"""Entries of a folder, and metrics, that are shown."""
WIDTH = 120
"""Characters of a value that are shown."""
LABELS = {"wall_seconds": "wall time: {} s", "peak_memory_mb": "peak memory: {} MB"}


def render(facts: dict[str, Any]) -> str:
    """What `rlsae.inspection.inspect` found, one fact per line."""
    nodes: list[Node] = [
        ("inputs", [(name, []) for name in facts["inputs"]]),
        ("parameters", _values(facts["parameters"])),
        ("metrics", _first_of(_values(facts["metrics"]), SHOWN)),
    ]
    made = {key: value for key, value in (facts["provenance"] or {}).items() if value is not None}
    lines = {key: LABELS.get(key, f"{key}: {{}}").format(_text(value)) for key, value in made.items()}
    nodes.append(("provenance", [(line, []) for line in lines.values()]))
    nodes = [(name, below) for name, below in nodes if below]
    nodes += [_output(name, output) for name, output in facts["outputs"].items()]
    return "\n".join([f"{facts['artifact']} (stage {facts['stage']}, {_size(facts['bytes'])})", *_lines(nodes, "")])


def _lines(nodes: list[Node], indent: str) -> Iterator[str]:
    for place, (line, below) in enumerate(nodes):
        last = place == len(nodes) - 1
        yield f"{indent}{'└─' if last else '├─'} {line}"
        yield from _lines(below, indent + ("   " if last else "│  "))


def _first_of(nodes: list[Node], count: int) -> list[Node]:
    return nodes if len(nodes) <= count else [*nodes[:count], (f"… and {len(nodes) - count} more", [])]


def _values(values: dict[str, Any], prefix: str = "") -> list[Node]:
    """One node per value of nested settings, under its dotted key."""
    found: list[Node] = []
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        found += _values(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}: {_text(value)}", [])]
    return found


def _text(value: Any) -> str:
    """A value on one line, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ", ".join(map(_text, value)) or "none" if isinstance(value, list) else str(value).replace("\n", "\\n")
    return text if len(text) <= WIDTH else text[:WIDTH] + "…"


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def _shape(shape: list[int] | None) -> str:
    return "none" if shape is None else " × ".join(f"{size:,}" for size in shape) or "scalar"


def _output(name: str, facts: dict[str, Any]) -> Node:
    """A file or folder with what its kind tells."""
    kind, size = facts["kind"], _size(facts["bytes"])
    if kind == "missing":
        return f"{name}: missing", []
    if kind == "damaged":
        return f"{name}: {size}, {facts['problem']}; `rlsae verify` names what is wrong", []
    if kind == "table":
        columns: list[Node] = [(f"{column}: {dtype}", []) for column, dtype in facts["columns"].items()]
        return f"{name}: table of {facts['rows']:,} rows, {size}", columns
    if kind == "tensors":
        shapes: list[Node] = [(f"{key}: {t['dtype']} {_shape(t['shape'])}", []) for key, t in facts["tensors"].items()]
        return f"{name}: tensors, {size}", _first_of(shapes, SHOWN)
    if kind == "transformers":
        sizes = {key: facts[key] for key in ("layers", "width", "vocabulary", "parameters")}
        text = ", ".join(f"{key} {'unknown' if value is None else f'{value:,}'}" for key, value in sizes.items())
        return f"{name}: {facts['architecture']}, {text}, {size}", []
    if kind == "folder":
        entries = [_output(entry, below) for entry, below in facts["entries"].items()]
        return f"{name}: folder of {len(entries)}, {size}", _first_of(entries, SHOWN)
    return (f"{name}: Zarr, {size}", _store(facts)) if kind == "zarr" else (f"{name}: {size}", [])


def _store(facts: dict[str, Any]) -> list[Node]:
    """The arrays of a Zarr group and, of a store of tokens or activations, what they hold."""
    nodes = _values(facts["attributes"])
    for name, array in facts["arrays"].items():
        ratio = "" if array["compression_ratio"] is None else f", ratio {array['compression_ratio']:.2f}"
        shards = f" in shards {_shape(array['shards'])}" if array["shards"] else ""
        shapes = f"{array['dtype']} {_shape(array['shape'])}, chunks {_shape(array['chunks'])}{shards}"
        nodes.append((f"{name}: {shapes}, {_size(array['bytes'])}{ratio}", []))
    if "documents" in facts:
        nodes.append((f"documents: {facts['documents']:,}, {_share(facts['held_out_share'])} held out", []))
    nodes += [(f"layer {layer}: {_norms(norms)}", []) for layer, norms in facts.get("layers", {}).items()]
    if sample := facts.get("sample"):
        row = f"row {sample['row']:,}, position {sample['position']} of " if "row" in sample else ""
        text = sample["text"] if sample["text"] is not None else " ".join(map(str, sample["ids"]))
        nodes.append((f"{row}document {sample['document']:,}", [(text.replace("\n", "\\n"), [])]))
    return nodes


def _norms(norms: dict[str, Any]) -> str:
    if norms["problem"]:
        return f"{norms['problem']}; `rlsae verify` names what is wrong"
    read = f"{norms['rows_read']:,} rows read" + (f", {norms['not_finite']:,} not finite" if norms["not_finite"] else "")
    if norms["mean"] is None:
        return read
    values = ", ".join(f"{key} {norms[key]:.4g}" for key in ("mean", "median", "max"))
    return f"norm {values} (row {norms['max_row']:,}), {_share(norms['outlier_share'])} outliers, {read}"


def _share(share: float | None) -> str:
    return "unknown share" if share is None else f"{100 * share:.3g} %"
