"""Edits of latents in a running model, with what the dictionary does not explain left as it is.

    x' = x + Σ_{i in S} (g f_i(x) + c_i - f_i(x)) W_dec,i

g = 0, c = 0 ablates, g scales, g = 0 with c_i clamps. Only the difference is added, so the error x - x̂ stays in x, and an empty
set leaves the model as it is. Shapes: B rows of all edits together, T positions, D channels, E edits, U latents of any edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsae.beside import AnySae
from rlsae.errors import RlsaeError


@dataclass(frozen=True)
class Edit:
    """What becomes of the activations of some latents."""

    latents: tuple[int, ...] = ()
    gain: float = 0.0
    """g: 0 ablates, 1 leaves them, 2 doubles them."""
    clamp: tuple[float, ...] | None = None
    """c_i: the activations that they get in place of their own."""


def edited(sae: AnySae, edits: Sequence[Edit]) -> Callable[[Tensor], Tensor]:
    """A module's output acts_BTD, of which equal blocks of rows, one after the other, get one edit each.

    Raises:
        RlsaeError: an edit names a latent that the dictionary does not have.
    """
    chosen = sorted({latent for edit in edits for latent in edit.latents})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < sae.latents:
        outside = next(latent for latent in chosen if not 0 <= latent < sae.latents)
        raise RlsaeError(f"latent {outside} is to be edited; the dictionary has latents 0 to {sae.latents - 1}")
    place = {latent: u for u, latent in enumerate(chosen)}
    surplus_EU = torch.zeros(len(edits), len(chosen))
    clamped_EU = torch.zeros(len(edits), len(chosen))
    for e, edit in enumerate(edits):
        columns = [place[latent] for latent in edit.latents]
        surplus_EU[e, columns] = (0.0 if edit.clamp else edit.gain) - 1
        if edit.clamp:
            clamped_EU[e, columns] = torch.tensor(edit.clamp)
    where = sae.W_dec_FD.device
    index, surplus_EU, clamped_EU = torch.tensor(chosen, device=where), surplus_EU.to(where), clamped_EU.to(where)
    directions_UD = sae.W_dec_FD[index] if chosen else None

    def function(acts_BTD: Tensor) -> Tensor:
        if directions_UD is None:
            return acts_BTD
        acts_ED = acts_BTD.reshape(len(edits), -1, acts_BTD.shape[-1])
        latents_EU = sae.encode(acts_ED.flatten(0, 1))[:, index].view(*acts_ED.shape[:2], -1)
        change_EU = latents_EU * surplus_EU[:, None] + clamped_EU[:, None]
        return acts_BTD + (change_EU @ directions_UD).view_as(acts_BTD)

    return function
