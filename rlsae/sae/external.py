"""Autoencoders from elsewhere, read from the folders of SAELens, dictionary_learning and sparsify.

All three subtract b_dec from what the encoder reads, but for some classes of dictionary_learning; here that goes into b_enc.
Their scale of activations is not ours to guess: they must read raw rows. Shapes: D channels, F latents.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from rlsae.errors import RlsaeError
from rlsae.sae.dictionary import (
    CONFIG,
    WEIGHTS,
    SparseAutoencoder,
    assembled,
    complete,
    read_config,
    read_tensors,
    require_k,
)

DICTIONARY_LEARNING = ("config.json", "ae.pt")
SPARSIFY = (CONFIG, "sae.safetensors")
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
CLASSES = {
    "AutoEncoder": LINEAR | {"b_dec": "bias"},
    "AutoEncoderNew": LINEAR | {"b_dec": "decoder.bias"},
    "AutoEncoderTopK": LINEAR | {"b_dec": "b_dec"},
    "BatchTopKSAE": LINEAR | {"b_dec": "b_dec", "threshold": "threshold"},
    "GatedAutoEncoder": LINEAR | {"b_enc": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"},
    "JumpReluAutoEncoder": PLAIN,
    "MatryoshkaBatchTopKSAE": PLAIN,
}
"""Names of the tensors in ae.pt, by class of dictionary_learning; its linear layers store them transposed."""
WITHOUT_PRE_BIAS = ("AutoEncoderNew", "JumpReluAutoEncoder")


def load_external(folder: Path) -> SparseAutoencoder:
    """Read a folder of SAELens, dictionary_learning or sparsify, told apart by its files.

    Raises:
        RlsaeError: it is none of these, of an unknown architecture, or lacks a tensor.
    """
    if (folder / WEIGHTS).exists():
        return SparseAutoencoder.load(folder)
    if all((folder / name).exists() for name in DICTIONARY_LEARNING):
        return _dictionary_learning(folder)
    if all((folder / name).exists() for name in SPARSIFY):
        return _sparsify(folder)
    raise RlsaeError(
        f"{folder} holds no autoencoder; expected {CONFIG} and {WEIGHTS} (SAELens), {' and '.join(DICTIONARY_LEARNING)} "
        f"(dictionary_learning), or {' and '.join(SPARSIFY)} (sparsify)"
    )


def _dictionary_learning(folder: Path) -> SparseAutoencoder:
    config_file, weights = (folder / name for name in DICTIONARY_LEARNING)
    trainer = read_config(config_file).get("trainer", {})
    kind = trainer.get("dict_class")
    if kind not in CLASSES:
        known = ", ".join(map(repr, CLASSES))
        raise RlsaeError(f"{config_file}: cannot read the class {kind!r}; expected one of {known}")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise RlsaeError(
            f"{weights} cannot be read as plain tensors ({type(error).__name__}): it is damaged, or pickled"
        ) from None
    found = complete(weights, state, tuple(CLASSES[kind].values()))
    tensors = {name: found[stored].T if stored.endswith(".weight") else found[stored] for name, stored in CLASSES[kind].items()}
    k = require_k(config_file, trainer) if kind == "AutoEncoderTopK" else None
    return assembled(folder, tensors, k, kind not in WITHOUT_PRE_BIAS, {})


def _sparsify(folder: Path) -> SparseAutoencoder:
    config_file, weights = (folder / name for name in SPARSIFY)
    config = read_config(config_file)
    for key, expected in {"activation": "topk", "skip_connection": False, "transcode": False}.items():
        if config.get(key, expected) != expected:
            raise RlsaeError(f"{config_file}: {key} is {config[key]!r}; only {expected!r} can be read")
    found = read_tensors(weights, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    tensors = found | {"W_enc": found["encoder.weight"].T, "b_enc": found["encoder.bias"]}
    return assembled(folder, tensors, require_k(config_file, config), True, {})
