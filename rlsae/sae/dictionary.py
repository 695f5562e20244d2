"""A trained sparse autoencoder, in the format of SAELens: `cfg.json` and `sae_weights.safetensors`.

Whatever its architecture and however its rows were centred and scaled while training, an exported dictionary reads raw
activations. Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlsae.errors import RlsaeError
from rlsae.sae.activation_functions import ActivationFunction, Gated, JumpReLU, ReLU, TopK

SAELENS_FORMAT = "6.54.12"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
MODEL_STEP = "model_step.safetensors"
TENSORS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
}
"""What the weights hold, by architecture of SAELens."""


@dataclass(frozen=True)
class SparseAutoencoder:
    """f = activation(x W_enc + b_enc),  x̂ = f W_dec + b_dec."""

    W_enc_DF: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    activation: ActivationFunction = field(default_factory=ReLU)
    model_step_F: Tensor | None = None
    """Of stage-wise dictionaries: cosine of each decoder row before and after the model changed (rlsae/sae/train.py)."""

    def encode(self, acts_BD: Tensor) -> Tensor:
        """Latents [B, F] of raw activations."""
        return self.activation(self.pre_activations(acts_BD))

    def pre_activations(self, acts_BD: Tensor) -> Tensor:
        """What the activation function makes latents of [B, F]."""
        return torch.addmm(self.b_enc_F, acts_BD, self.W_enc_DF)

    def decode(self, latents_BF: Tensor) -> Tensor:
        """Reconstructed activations [B, D]."""
        return torch.addmm(self.b_dec_D, latents_BF, self.W_dec_FD)

    def to(self, device: torch.device) -> SparseAutoencoder:
        """The same dictionary with its tensors on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("W_enc_DF", "b_enc_F", "W_dec_FD", "b_dec_D")}
        return replace(self, **tensors, activation=self.activation.to(device))

    @property
    def latents(self) -> int:
        return self.W_dec_FD.shape[0]

    @property
    def channels(self) -> int:
        return self.W_dec_FD.shape[1]

    @property
    def reads(self) -> str:
        """`own` rows of one model, or rows of `both` or the `difference` of two (rlsae/activations/joint.py)."""
        return str(self.metadata.get("rlsae", {}).get("reads", "own"))

    def parts(self) -> dict[str, Tensor]:
        """What the latents write in each model [F, D], by role; of a crosscoder the halves of its decoder, else the whole."""
        halves = self.W_dec_FD.chunk(2, 1) if self.reads == "both" else (self.W_dec_FD, self.W_dec_FD)
        return dict(zip(("base", "tuned"), halves, strict=True))

    def norm_ratio(self) -> Tensor:
        """‖d_tuned‖ / (‖d_base‖ + ‖d_tuned‖) of a crosscoder's latents [F]: 0 for those of base alone, 1 of tuned alone."""
        base_F, tuned_F = (part_FD.norm(dim=1) for part_FD in self.parts().values())
        return tuned_F / (base_F + tuned_F)

    def directions(self) -> Tensor:
        """Unit vectors that the latents write [F, D]."""
        return torch.nn.functional.normalize(self.W_dec_FD, dim=1)

    def reading_raw_rows(self, mean_D: Tensor, scale: float, metadata: dict[str, Any] | None = None) -> SparseAutoencoder:
        """The same latents from rows y, where this one reads x = (y - mean) · scale; its decoder writes y."""
        return replace(
            self,
            metadata=metadata or self.metadata,
            W_enc_DF=self.W_enc_DF * scale,
            b_enc_F=self.b_enc_F - scale * (mean_D @ self.W_enc_DF),
            W_dec_FD=self.W_dec_FD / scale,
            b_dec_D=self.b_dec_D / scale + mean_D,
        )

    def reading_normalised_rows(self, mean_D: Tensor, scale: float) -> SparseAutoencoder:
        """The inverse: the same latents from rows x = (y - mean) · scale, where this one reads y."""
        return self.reading_raw_rows(-mean_D * scale, 1 / scale)

    def save(self, folder: Path, density_F: Tensor | None = None, model_step_F: Tensor | None = None) -> None:
        """Write the folder that `sae_lens.SAE.load_from_disk` reads; density: share of rows at which each latent is active."""
        folder.mkdir(parents=True)
        tensors = {"W_enc": self.W_enc_DF, "W_dec": self.W_dec_FD, "b_dec": self.b_dec_D}
        tensors |= self.activation.tensors(self.b_enc_F)
        save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
        if density_F is not None:
            save_file({"sparsity": torch.log10(density_F.float().cpu() + 1e-10)}, folder / SPARSITY)
        if model_step_F is not None:
            save_file({"model_step": model_step_F.detach().float().cpu().contiguous()}, folder / MODEL_STEP)
        config = {
            "architecture": self.activation.architecture,
            "d_in": self.channels,
            "d_sae": self.latents,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **self.activation.options(),
            "metadata": {"sae_lens_version": SAELENS_FORMAT, "sae_lens_training_version": None, **self.metadata},
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SparseAutoencoder:
        """Read such a folder, written by rlsae or by SAELens.

        Raises:
            RlsaeError: it holds no dictionary, or one of another architecture; or a tensor is missing or has another shape.
        """
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).exists():
                raise RlsaeError(f"{folder} holds no dictionary: {folder / name} is missing")
        config = read_config(folder / CONFIG)
        architecture = config.get("architecture")
        if architecture not in TENSORS:
            known = ", ".join(map(repr, TENSORS))
            raise RlsaeError(f"{folder}: cannot read the architecture {architecture!r}; expected one of {known}")
        if config.get("normalize_activations", "none") != "none":
            raise RlsaeError(
                f"{folder / CONFIG}: normalize_activations is {config['normalize_activations']!r}, which is not part of the "
                "weights; fold it into them in SAELens and save again"
            )
        tensors = read_tensors(folder / WEIGHTS, TENSORS[architecture])
        if architecture == "gated":
            tensors["b_enc"] = tensors.pop("b_gate")
        if config.get("rescale_acts_by_decoder_norm"):
            norm_F = tensors["W_dec"].norm(dim=1)
            tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm_F, tensors["b_enc"] * norm_F
            tensors["W_dec"] = tensors["W_dec"] / norm_F[:, None]
        k = require_k(folder / CONFIG, config) if architecture == "topk" else None
        sae = assembled(folder, tensors, k, config.get("apply_b_dec_to_input", True), config.get("metadata", {}))
        if (folder / MODEL_STEP).exists():
            return replace(sae, model_step_F=read_tensors(folder / MODEL_STEP, ("model_step",))["model_step"])
        return sae


def assembled(
    source: Path, tensors: Mapping[str, Tensor], k: int | None, minus_b_dec: bool, metadata: dict[str, Any]
) -> SparseAutoencoder:
    """A dictionary from tensors that were read.

    Args:
        source: where from, for messages.
        tensors: W_enc [D, F], b_enc, W_dec [F, D], b_dec; `threshold` of a JumpReLU; `b_mag` and `r_mag` of a gated one.
        k: active latents of TopK.
        minus_b_dec: the encoder reads x - b_dec, which here becomes part of b_enc.

    Raises:
        RlsaeError: shapes do not fit together, or k exceeds the number of latents.
    """
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = (tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    latents, channels = W_dec_FD.shape
    expected = {"W_enc": (channels, latents), "b_enc": (latents,), "b_dec": (channels,)}
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise RlsaeError(f"{source}: {name} has the shape {found}; the decoder's {tuple(W_dec_FD.shape)} asks for {shape}")
    if k is not None and k > latents:
        raise RlsaeError(f"{source}: k is {k}, more than its {latents} latents")
    activation: ActivationFunction = ReLU()
    if k is not None:
        activation = TopK(k)
    elif "threshold" in tensors:
        activation = JumpReLU(tensors["threshold"].expand(latents))
    elif "r_mag" in tensors:
        activation = Gated(tensors["r_mag"], tensors["b_mag"] - tensors["r_mag"].exp() * b_enc_F)
    if minus_b_dec:
        b_enc_F = b_enc_F - b_dec_D @ W_enc_DF
    return SparseAutoencoder(W_enc_DF, b_enc_F, W_dec_FD, b_dec_D, metadata, activation)


def require_k(path: Path, config: Mapping[str, Any]) -> int:
    """
    Raises:
        RlsaeError: the configuration does not say how many latents are active.
    """
    if not isinstance(config.get("k"), int):
        raise RlsaeError(f"{path}: expected the number of active latents under k, found {config.get('k')!r}")
    return int(config["k"])


def read_config(path: Path) -> dict[str, Any]:
    """
    Raises:
        RlsaeError: the file is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RlsaeError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RlsaeError(f"{path}: expected a JSON object")
    return config


def read_tensors(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a safetensors file in float32.

    Raises:
        RlsaeError: the file is damaged, or lacks one of `names`.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise RlsaeError(f"{path} is no safetensors file: {error}") from None
    return complete(path, tensors, names)


def complete(path: Path, tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """The named tensors in float32.

    Raises:
        RlsaeError: one is missing.
    """
    if missing := sorted(set(names) - set(tensors)):
        raise RlsaeError(f"{path} lacks {', '.join(missing)}")
    return {name: tensors[name].float() for name in names}
