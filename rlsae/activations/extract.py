"""Stage `activations`: run a policy over tokenised documents and store what the hooked modules put out.

A dump is cut into parts (jobs) and each part into shards (files). A shard is written whole, then marked as done in the work
folder; a part that is run again recomputes only its unmarked shards. One job checks that every shard is there, adds the
statistics and publishes. Shapes: B documents of a batch, T positions, D channels.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlsae.activations import store as zarr_store
from rlsae.activations.store import STORE, shard_file
from rlsae.activations.tokens import Tokens, consolidate_metadata
from rlsae.artifacts import input_digests, stored_bytes, write_atomically
from rlsae.compute import device
from rlsae.errors import RlsaeError
from rlsae.models import Hook, blocks, component, load, module_path, output_tensor
from rlsae.progress import Progress
from rlsae.resumable import FINGERPRINT, FINISHED, LOCK, OUTPUTS, Stage, claim, fingerprint, hold, waiting_lock

BATCH_TOKENS = 4096
"""Tokens of a forward pass, padding included."""


def extract_part(
    settings: dict[str, Any], part: int, stamp: Path, work: Path, policy: Path, weights: Path, tokens_folder: Path
) -> None:
    """Write the shards of one part of a dump that are not yet there.

    Args:
        settings: `hook`, `layers` (None: all), `rows` (at most), `rows_per_part`, `dtype`, `precision` of the
            forward pass, `codec`, `checkpoint`.
        part: number of the part, from 0.
        stamp: file that says that the part is done.
        work: folder shared by all parts of the dump.
        policy: artifact of the policy; weights: its transformers folder.
        tokens_folder: tokens artifact.
    """
    tokens = Tokens.open(tokens_folder)
    model, _ = load(weights, device())
    check_vocabulary(model, tokens)
    layers = layers_of_model(model, settings["layers"])
    modules = {str(layer): module_path(model, layer, settings["hook"]) for layer in layers}
    capture = Capture(model.to(getattr(torch, settings["precision"])), layers, settings["hook"], settings["dtype"])
    rows = available_rows(tokens, settings["rows"])
    with join(work, mark(settings, policy, tokens_folder)), hold(work / f"part-{part}.{LOCK}"):
        path = work / OUTPUTS / STORE
        finished = (work / FINISHED).exists() and path.exists()
        with waiting_lock(work / f"create.{LOCK}"):
            if not finished and not ((work / "created").exists() and path.exists()):
                shutil.rmtree(work / "done", ignore_errors=True)
                channels = capture.width
                check_space(work, rows * channels * len(layers) * np.dtype(settings["dtype"]).itemsize)
                zarr_store.create(
                    path,
                    tokens,
                    rows,
                    layers,
                    channels,
                    settings["dtype"],
                    settings["rows_per_part"],
                    settings["codec"],
                    policy=policy_name(policy, settings["checkpoint"]),
                    inputs=input_digests({"policy": policy, "tokens": tokens_folder}),
                    hook=settings["hook"],
                    precision=settings["precision"],
                    modules=modules,
                )
                (work / "done").mkdir()
                write_atomically(work / "created", "")
        group = zarr.open_group(path, mode="a")
        arrays = {layer: group[f"layer/{layer}/acts"] for layer in layers}
        shards = shards_of_part(part, rows, settings["rows_per_part"], arrays[layers[0]].shards[0])
        missing = [(first, stop) for first, stop in shards if not finished and not (work / "done" / f"{first}").exists()]
        progress = Progress(f"part {part}", sum(stop - first for first, stop in missing), "rows")
        with ThreadPoolExecutor(1) as writer:
            # One shard is written while the next one is computed; never more, so that memory stays flat.
            pending: Future[None] | None = None
            buffers: Iterator[dict[int, NDArray[Any]]] = cycle([{}, {}])
            for first, stop in missing:
                acts = capture.rows(tokens, first, stop, next(buffers))
                if pending is not None:
                    pending.result()
                pending = writer.submit(write_shards, path, arrays, acts, first, work / "done" / f"{first}")
                progress.update(stop - first)
            if pending is not None:
                pending.result()
        stamp.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(stamp, json.dumps({"rows": [list(shard) for shard in shards]}) + "\n")


def write_shards(path: Path, arrays: dict[int, zarr.Array], acts: dict[int, NDArray[Any]], first: int, done: Path) -> None:
    """Write the rows from `first` on to every layer's shard, then note that they are done, with what they hold."""
    facts = {str(layer): zarr_store.write_shard(path, array, layer, first, acts[layer]) for layer, array in arrays.items()}
    write_atomically(done, json.dumps(facts))


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
        written: dict[int, list[dict[str, Any]]] = {layer: [] for layer in layers}
        for first in range(0, rows, arrays[layers[0]].shards[0]):
            done = work / "done" / f"{first}"
            facts = json.loads(done.read_text()) if done.exists() else {}
            for layer in layers:
                if str(layer) not in facts or not zarr_store.is_whole(path, arrays[layer], layer, facts[str(layer)]):
                    done.unlink(missing_ok=True)
                    for stamp in stamps[first // settings["rows_per_part"] :][:1]:
                        stamp.unlink(missing_ok=True)
                    raise RlsaeError(
                        f"layer {layer}: the shard from row {first} on is missing or damaged "
                        f"({shard_file(path, arrays[layer], layer, first)}); "
                        "run this stage again: its part will be recomputed"
                    )
                written[layer].append(facts[str(layer)])
        digests: dict[Path, str] = {}
        for layer in layers:
            digests |= zarr_store.finish(path, layer, written[layer])
        consolidate_metadata(zarr.open_group(path, mode="a"))
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
            },
            digests,
        )


def check_vocabulary(model: PreTrainedModel, tokens: Tokens) -> None:
    """
    Raises:
        RlsaeError: the tokens hold ids that the model has no embedding for: they are another model's.
    """
    size, largest = model.get_input_embeddings().weight.shape[0], tokens.largest
    if largest >= size:
        raise RlsaeError(f"the tokens go up to id {largest}, the model embeds {size}: they were made for another model")


def check_space(work: Path, needed: int) -> None:
    """
    Raises:
        RlsaeError: the disk has too little room for a store of so many bytes.
    """
    free = shutil.disk_usage(work).free
    if needed > free:
        raise RlsaeError(
            f"the store needs {needed / 1e9:.2f} GB, the disk of {work} has {free / 1e9:.2f} GB free; lower `rows`, choose "
            "fewer layers, or run in another folder"
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


class Capture:
    """Runs a model up to its last asked layer and keeps what the hooked modules put out.

    The head never runs, nor do the blocks behind the last asked layer. Padding stands on the right, where causal attention
    cannot see it, so that no mask is needed.
    """

    def __init__(self, model: PreTrainedModel, layers: list[int], hook: Hook, dtype: str) -> None:
        truncate(model, layers[-1])
        self.trunk, self.layers, self.dtype = model.base_model, layers, getattr(torch, dtype)
        self.modules = {layer: component(blocks(model)[layer], hook) for layer in layers}
        self.width = self._channels()

    @torch.inference_mode()
    def __call__(self, ids_BT: Tensor) -> dict[int, Tensor]:
        """The output of each hooked module [B, T, D] in one forward pass."""
        captured: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            return lambda module, arguments, output: captured.__setitem__(layer, output_tensor(output))

        handles = [module.register_forward_hook(keep(layer)) for layer, module in self.modules.items()]
        try:
            self.trunk(input_ids=ids_BT.to(self.trunk.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return captured

    def _channels(self) -> int:
        """Width D of the hooked outputs.

        Raises:
            RlsaeError: it differs between layers, or what is hooked is no row of channels per token.
        """
        shapes = {layer: tuple(acts.shape) for layer, acts in self(torch.zeros(1, 2, dtype=torch.long)).items()}
        if len(set(shapes.values())) != 1 or len(shapes[self.layers[0]]) != 3 or shapes[self.layers[0]][:2] != (1, 2):
            raise RlsaeError(f"hook: expected one row of channels per token, of one width in all layers; found {shapes}")
        return shapes[self.layers[0]][2]

    def rows(
        self, tokens: Tokens, first: int, stop: int, buffers: dict[int, NDArray[Any]] | None = None
    ) -> dict[int, NDArray[Any]]:
        """Activations of rows `first` to `stop` for each layer [row, D], in the stored format.

        Args:
            buffers: arrays by layer to fill, at least so long; what is left out is added. Reused, they save the machine the
                first touch of new memory, which costs as much as a copy to disk.
        """
        buffers = {} if buffers is None else buffers
        row_start = tokens.row_start()
        begin, end = documents_of(tokens, first, stop)
        block = tokens.block(begin, end)
        low_D = np.maximum(row_start[begin:end], first)
        high_D = np.maximum(np.minimum(row_start[begin + 1 : end + 1], stop), low_D)
        position_D = low_D - row_start[begin:end] + tokens.drop_positions
        rows_ND = {layer: self._buffer(buffers, layer, stop - first) for layer in self.layers}
        for documents in length_buckets(block, range(end - begin)):
            for layer, acts_BTD in self(padded(block, documents)).items():
                stored_BTD = acts_BTD.to(self.dtype).cpu().numpy()
                for place, document in enumerate(documents):
                    low, high, position = low_D[document], high_D[document], position_D[document]
                    rows_ND[layer][low - first : high - first] = stored_BTD[place, position : position + high - low]
        return rows_ND

    def _buffer(self, buffers: dict[int, NDArray[Any]], layer: int, rows: int) -> NDArray[Any]:
        if len(buffers.get(layer, ())) < rows:
            buffers[layer] = torch.empty(rows, self.width, dtype=self.dtype).numpy()
        return buffers[layer][:rows]


def documents_of(tokens: Tokens, first: int, stop: int) -> tuple[int, int]:
    """The range of documents that rows `first` to `stop` belong to."""
    row_start = tokens.row_start()
    return int(np.searchsorted(row_start, first, "right")) - 1, int(np.searchsorted(row_start, stop))


def length_buckets(tokens: Tokens, documents: Sequence[int]) -> Iterator[list[int]]:
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
