"""The trained dictionaries of a study with what they do on held-out rows. Shapes: F latents, D channels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rlsae.activations.joint import rows_of
from rlsae.activations.store import ActivationStore
from rlsae.errors import RlsaeError
from rlsae.progress import Progress
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.evaluate import held_out_batches

ROLES = ("base", "tuned")
Key = tuple[str, int, str, int]
"""Role, layer, dictionary and seed."""


def other_role(role: str) -> str:
    return "tuned" if role == "base" else "base"


@dataclass(frozen=True)
class Member:
    """One trained dictionary with what it does on the held-out rows of what it reads."""

    decoder_FD: NDArray[np.float32]
    encoder_FD: NDArray[np.float32]
    firings: NDArray[np.int64]
    density: NDArray[np.float64]
    mean_active: NDArray[np.float64]
    max_active: NDArray[np.float64]

    @property
    def alive(self) -> NDArray[np.bool_]:
        return self.firings > 0


Members = dict[Key, Member]


def measure_all(folders: dict[Key, Path], stores: dict[str, ActivationStore], where: torch.device) -> Members:
    """Measure every dictionary on the held-out rows of what it reads.

    Raises:
        RlsaeError: a seed was trained for one policy alone, or a dictionary reads rows of another width.
    """
    members: Members = {}
    progress = Progress("held-out rows", len(folders), "dictionaries")
    for (role, layer, name, seed), folder in folders.items():
        sae = SparseAutoencoder.load(folder).to(where)
        if sae.reads == "own" and (other_role(role), layer, name, seed) not in folders:
            raise RlsaeError(
                f"layer {layer}, dictionary {name}: seed {seed} was trained for {role} and not for {other_role(role)}"
            )
        store = rows_of(sae.reads, role, stores)
        channels = store.acts(layer).shape[1]
        if sae.channels != channels:
            raise RlsaeError(
                f"{folder} reads rows of {sae.channels} channels, layer {layer} of {store.path} has {channels}; "
                "compare dictionaries with the activations that they were trained on"
            )
        members[role, layer, name, seed] = measure(sae, store, layer, where)
        progress.update()
    return members


@torch.inference_mode()
def measure(sae: SparseAutoencoder, store: ActivationStore, layer: int, where: torch.device) -> Member:
    """Firings, density (share of rows) and size of each latent on the held-out rows."""
    firings_F = torch.zeros(sae.latents, dtype=torch.int64, device=where)
    total_F = torch.zeros(sae.latents, dtype=torch.float64, device=where)
    largest_F = torch.zeros(sae.latents, device=where)
    rows = 0
    for _, acts_BD in held_out_batches(store, layer, where):
        latents_BF = sae.encode(acts_BD)
        firings_F += latents_BF.sign().sum(0).long()
        total_F += latents_BF.sum(0)
        largest_F = torch.maximum(largest_F, latents_BF.amax(0))
        rows += len(acts_BD)
    firings = firings_F.cpu().numpy()
    return Member(
        decoder_FD=sae.directions().cpu().numpy(),
        encoder_FD=torch.nn.functional.normalize(sae.W_enc_DF.T, dim=1).cpu().numpy(),
        firings=firings,
        density=firings / rows,
        mean_active=(total_F.cpu().numpy() / np.maximum(firings, 1)),
        max_active=largest_F.double().cpu().numpy(),
    )
