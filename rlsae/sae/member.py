"""What the trainer asks of an architecture, and what architectures share. Shapes: B rows, D channels, F latents."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlsae.config import Dictionary
from rlsae.sae.activation_functions import ActivationFunction, ReLU
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.training import joint_seed

Figures = dict[str, Tensor]
"""Of a batch, left on the device: means over rows `mse` (1 if x̂ = 0), `l1` and `l0`, and others of its own."""


class Member(Protocol):
    """One sparse autoencoder in training, on rows that are centred and scaled.

    Args:
        entry: the recipe, of the architecture's own class in `rlsae.config.dictionaries`.
        seed: of its random start, together with the number of latents.
    """

    unit_length: ClassVar[bool]
    """Whether it trains on rows of mean squared length 1; else, of mean square 1 per channel. Biases and thresholds, which an
    optimizer moves at its own pace, have less far to go to make short rows sparse."""

    def __init__(self, channels: int, latents: int, entry: Any, seed: int, device: torch.device) -> None: ...

    def parameters(self) -> dict[str, Tensor]:
        """What the optimizer trains."""
        ...

    def counters(self) -> dict[str, Tensor]:
        """What else its next step depends on."""
        ...

    def backward(self, acts_BD: Tensor, strength: float = 1.0) -> Figures:
        """Set the gradients of its loss on one batch, which it must not keep.

        Args:
            strength: of the sparsity, from 0 to 1 while it warms up.
        """
        ...

    def constrain(self) -> None:
        """Bring the parameters back to where they must lie after an optimizer step."""
        ...

    def export(self) -> SparseAutoencoder:
        """The autoencoder as it stands, reading centred and scaled rows."""
        ...

    def load(self, sae: SparseAutoencoder) -> None:
        """Go on from an autoencoder of the same architecture and shape that reads such rows."""
        ...


class Untied:
    """Encoder and decoder of their own: decoder rows start as random vectors of length 1, the encoder as their transpose.

    A crosscoder (`reads: both`) has rows of two models side by side, whose decoders start equal, or unlike where the recipe
    says `start: independent`.
    """

    unit_length: ClassVar[bool] = False

    def __init__(self, channels: int, latents: int, entry: Dictionary, seed: int, device: torch.device) -> None:
        self.dtype: torch.dtype = getattr(torch, entry.precision)
        """Of the factors of matrix products."""
        self.models = 2 if entry.reads == "both" else 1
        seeds = [seed, joint_seed(seed, 1) if entry.start == "independent" else seed][: self.models]
        parts = [random_directions(channels // self.models, latents, of_part) for of_part in seeds]
        self.W_enc_FD = torch.cat(parts, 1).to(device)
        self.W_dec_FD = self.W_enc_FD / self.models
        self.b_enc_F = torch.zeros(latents, device=device)
        self.b_dec_D = torch.zeros(channels, device=device)

    def parameters(self) -> dict[str, Tensor]:
        return {"W_enc_FD": self.W_enc_FD, "b_enc_F": self.b_enc_F, "W_dec_FD": self.W_dec_FD, "b_dec_D": self.b_dec_D}

    def counters(self) -> dict[str, Tensor]:
        return {}

    def constrain(self) -> None:
        pass

    def export(self) -> SparseAutoencoder:
        return SparseAutoencoder(
            self.W_enc_FD.detach().T,
            self.b_enc_F.detach(),
            self.W_dec_FD.detach(),
            self.b_dec_D.detach(),
            activation=self.activation(),
        )

    def activation(self) -> ActivationFunction:
        return ReLU()

    def load(self, sae: SparseAutoencoder) -> None:
        self.W_enc_FD.copy_(sae.W_enc_DF.T)
        self.b_enc_F.copy_(sae.b_enc_F)
        self.W_dec_FD.copy_(sae.W_dec_FD)
        self.b_dec_D.copy_(sae.b_dec_D)


class Autograd(Untied):
    """An architecture with decoder rows of unit length whose gradients torch derives from its `loss`."""

    def __init__(self, channels: int, latents: int, entry: Dictionary, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, entry, seed, device)
        for parameter in super().parameters().values():
            parameter.requires_grad_()

    def loss(self, acts_BD: Tensor, strength: float) -> tuple[Tensor, Figures]:
        """Runs under autocast: products come in `dtype`, and are summed as float32."""
        raise NotImplementedError

    def backward(self, acts_BD: Tensor, strength: float = 1.0) -> Figures:
        for parameter in self.parameters().values():
            parameter.grad = None
        narrow = self.dtype != torch.float32
        with torch.enable_grad():
            with torch.autocast(acts_BD.device.type, self.dtype if narrow else None, enabled=narrow):
                loss, figures = self.loss(acts_BD, strength)
            loss.backward()
        assert self.W_dec_FD.grad is not None
        without_parallel_part(self.W_dec_FD.grad, self.W_dec_FD.detach())
        return {name: figure.detach() for name, figure in figures.items()}

    def constrain(self) -> None:
        self.W_dec_FD.data = normalize(self.W_dec_FD.data, dim=1)


def random_directions(channels: int, latents: int, seed: int) -> Tensor:
    """Random unit vectors [F, D]; the width enters too, so that a small and a big dictionary of one seed share no rows."""
    generator = torch.Generator().manual_seed(joint_seed(seed, latents))
    return normalize(torch.randn(latents, channels, generator=generator), dim=1)


def by_model(W_FD: Tensor, models: int) -> Tensor:
    """A view of the rows by the model that they write [F, M, D / M]."""
    return W_FD.unflatten(1, (models, -1))


def lengths(W_FD: Tensor, models: int = 1) -> Tensor:
    """Σ over models of the norm of each row's part [F]: what sparsity is charged by in a crosscoder (Lindsey et al. 2024)."""
    return by_model(W_FD, models).norm(dim=2).sum(1)


def without_parallel_part(grad_FD: Tensor, W_FD: Tensor, models: int = 1) -> Tensor:
    """Remove from each gradient, in place, its part along that of its row's length: a step must turn rows of length 1, and
    shift length between models, not lengthen them."""
    slope_FD = W_FD if models == 1 else normalize(by_model(W_FD, models), dim=2).flatten(1) / models**0.5
    return grad_FD.sub_(slope_FD * (grad_FD * slope_FD).sum(1, keepdim=True))
