"""Stage `activations`: run a policy over tokenised documents and store what the hooked modules put out.

A dump is cut into parts (jobs) and each part into shards (files). A shard is written whole, then marked as done in the work
folder; a part that is run again recomputes only its unmarked shards. One job checks that every shard is there, adds the
statistics and publishes. Shapes: B documents of a batch, T positions, D channels.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsae.activations import store as zarr_store
from rlsae.activations.store import STORE
from rlsae.activations.tokens import Tokens, stored_bytes
from rlsae.artifacts import digest, input_digests, write_atomically
from rlsae.compute import device
from rlsae.errors import RlsaeError
from rlsae.models import Hook, blocks, component, load, module_path, output_tensor, width
from rlsae.progress import Progress
from rlsae.resumable import FINGERPRINT, LOCK, OUTPUTS, Stage, claim, fingerprint, hold, waiting_lock

BATCH_TOKENS = 8192
"""Tokens of a forward pass, padding included."""


def extract_part(
    settings: dict[str, Any], part: int, stamp: Path, work: Path, policy: Path, weights: Path, tokens_folder: Path
) -> None:
    """Write the shards of one part of a dump that are not yet there.

    Args:
        settings: `hook`, `layers` (None: all), `rows` (at most), `rows_per_part`, `dtype`, `checkpoint`.
        part: number of the part, from 0.
        stamp: file that says that the part is done.
        work: folder shared by all parts of the dump.
        policy: artifact of the policy; weights: its transformers folder.
        tokens_folder: tokens artifact.
    """
    tokens = Tokens.open(tokens_folder)
    model, _ = load(weights, device())
    layers = layers_of_model(model, settings["layers"])
    rows = available_rows(tokens, settings["rows"])
    with join(work, mark(settings, policy, tokens_folder)), hold(work / f"part-{part}.{LOCK}"):
        path = work / OUTPUTS / STORE
        with waiting_lock(work / f"create.{LOCK}"):
            if not (work / "created").exists() or not path.exists():
                shutil.rmtree(work / "done", ignore_errors=True)
                zarr_store.create(
                    path,
                    tokens,
                    rows,
                    layers,
                    width(model),
                    settings["dtype"],
                    settings["rows_per_part"],
                    policy=policy_name(policy, settings["checkpoint"]),
                    inputs=input_digests({"policy": policy, "tokens": tokens_folder}),
                    hook=settings["hook"],
                    modules={str(layer): module_path(model, layer, settings["hook"]) for layer in layers},
                )
                write_atomically(work / "created", "")
        group = zarr.open_group(path, mode="a")
        arrays = {layer: group[f"layer/{layer}/acts"] for layer in layers}
        shards = shards_of_part(part, rows, settings["rows_per_part"], arrays[layers[0]].shards[0])
        truncate(model, layers[-1])
        missing = [(first, stop) for first, stop in shards if not (work / "done" / f"{first}").exists()]
        progress = Progress(f"part {part}", sum(stop - first for first, stop in missing), "rows")
        for first, stop in missing:
            acts = extract_rows(model, tokens, first, stop, layers, settings["hook"])
            for layer in layers:
                # zarr reads a shard before it writes it, and leaves its temporary file behind when it is killed.
                shutil.rmtree(shard_file(path, arrays[layer], layer, first).parent, ignore_errors=True)
                arrays[layer][first:stop] = to_storage(acts[layer], settings["dtype"], layer)
            digests = {str(layer): digest(shard_file(path, arrays[layer], layer, first)) for layer in layers}
            (work / "done").mkdir(exist_ok=True)
            write_atomically(work / "done" / f"{first}", json.dumps(digests))
            progress.update(stop - first)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(stamp, json.dumps({"rows": [list(shard) for shard in shards]}) + "\n")


def consolidate(
    settings: dict[str, Any], out: Path, work: Path, policy: Path, tokens_folder: Path, stamps: Sequence[Path] = ()
) -> None:
    """Check that every shard is there and whole, add the statistics, and publish the store.

    Args:
        stamps: of the parts, in their order; that of a part with a bad shard is deleted, so that the part runs again.

    Raises:
        RlsaeError: names the layer and rows of the first shard that is missing or was changed.
    """
    inputs = {"policy": policy, "tokens": tokens_folder}
    with Stage("activations", out, settings, inputs, work, keep_outputs=True) as stage:
        path = stage.staging / STORE
        if not (work / "created").exists() or not path.exists():
            (work / "created").unlink(missing_ok=True)
            for stamp in stamps:
                stamp.unlink(missing_ok=True)
            raise RlsaeError(f"{work} holds no parts of this dump; run this stage again: all parts will be recomputed")
        group = zarr.open_group(path, mode="r")
        arrays = {int(name): group[f"layer/{name}/acts"] for name in group["layer"].group_keys()}
        layers = sorted(arrays)
        rows, channels = arrays[layers[0]].shape
        for first in range(0, rows, arrays[layers[0]].shards[0]):
            done = work / "done" / f"{first}"
            expected = json.loads(done.read_text()) if done.exists() else {}
            for layer in layers:
                file = shard_file(path, arrays[layer], layer, first)
                if not file.exists() or expected.get(str(layer)) != digest(file):
                    done.unlink(missing_ok=True)
                    for stamp in stamps[first // settings["rows_per_part"] :][:1]:
                        stamp.unlink(missing_ok=True)
                    raise RlsaeError(
                        f"layer {layer}: the shard from row {first} on is missing or damaged ({file}); "
                        "run this stage again: its part will be recomputed"
                    )
        zarr_store.finish(path)
        documents = group["held_out"].shape[0]
        tokens = Tokens.open(tokens_folder)
        dropped = int(tokens.start[documents]) - int(tokens.row_start()[documents])
        stage.publish(
            {
                "documents": documents,
                "rows": rows,
                "dropped_rows": dropped,
                "layers": layers,
                "channels": channels,
                "bytes": stored_bytes(stage.staging),
            }
        )


def policy_name(policy: Path, checkpoint: int | None) -> str:
    """`tiny`, `tiny.ppo` or `tiny.ppo@12`."""
    return policy.name if checkpoint is None else f"{policy.name}@{checkpoint}"


def mark(settings: dict[str, Any], policy: Path, tokens_folder: Path) -> str:
    """Fingerprint that the parts of a dump and their consolidation share."""
    return fingerprint("activations", settings, input_digests({"policy": policy, "tokens": tokens_folder}), 1)


def join(work: Path, own: str) -> IO[str]:
    """Lock a dump's work folder together with its other parts.

    Raises:
        RlsaeError: it is being published, or parts with other settings or inputs are at work in it.
    """
    lock = hold(work / LOCK, shared=True)
    with waiting_lock(work / f"claim.{LOCK}"):
        path = work / FINGERPRINT
        if path.exists() and json.loads(path.read_text()) != own:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RlsaeError(f"{work} is in use by parts of other settings; stop them first") from None
        if not path.exists() or json.loads(path.read_text()) != own:
            claim(work, own)
        fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def shards_of_part(part: int, rows: int, rows_per_part: int, shard_rows: int) -> list[tuple[int, int]]:
    """Row ranges of a part's shards; none where the corpus ends before the part."""
    stop = min(rows, (part + 1) * rows_per_part)
    return [(first, min(first + shard_rows, stop)) for first in range(part * rows_per_part, stop, shard_rows)]


def shard_file(path: Path, array: zarr.Array, layer: int, first: int) -> Path:
    """The file of the shard that starts at row `first`."""
    return path / f"layer/{layer}/acts/c/{first // array.shards[0]}/0"


def available_rows(tokens: Tokens, limit: int) -> int:
    """Rows of a dump: all that the tokens give, at most `limit`."""
    return min(limit, int(tokens.row_start()[-1]))


def layers_of_model(model: PreTrainedModel, layers: list[int] | None) -> list[int]:
    """The asked layers, None meaning all.

    Raises:
        RlsaeError: the model has fewer.
    """
    count = len(blocks(model))
    if layers is None:
        return list(range(count))
    if max(layers) >= count:
        raise RlsaeError(f"layers: layer {max(layers)} is asked for, the model has layers 0 to {count - 1}")
    return sorted(layers)


def truncate(model: PreTrainedModel, last: int) -> None:
    """Cut the blocks behind the last asked layer off, so that a forward pass ends there."""
    kept = blocks(model)
    del kept[last + 1 :]
    model.config.get_text_config().num_hidden_layers = len(kept)


@torch.inference_mode()
def extract_rows(
    model: PreTrainedModel, tokens: Tokens, first: int, stop: int, layers: list[int], hook: Hook
) -> dict[int, NDArray[np.float32]]:
    """Activations of rows `first` to `stop` for each layer [row, D], by one forward pass of their documents."""
    row_start = tokens.row_start()
    begin, end = int(np.searchsorted(row_start, first, "right")) - 1, int(np.searchsorted(row_start, stop))
    kept = {layer: np.empty((stop - first, width(model)), np.float32) for layer in layers}
    modules = {layer: component(blocks(model)[layer], hook) for layer in layers}
    trunk = model.base_model
    for documents in length_buckets(tokens, range(begin, end)):
        ids_BT = padded(tokens, documents)
        # Padding stands on the right, where causal attention cannot see it: no mask is needed.
        captured = capture(trunk, modules, ids_BT.to(model.device))
        for row, document in enumerate(documents):
            low = max(first, row_start[document])
            high = min(stop, row_start[document + 1])
            shift = tokens.drop_positions - row_start[document]
            for layer in layers:
                kept[layer][low - first : high - first] = captured[layer][row, low + shift : high + shift]
    return kept


def capture(trunk: nn.Module, modules: dict[int, nn.Module], ids_BT: Tensor) -> dict[int, NDArray[np.float32]]:
    """What each module puts out in one forward pass [B, T, D]."""
    captured: dict[int, NDArray[np.float32]] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            captured[layer] = output_tensor(output).float().cpu().numpy()

        return hook

    handles = [module.register_forward_hook(keep(layer)) for layer, module in modules.items()]
    try:
        trunk(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def length_buckets(tokens: Tokens, documents: Iterable[int]) -> Iterator[list[int]]:
    """Documents of similar length in batches of at most `BATCH_TOKENS` tokens with padding."""
    lengths = np.diff(tokens.start)
    batch: list[int] = []
    for document in sorted(documents, key=lambda d: (lengths[d], d)):
        if lengths[document] <= tokens.drop_positions:
            continue
        if batch and (len(batch) + 1) * lengths[document] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def padded(tokens: Tokens, documents: list[int]) -> Tensor:
    """Token ids [B, T] of some documents, zeros behind their ends."""
    texts = [tokens.ids(document) for document in documents]
    ids_BT = torch.zeros(len(texts), max(len(ids) for ids in texts), dtype=torch.long)
    for row, ids in enumerate(texts):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return ids_BT


def to_storage(acts_ND: NDArray[np.float32], dtype: str, layer: int) -> NDArray[Any]:
    """Cast rows to the stored format.

    Raises:
        RlsaeError: the model put out NaN or infinity, or a value that float16 cannot hold.
    """
    if not np.isfinite(acts_ND).all():
        raise RlsaeError(f"layer {layer}: the model put out values that are not finite; check its weights")
    largest = float(np.abs(acts_ND).max())
    if largest > float(np.finfo(dtype).max):
        raise RlsaeError(
            f"layer {layer}: a value of {largest:.3g} does not fit {dtype}; set `dtype: float32` in its activation"
        )
    return acts_ND.astype(dtype)
