"""Small artifacts, written straight to disk, for the tests of the stages behind the tunings."""

from __future__ import annotations

import json
import os

import numpy as np
import torch
import zarr
from transformers import AutoConfig, AutoModelForCausalLM

from rlsae.activations import store as zarr_store
from rlsae.activations import tokens as token_store
from rlsae.activations.extract import consolidate, extract_part
from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens, consolidate_metadata, write_vector
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.models import save

DUMP = {"checkpoint": None, "hook": "mlp", "layers": None, "rows": 10_000, "rows_per_part": 64, "dtype": "float16"}
DUMP |= {"precision": "float32", "codec": None}


class Payload:
    """Whoever unpickles it creates a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def finish(folder, stage, **content):
    """Make a folder an artifact: it gets a manifest. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"parameters": {}, "inputs": {}, "outputs": {}, "metrics": {}} | content
    (folder / MANIFEST).write_text(Manifest(stage, **values).to_json())
    return folder


def write_policy(folder, model, tokenizer):
    """An artifact of a base model."""
    save(model, tokenizer, folder / "model")
    return finish(folder, "models")


def tiny_model(family, layers=3, vocabulary=64, width=16):
    """A random model without a tokenizer, narrow and with some layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = AutoConfig.for_model(family, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes)
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 24
    return AutoModelForCausalLM.from_config(config).eval()


def random_documents(lengths, vocabulary=320, seed=0):
    """Token ids of documents with these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary, length, dtype=np.int32) for length in lengths]


def tokens_of(documents, held_out=None, drop_positions=0):
    """Tokenised documents in memory; every fourth one is held out."""
    held_out = np.arange(len(documents)) % 4 == 3 if held_out is None else np.asarray(held_out)
    start = np.concatenate([[0], np.cumsum([len(ids) for ids in documents])])
    return Tokens(np.concatenate(documents).astype(np.int32), start, held_out, drop_positions)


def write_tokens(folder, tokens):
    """A tokens artifact with these tokens."""
    attributes = {"schema": 1, "drop_positions": tokens.drop_positions, "largest": int(tokens.token.max())}
    group = zarr.create_group(folder / token_store.STORE, attributes=attributes, overwrite=True)
    write_vector(group, "token", tokens.token, "token")
    write_vector(group, "start", tokens.start, "document_edge")
    write_vector(group, "document", np.arange(len(tokens.held_out), dtype=np.int32), "document")
    write_vector(group, "held_out", tokens.held_out, "document")
    consolidate_metadata(group)
    # A manifest that tells tokens apart, as the digests of a real one do.
    return finish(folder, "tokens", metrics={"tokens": tokens.token.tolist(), "drop": tokens.drop_positions})


def write_store(folder, tokens, acts, rows_per_part=64, dtype="float32", hook="mlp"):
    """An activations artifact that holds these rows by layer."""
    path = folder / zarr_store.STORE
    rows, channels = next(iter(acts.values())).shape
    modules = {str(layer): f"blocks.{layer}.{hook}" for layer in acts}
    attributes = {"policy": "tiny", "hook": hook, "modules": modules}
    zarr_store.create(path, tokens, rows, list(acts), channels, dtype, rows_per_part, None, **attributes)
    group = zarr.open_group(path, mode="a")
    for layer, rows_ND in acts.items():
        array = group[f"layer/{layer}/acts"]
        size = array.shards[0]
        parts = {first: rows_ND[first : first + size].astype(dtype) for first in range(0, rows, size)}
        facts = [zarr_store.write_shard(path, array, layer, first, part) for first, part in parts.items()]
        zarr_store.finish(path, layer, facts)
    consolidate_metadata(group)
    # A manifest that tells stores apart, as the digests of a real one do.
    return finish(folder, "activations", metrics={str(n): np.asarray(a, np.float64).sum() for n, a in acts.items()})


def dump(out, policy, tokens, weights=None, **settings):
    """Run every part of a dump and publish it; of the finished policy unless weights are given."""
    settings = DUMP | settings
    work = out.parent / f".{out.name}.parts"
    rows = min(settings["rows"], int(Tokens.open(tokens).row_start()[-1]))
    for part in range(-(-rows // settings["rows_per_part"])):
        extract_part(settings, part, work.parent / f"part-{part}.json", work, policy, weights or policy / "model", tokens)
    consolidate(settings, out, work, policy, tokens)
    return out


def rows_of(artifact, layer):
    """All rows of a layer in memory."""
    return ActivationStore(artifact).acts(layer)[:]


def read_json(path):
    return json.loads(path.read_text())


def write_dictionaries(folder, members):
    """An artifact of trained dictionaries by seed."""
    for seed, sae in members.items():
        sae.save(folder / "saes" / f"seed{seed}")
    # A manifest that tells dictionaries apart, as the digests of a real one do.
    sums = {f"seed{seed}": {"sum": sae.W_dec_FD.double().sum().item()} for seed, sae in members.items()}
    return finish(folder, "dictionaries", metrics=sums)
