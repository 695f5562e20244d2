"""What base and tuned differ in as a whole: a shift of the mean, and one linear map that all latents share.

Reduced-rank regression (Izenman 1975) of the difference d = y_tuned - y_base on the base rows, both centred:

    B = (C + ρ tr(C)/D · I)⁻¹ E[y_baseᵀ d],   C = E[y_baseᵀ y_base],   map of rank r = I + B V_r V_rᵀ

where V_r holds the first r principal directions of what B explains, E[(y_base B)ᵀ (y_base B)].

Which rank is shared? The change of a few latents is partly linear in the rows too, also on new documents: a map chosen by its
error alone takes it up, and moves every other latent for it. A map that latents share makes the median latent's change
smaller; one that serves a few makes it larger. So the rank is the smallest whose median change is near the least.
Shapes: D channels, F latents, E = 2D channels of base and tuned side by side, R ranks from 0 to D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsae.comparison.paired_rows import PairedRows

RIDGE = 1e-3
"""ρ, in units of the mean variance of a channel."""
NEAR = 1.05
"""A rank is good enough if its median change is at most so many times the least,"""
AT_REST = 0.05
"""or at most this, a turn by 3 degrees: then there is no motion to share, and a map could only take up changes of latents."""


@dataclass(frozen=True)
class LinearMaps:
    """The linear maps of every rank from base to tuned rows: tuned ≈ mean_tuned + (base - mean_base) · matrix(rank)."""

    mean_base_D: Tensor
    mean_tuned_D: Tensor
    slope_DD: Tensor
    """B."""
    directions_DD: Tensor
    """V: unit columns, by falling energy of what B explains along them."""
    variance: float
    """Of the base rows, summed over channels."""
    difference: float
    """Energy of the difference, E‖y_tuned - y_base‖²."""
    mean_shift: float
    """Share of that energy that the shift of the mean holds; nan without a difference."""
    explained_D: Tensor
    """Share of it that the map explains along each direction, on held-out documents."""

    def share(self, energy: float) -> float:
        """Of the energy of the difference; nan without a difference."""
        return energy / self.difference if self.difference else float("nan")

    def matrix(self, rank: int) -> Tensor:
        """I + B V_r V_rᵀ [D, D]."""
        first_DR = self.directions_DD[:, :rank]
        return torch.eye(len(first_DR), dtype=first_DR.dtype, device=first_DR.device) + self.slope_DD @ first_DR @ first_DR.T

    def changes(self, base_FD: Tensor, tuned_FD: Tensor, own: str) -> Tensor:
        """Δ of each latent under the map of every rank [F, R].

        Args:
            base_FD, tuned_FD: what the latents write in each model.
            own: model whose write is the measure: `base`, `tuned`, or for each latent the one that writes `more`.
        """
        # Along the directions, a map of rank r moves the first r coordinates and leaves the others.
        still_FD = base_FD @ self.directions_DD
        moved_FD = still_FD + base_FD @ self.slope_DD @ self.directions_DD
        goal_FD = tuned_FD @ self.directions_DD
        distance_FR = _first_moved((goal_FD - moved_FD).square(), (goal_FD - still_FD).square())
        base_FR, tuned_FR = _first_moved(moved_FD.square(), still_FD.square()), goal_FD.square().sum(1, keepdim=True)
        own_FR = {"base": base_FR, "tuned": tuned_FR, "more": torch.maximum(base_FR, tuned_FR)}[own]
        return (distance_FR / own_FR).sqrt()


def _first_moved(moved_FD: Tensor, still_FD: Tensor) -> Tensor:
    """Sums over channels of which the first r are taken from `moved`, for every r [F, D + 1]."""
    gained_FD = (moved_FD - still_FD).cumsum(1)
    return still_FD.sum(1, keepdim=True) + torch.nn.functional.pad(gained_FD, (1, 0))


def shared_rank(changes_FR: Tensor) -> int:
    """The smallest rank whose median change over latents is near the least, or at rest; 0 without latents."""
    if not len(changes_FR):
        return 0
    median_R = changes_FR.median(0).values
    return int(torch.nonzero(median_R <= max(NEAR * float(median_R.min()), AT_REST))[0])


@torch.inference_mode()
def fit_linear_maps(rows: PairedRows, where: torch.device) -> LinearMaps:
    """Fit the maps on the training documents and score them on the held-out ones, in one pass."""
    mean_base_D, mean_tuned_D = (
        torch.from_numpy(store.statistics(rows.layer)[0]).to(where) for store in (rows.base, rows.tuned)
    )
    mean_E = torch.cat([mean_base_D, mean_tuned_D]).float()
    moments = [torch.zeros(2 * (2 * rows.channels,), dtype=torch.float64, device=where) for _ in range(2)]
    count = [0, 0]
    for _, base_BD, tuned_BD, held_out_B in rows.batches(where):
        both_BE = torch.cat([base_BD, tuned_BD], 1).sub_(mean_E)
        for part, chosen_B in enumerate((~held_out_B, held_out_B)):
            part_BE = both_BE[chosen_B]
            moments[part] += part_BE.T @ part_BE
            count[part] += len(part_BE)

    base_DD, cross_DD, _ = _covariances(moments[0] / count[0])
    ridge = RIDGE * base_DD.trace() / rows.channels
    slope_DD = torch.linalg.solve(base_DD + ridge * torch.eye(rows.channels, device=where), cross_DD)
    directions_DD = torch.linalg.eigh(slope_DD.T @ base_DD @ slope_DD).eigenvectors.flip(1)

    base_DD, cross_DD, difference_DD = _covariances(moments[1] / count[1])
    moved_DD = slope_DD @ directions_DD
    explained_D = 2 * (moved_DD * (cross_DD @ directions_DD)).sum(0) - (moved_DD * (base_DD @ moved_DD)).sum(0)
    shift = (mean_tuned_D - mean_base_D).square().sum()
    share_D = explained_D / (shift + difference_DD.trace())
    base_DD, _, difference_DD = _covariances((moments[0] + moments[1]) / sum(count))
    energy = shift + difference_DD.trace()
    return LinearMaps(
        mean_base_D=mean_base_D,
        mean_tuned_D=mean_tuned_D,
        slope_DD=slope_DD,
        directions_DD=directions_DD,
        variance=float(base_DD.trace()),
        difference=float(energy),
        mean_shift=float(shift / energy),
        explained_D=share_D,
    )


def _covariances(joint_EE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of base, of base with the difference, of the difference."""
    channels = len(joint_EE) // 2
    base_DD, cross_DD, tuned_DD = joint_EE[:channels, :channels], joint_EE[:channels, channels:], joint_EE[channels:, channels:]
    return base_DD, cross_DD - base_DD, tuned_DD - cross_DD - cross_DD.T + base_DD
