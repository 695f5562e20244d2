"""Activation functions of dictionaries: from pre-activations p = x W_enc + b_enc to latents f.

Centring and scaling of the rows leave p unchanged, so that none of these has to know of them. Each names its architecture in
the format of SAELens and the tensors that it adds there. Shapes: B rows, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor


class ActivationFunction(Protocol):
    architecture: ClassVar[str]
    """Its name in SAELens."""

    def __call__(self, pre_BF: Tensor) -> Tensor:
        """Latents [B, F]; may overwrite the pre-activations."""
        ...

    def to(self, device: torch.device) -> Self: ...

    def options(self) -> dict[str, Any]:
        """Keys that it adds to cfg.json."""
        ...

    def tensors(self, b_enc_F: Tensor) -> dict[str, Tensor]:
        """The encoder's bias and what belongs to the function, by their names in SAELens."""
        ...


@dataclass(frozen=True)
class ReLU:
    """f = ReLU(p)."""

    architecture: ClassVar[str] = "standard"

    def __call__(self, pre_BF: Tensor) -> Tensor:
        return pre_BF.relu_()

    def to(self, device: torch.device) -> ReLU:
        return self

    def options(self) -> dict[str, Any]:
        return {}

    def tensors(self, b_enc_F: Tensor) -> dict[str, Tensor]:
        return {"b_enc": b_enc_F}


@dataclass(frozen=True)
class TopK:
    """f = ReLU(p) at the k largest of each row, 0 elsewhere."""

    k: int
    architecture: ClassVar[str] = "topk"

    def __call__(self, pre_BF: Tensor) -> Tensor:
        value_BK, latent_BK = pre_BF.relu_().topk(self.k, dim=1)
        return pre_BF.zero_().scatter_(1, latent_BK, value_BK)

    def to(self, device: torch.device) -> TopK:
        return self

    def options(self) -> dict[str, Any]:
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}

    def tensors(self, b_enc_F: Tensor) -> dict[str, Tensor]:
        return {"b_enc": b_enc_F}


@dataclass(frozen=True)
class JumpReLU:
    """f = ReLU(p) where p > threshold, 0 elsewhere."""

    threshold_F: Tensor
    architecture: ClassVar[str] = "jumprelu"

    def __call__(self, pre_BF: Tensor) -> Tensor:
        return pre_BF.relu_().mul_(pre_BF > self.threshold_F)

    def to(self, device: torch.device) -> JumpReLU:
        return JumpReLU(self.threshold_F.to(device))

    def options(self) -> dict[str, Any]:
        return {}

    def tensors(self, b_enc_F: Tensor) -> dict[str, Tensor]:
        return {"b_enc": b_enc_F, "threshold": self.threshold_F}


@dataclass(frozen=True)
class Gated:
    """f = ReLU(exp(r_mag) · p + shift) where p > 0, 0 elsewhere; shift = b_mag - exp(r_mag) · b_gate, and b_enc is b_gate."""

    r_mag_F: Tensor
    shift_F: Tensor
    architecture: ClassVar[str] = "gated"

    def __call__(self, pre_BF: Tensor) -> Tensor:
        open_BF = pre_BF > 0
        return pre_BF.mul_(self.r_mag_F.exp()).add_(self.shift_F).relu_().mul_(open_BF)

    def to(self, device: torch.device) -> Gated:
        return Gated(self.r_mag_F.to(device), self.shift_F.to(device))

    def options(self) -> dict[str, Any]:
        return {}

    def tensors(self, b_enc_F: Tensor) -> dict[str, Tensor]:
        return {"b_gate": b_enc_F, "b_mag": self.shift_F + self.r_mag_F.exp() * b_enc_F, "r_mag": self.r_mag_F}
