"""How far the vector that each latent writes differs between base and tuned.

Keep one dictionary's code f fixed and regress the rows of both models, on the same tokens, on it. With f and y centred,
s_j² the variance of f_j, S = diag(s), R the correlation matrix of the code and λ = 0.1:

    W = S⁻¹ (R + λI)⁻¹ S⁻¹ E[fᵀ y]                                             ridge regression
    Δ_j = |W_j^other - W_j^own| / |W_j^own|     r_j = |W_j^other| / |W_j^own|     θ_j = ∠(W_j^other, W_j^own)

own is the model that the dictionary was trained on; of a dictionary that reads both, the one in which the latent writes more.
Δ = 1 for a removed latent, 2 sin(θ/2) for a rotated one, |r - 1| for a rescaled one. The ridge keeps latents that share a
direction from trading their writes.

Tokens of one document are not independent. The variance of Δ_j comes from sums over groups g of documents (the sandwich
estimate of Liang and Zeger 1986), e being the residual of the difference of the two models' rows:

    score_g = S⁻¹ (R + λI)⁻¹ S⁻¹ Σ_{i in g} (f_iᵀ e_i - mean) / N,     v_j = n/(n-1) Σ_g |score_gj|² / |W_j^own|²

Under a true change of size δ, Δ_j²/u_j follows a noncentral χ² with ν degrees of freedom and noncentrality δ²/u_j, where
u_j = v_j/ν and ν = tr(Σ)²/tr(Σ²), Σ being the covariance of the scores (Satterthwaite 1946).
Shapes: B rows, D channels, F latents, E = 2D channels of base and tuned side by side, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ncx2
from torch import Tensor

from rlsae.activations.joint import join
from rlsae.comparison.code import Code, Gram, encode
from rlsae.comparison.latent_scaling import Part, scale_error
from rlsae.comparison.linear_map import LinearMaps, shared_rank
from rlsae.comparison.paired_rows import PairedRows
from rlsae.compute import rounded_products
from rlsae.sae.dictionary import SparseAutoencoder

RIDGE = 0.1
"""λ, in units of a latent's variance."""
MIN_FIRINGS = 200
"""Rows on which a latent must fire for its write to be estimated."""
KEPT_BYTES = 1 << 29
"""Memory for codes that the second pass need not compute again."""


class CodedBatch(NamedTuple):
    """Some rows of one group of documents."""

    group: int
    code: Code
    target_BE: Tensor


Batches = Callable[[], Iterator[CodedBatch]]
"""Gives the same rows each time it is called, groups one after the other."""


@dataclass(frozen=True)
class Regression:
    """Ridge regression of targets on a code; latents that never fire have zeros."""

    rows: int
    firings_F: Tensor
    mean_F: Tensor
    mean_E: Tensor
    covariance_FF: Tensor
    cross_FE: Tensor
    """Covariance of code and targets."""
    inverse_FF: Tensor
    """S⁻¹ (R + λI)⁻¹ S⁻¹."""
    writes_FE: Tensor
    """W."""


def regress(batches: Batches) -> Regression:
    """Ridge regression of the targets on the code, in one pass; products of a batch in float32, totals in float64."""
    rows = 0
    gram: Gram | None = None
    sums: list[Tensor] = []
    for _, code, target_BE in batches():
        products = [code.firings(), code.sum(), target_BE.sum(0), code.cross(target_BE)]
        if gram is None:
            gram = Gram(code.latents, target_BE.device)
            sums = [torch.zeros_like(product, dtype=torch.float64) for product in products]
        gram.add(code)
        for total, product in zip(sums, products, strict=True):
            total += product
        rows += code.rows
    assert gram is not None  # a store has rows
    firings_F, mean_F, mean_E = sums[0].long(), sums[1] / rows, sums[2] / rows
    covariance_FF = gram.total_FF.div_(rows).sub_(torch.outer(mean_F, mean_F))
    cross_FE = sums[3].div_(rows).sub_(torch.outer(mean_F, mean_E))
    inverse_FF = _ridge_inverse(covariance_FF)
    writes_FE = inverse_FF @ cross_FE
    return Regression(rows, firings_F, mean_F, mean_E, covariance_FF, cross_FE, inverse_FF, writes_FE)


def _ridge_inverse(covariance_FF: Tensor) -> Tensor:
    """S⁻¹ (R + λI)⁻¹ S⁻¹ over the latents that vary; zeros elsewhere."""
    inverse_FF = torch.zeros_like(covariance_FF)
    varies = torch.nonzero(covariance_FF.diagonal() > 0)[:, 0]
    block_FF = covariance_FF[varies[:, None], varies]
    scale_F = block_FF.diagonal().sqrt()
    correlation_FF = block_FF / torch.outer(scale_F, scale_F)
    correlation_FF.diagonal().add_(RIDGE)
    solved_FF = torch.cholesky_inverse(torch.linalg.cholesky(correlation_FF))
    inverse_FF[varies[:, None], varies] = solved_FF / torch.outer(scale_F, scale_F)
    return inverse_FF


def cluster_variance(batches: Batches, fit: Regression, contrast_ED: Tensor) -> tuple[Tensor, float]:
    """Variance of the writes of `target @ contrast`, summed over channels [F], and its degrees of freedom ν.

    Args:
        batches: the rows that `fit` was made from.
    """
    writes_FD = fit.writes_FE @ contrast_ED
    # What the ridge leaves in the residual: the mean of the scores.
    leftover_FD = (fit.cross_FE @ contrast_ED - fit.covariance_FF @ writes_FD).float()
    offset_D = (fit.mean_E @ contrast_ED - fit.mean_F @ writes_FD).float()
    writes_FD, contrast_ED = writes_FD.float(), contrast_ED.float()
    mean_F, inverse_FF = fit.mean_F.float(), fit.inverse_FF.float()
    scale_F = fit.covariance_FF.diagonal().sqrt().float()[:, None]

    groups = 0
    variance_F = torch.zeros_like(fit.mean_F)
    spread_DD = torch.zeros(2 * (contrast_ED.shape[1],), dtype=torch.float64, device=mean_F.device)
    for _, group in itertools.groupby(batches(), key=lambda batch: batch.group):
        sum_FD = torch.zeros_like(writes_FD)
        for _, code, target_BE in group:
            residual_BD = (target_BE @ contrast_ED).sub_(code.decode(writes_FD)).sub_(offset_D)
            sum_FD += code.cross(residual_BD) - torch.outer(mean_F, residual_BD.sum(0)) - code.rows * leftover_FD
        with rounded_products():  # the variance between so few groups is far less certain
            score_FD = inverse_FF @ sum_FD / fit.rows
        variance_F += score_FD.square().sum(1)
        spread_DD += (scale_F * score_FD).T @ (scale_F * score_FD)
        groups += 1
    freedom = float(spread_DD.trace() ** 2 / spread_DD.square().sum())
    return variance_F * groups / (groups - 1), freedom


@dataclass(frozen=True)
class WriteChange:
    """How far the writes of a dictionary's latents differ between base and tuned, beyond the linear map that they share."""

    own: NDArray[np.str_]
    """Model whose write is the measure, `base` or `tuned` [F]."""
    firings: NDArray[np.int64]
    """Rows on which each latent fires [F]."""
    change: NDArray[np.float64]
    """Δ between the linear image of the base rows and the tuned rows [F]; nan for dead latents."""
    change_raw: NDArray[np.float64]
    """Δ between base and tuned rows as they are [F]."""
    ratio: NDArray[np.float64]
    """r [F]."""
    angle: NDArray[np.float64]
    """θ in degrees [F]."""
    variance: NDArray[np.float64]
    """v, in units of Δ² [F]."""
    freedom: float
    """ν."""
    energy: NDArray[np.float64]
    """s_j² |W_j^other - W_j^own|²: what the change of each latent adds to the difference of the rows [F]."""
    scale_error: NDArray[np.float64]
    """Latent scaling of the rows as they are [F]."""
    explained: float
    """Energy of that difference which all latents together explain."""

    def p_values(self, tolerance: float) -> NDArray[np.float64]:
        """P [F] of a change at least as large if its true size is `tolerance`: a minimum-effect null."""
        return p_values(self.change, self.variance, self.freedom, tolerance)


@torch.inference_mode()
def write_changes(
    saes: dict[str, SparseAutoencoder], rows: PairedRows, maps: LinearMaps, where: torch.device
) -> tuple[dict[str, WriteChange], int]:
    """Compare what the latents of dictionaries write in base and tuned.

    Args:
        saes: the dictionaries of base and tuned, by role; or one, of tuned, that reads the rows of both.
        maps: linear maps from base to tuned rows, of which the rank is chosen that the latents share.

    Returns:
        the changes by role, and that rank.
    """
    batches = {role: _coded(sae, role, rows, maps, where) for role, sae in saes.items()}
    fits = {role: regress(of_role) for role, of_role in batches.items()}
    changes_FR = []
    for role, fit in fits.items():
        base_FD, tuned_FD = fit.writes_FE[fit.firings_F >= MIN_FIRINGS].chunk(2, 1)
        changes_FR.append(maps.changes(base_FD, tuned_FD, own=role if saes[role].reads == "own" else "more"))
    rank = shared_rank(torch.cat(changes_FR))
    return {role: _compare(role, saes[role], fit, batches[role], maps, rank) for role, fit in fits.items()}, rank


def regress_pair(sae: SparseAutoencoder, role: str, rows: PairedRows, maps: LinearMaps, where: torch.device) -> Regression:
    """Ridge regression of base and tuned rows, side by side and centred, on the code of the rows of one role."""
    return regress(_coded(sae, role, rows, maps, where))


def _coded(sae: SparseAutoencoder, role: str, rows: PairedRows, maps: LinearMaps, where: torch.device) -> Batches:
    mean_E = torch.cat([maps.mean_base_D, maps.mean_tuned_D]).float()
    kept: dict[int, Code] = {}

    def batches() -> Iterator[CodedBatch]:
        for number, (group, base_BD, tuned_BD, _) in enumerate(rows.batches(where)):
            code = kept.get(number) or encode(sae, _read(sae.reads, role, base_BD, tuned_BD))
            if code.bytes + sum(other.bytes for other in kept.values()) <= KEPT_BYTES:
                kept[number] = code
            yield CodedBatch(group, code, torch.cat([base_BD, tuned_BD], 1).sub_(mean_E))

    return batches


def _read(reads: str, role: str, base_BD: Tensor, tuned_BD: Tensor) -> Tensor:
    """The rows that a dictionary reads."""
    if reads != "own":
        return join(reads, base_BD, tuned_BD)
    return base_BD if role == "base" else tuned_BD


def _compare(role: str, sae: SparseAutoencoder, fit: Regression, batches: Batches, maps: LinearMaps, rank: int) -> WriteChange:
    matrix_DD = maps.matrix(rank)
    contrast_ED = torch.cat([-matrix_DD, torch.eye(len(matrix_DD), dtype=matrix_DD.dtype, device=matrix_DD.device)])
    variance_F, freedom = cluster_variance(batches, fit, contrast_ED)
    base_FD, tuned_FD = fit.writes_FE.chunk(2, 1)
    image_FD = base_FD @ matrix_DD
    difference_FD = tuned_FD - image_FD
    base_F, tuned_F = image_FD.norm(dim=1), tuned_FD.norm(dim=1)
    own_is_base_F = base_F > tuned_F if sae.reads != "own" else torch.full_like(base_F, role == "base", dtype=torch.bool)
    length_F, other_F = torch.where(own_is_base_F, base_F, tuned_F), torch.where(own_is_base_F, tuned_F, base_F)
    raw_F = torch.where(own_is_base_F, base_FD.norm(dim=1), tuned_F)
    cosine_F = torch.nn.functional.cosine_similarity(image_FD, tuned_FD).clamp(-1, 1)
    explained = 2 * (difference_FD * (fit.cross_FE @ contrast_ED)).sum()
    explained -= (difference_FD * (fit.covariance_FF @ difference_FD)).sum()
    by_latent = {
        "change": difference_FD.norm(dim=1) / length_F,
        "change_raw": (tuned_FD - base_FD).norm(dim=1) / raw_F,
        "ratio": other_F / length_F,
        "angle": torch.rad2deg(torch.arccos(cosine_F)),
        "variance": variance_F / length_F.square(),
        "energy": fit.covariance_FF.diagonal() * difference_FD.square().sum(1),
        "scale_error": _scale_error(sae, fit, maps, own_is_base_F),
    }
    values = {name: value_F.cpu().numpy() for name, value_F in by_latent.items()}
    own = np.where(own_is_base_F.cpu().numpy(), "base", "tuned")
    return WriteChange(own, fit.firings_F.cpu().numpy(), freedom=freedom, explained=float(explained), **values)


def _scale_error(sae: SparseAutoencoder, fit: Regression, maps: LinearMaps, own_is_base_F: Tensor) -> Tensor:
    """Latent scaling of the rows as they are [F]; nan for one of the difference, which reconstructs no model's rows."""
    if sae.reads == "difference":
        return torch.full_like(fit.mean_F, torch.nan)
    mean_E = fit.mean_E + torch.cat([maps.mean_base_D, maps.mean_tuned_D])
    crosses = (fit.cross_FE + torch.outer(fit.mean_F, mean_E)).chunk(2, 1)
    biases = sae.b_dec_D.chunk(2) if sae.reads == "both" else (sae.b_dec_D, sae.b_dec_D)
    base, tuned = (Part(*part) for part in zip(crosses, sae.parts().values(), biases, strict=True))
    return scale_error(fit.covariance_FF, fit.mean_F, base, tuned, own_is_base_F)


def p_values(
    change: NDArray[np.floating], variance: NDArray[np.floating], freedom: float, tolerance: float
) -> NDArray[np.float64]:
    """P of a change at least as large as each of `change` if its true size is `tolerance`; 1 where nothing varies."""
    unit = np.where(variance > 0, variance, np.nan) / freedom
    p = ncx2.sf(np.square(change) / unit, freedom, tolerance**2 / unit)
    return np.where(variance == 0, 1.0, p)
