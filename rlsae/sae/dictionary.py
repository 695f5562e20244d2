"""A trained sparse autoencoder, in the format of SAELens: `cfg.json` and `sae_weights.safetensors`.

Whatever its architecture and however its rows were centred and scaled while training, an exported dictionary reads raw
activations. Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlsae.errors import RlsaeError

SAELENS_FORMAT = "6.54.12"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


@dataclass(frozen=True)
class SparseAutoencoder:
    """f = ReLU(x W_enc + b_enc),  x̂ = f W_dec + b_dec."""

    W_enc_DF: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    def encode(self, acts_BD: Tensor) -> Tensor:
        """Latents [B, F] of raw activations."""
        return torch.addmm(self.b_enc_F, acts_BD, self.W_enc_DF).relu_()

    def decode(self, latents_BF: Tensor) -> Tensor:
        """Reconstructed activations [B, D]."""
        return torch.addmm(self.b_dec_D, latents_BF, self.W_dec_FD)

    def to(self, device: torch.device) -> SparseAutoencoder:
        """The same dictionary with its tensors on a device."""
        return SparseAutoencoder(
            self.W_enc_DF.to(device),
            self.b_enc_F.to(device),
            self.W_dec_FD.to(device),
            self.b_dec_D.to(device),
            self.metadata,
        )

    @property
    def latents(self) -> int:
        return self.W_dec_FD.shape[0]

    def directions(self) -> Tensor:
        """Unit vectors that the latents write [F, D]."""
        return torch.nn.functional.normalize(self.W_dec_FD, dim=1)

    def save(self, folder: Path) -> None:
        """Write the folder that `sae_lens.SAE.load_from_disk` reads."""
        folder.mkdir(parents=True)
        tensors = {"W_enc": self.W_enc_DF, "b_enc": self.b_enc_F, "W_dec": self.W_dec_FD, "b_dec": self.b_dec_D}
        save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
        config = {
            "architecture": "standard",
            "d_in": self.W_dec_FD.shape[1],
            "d_sae": self.latents,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": SAELENS_FORMAT, "sae_lens_training_version": None, **self.metadata},
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SparseAutoencoder:
        """Read such a folder.

        Raises:
            RlsaeError: it holds no dictionary, or one of another architecture.
        """
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).exists():
                raise RlsaeError(f"{folder} holds no dictionary: {folder / name} is missing")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        if config["architecture"] != "standard":
            raise RlsaeError(f"{folder}: cannot read the architecture {config['architecture']!r}; expected 'standard'")
        missing = {"W_enc", "b_enc", "W_dec", "b_dec"} - set(tensors)
        if missing:
            raise RlsaeError(f"{folder / WEIGHTS} lacks {', '.join(sorted(missing))}")
        return cls(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], config["metadata"])
