"""Stage `dictionaries`: train the sparse autoencoders of one policy × layer × recipe, all seeds on one read of the store.

Base and tuned dictionaries of one recipe start equal (the seed alone decides) and see the same rows in the same order, so
that they differ only by what the models differ in. Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rlsae.activations.store import ActivationStore, RowOrder
from rlsae.artifacts import Manifest, artifact_id
from rlsae.compute import device
from rlsae.config import Dictionary
from rlsae.errors import RlsaeError
from rlsae.progress import Progress
from rlsae.resumable import Stage
from rlsae.sae.evaluate import ce_recovered, held_out_quality
from rlsae.sae.tied_relu import TiedRelu
from rlsae.training import load_optimizer, optimizer_tensors, set_learning_rate, warmup_hold_decay

ARCHITECTURES = {"tied_relu": TiedRelu}
SAES = "saes"
ROW_ORDER_SEED = 0
"""One order for all members, so that a job of many seeds equals many jobs of one."""
CURVE_POINTS = 100


def build_dictionaries(
    entry: Dictionary, settings: dict[str, Any], layer: int, out: Path, work: Path | None,
    activations: Path, weights: Path, tokens: Path,
) -> None:  # fmt: skip
    """Train, export and score the dictionaries of one layer.

    Args:
        activations: artifact of the store; weights: transformers folder of its policy; tokens: tokens artifact.

    Writes `saes/seed{s}/` (SAELens format) and `metrics.parquet`, the training curves.
    """
    inputs = {"activations": activations, "tokens": tokens}
    with Stage("dictionaries", out, settings, inputs, work) as stage:
        where = device()
        store = ActivationStore(activations)
        check_rows(store, layer)
        mean_D, scale = centre_and_scale(store, layer, entry.normalize, where)
        members, curves, rows_trained = train(store, layer, entry, mean_D, scale, stage, where)
        curves.to_parquet(stage.staging / "metrics.parquet", index=False)
        hook = store.group.attrs["hook"]
        digest = stage.inputs[artifact_id(activations, "activations")]
        provenance = {"layer": layer, "settings": settings, "activations": digest}
        saes = [
            replace(
                member.export(mean_D, scale),
                metadata={
                    "model_name": store.group.attrs["policy"],
                    "model_class_name": "AutoModelForCausalLM",
                    "hook_name": store.group.attrs["modules"][str(layer)],
                    "training_architecture": entry.architecture,
                    "rlsae": {"seed": seed, **provenance},
                },
            )
            for seed, member in members.items()
        ]
        recovered = ce_recovered(saes, weights, tokens, layer, hook, where)
        metrics = {}
        for seed, sae, share in zip(members, saes, recovered, strict=True):
            sae.save(stage.staging / SAES / f"seed{seed}")
            quality = held_out_quality(sae, store, layer, where)
            metrics[f"seed{seed}"] = {**quality, "ce_recovered": share, "rows_trained": rows_trained}
        stage.details["device"] = str(where)
        stage.publish(metrics)


def train(
    store: ActivationStore,
    layer: int,
    entry: Dictionary,
    mean_D: Tensor,
    scale: float,
    stage: Stage,
    where: torch.device,
) -> tuple[dict[int, TiedRelu], pd.DataFrame, int]:
    """Train one member per seed; resumes from the stage's partial state.

    Returns:
        members by seed, their curves (seed, step, mse, l1, l0: means since the point before), rows each was trained on.
    """
    channels = store.acts(layer).shape[1]
    order = store.row_order(layer, entry.batch_rows, ROW_ORDER_SEED, entry.epochs)
    latents = max(1, round(entry.expansion * channels))
    kind = ARCHITECTURES[entry.architecture]
    members = {seed: kind(channels, latents, entry, seed, where) for seed in entry.seeds}
    optimizers = {seed: _adam(member.parameters(), entry.learning_rate) for seed, member in members.items()}
    done, curve = 0, []
    sums: dict[int, Tensor] = {seed: torch.zeros(3, device=where) for seed in members}
    if (state := stage.load_state()) is not None:
        tensors, values = state
        done, curve = values["step"], values["curve"]
        for seed, member in members.items():
            for name, parameter in member.parameters().items():
                parameter.copy_(tensors[f"{seed}.{name}"])
            load_optimizer(optimizers[seed], tensors, f"{seed}.optimizer")
            sums[seed] = tensors[f"{seed}.sums"].to(where)

    warmup, decay = round(entry.warmup_share * order.steps), round(entry.decay_share * order.steps)
    every = max(1, order.steps // CURVE_POINTS)
    progress = Progress("dictionary", order.steps * entry.batch_rows, "rows", done=done * entry.batch_rows)
    for step, acts_BD in enumerate(_normalised(order, done, mean_D, scale, where), start=done):
        factor = warmup_hold_decay(step, warmup, decay, order.steps)
        for seed, member in members.items():
            figures = member.backward(acts_BD)
            set_learning_rate(optimizers[seed], factor)
            optimizers[seed].step()
            member.constrain()
            sums[seed] += torch.stack([figures["mse"], figures["l1"], figures["l0"]])
        if (step + 1) % every == 0:
            for seed in members:
                mse, l1, l0 = (sums[seed] / every).tolist()
                curve.append({"seed": seed, "step": step + 1, "mse": mse, "l1": l1, "l0": l0})
                sums[seed].zero_()
        progress.update(entry.batch_rows)
        if stage.due():
            stage.save_state(_tensors(members, optimizers, sums), {"step": step + 1, "curve": curve})
    return members, pd.DataFrame(curve), order.steps * entry.batch_rows


def check_rows(store: ActivationStore, layer: int) -> None:
    """
    Raises:
        RlsaeError: nothing could be scored after training: no held-out rows, or a layer that is constant.
    """
    if not store.held_out_rows().any():
        raise RlsaeError(
            "held_out: the store has no held-out rows to score a dictionary on; raise the corpus's held_out or rows"
        )
    mean_D, second_D = store.statistics(layer)
    if not (second_D - mean_D**2 > 0).any():
        raise RlsaeError(f"layer {layer}: its output is the same at every row; there is nothing to learn")


def centre_and_scale(store: ActivationStore, layer: int, normalize: bool, where: torch.device) -> tuple[Tensor, float]:
    """Mean [D] to subtract and factor that brings the mean variance of a channel to 1; 0 and 1 without `normalize`."""
    mean_D, second_D = store.statistics(layer)
    if not normalize:
        return torch.zeros(len(mean_D), device=where), 1.0
    variance = float((second_D - mean_D**2).mean())
    return torch.from_numpy(mean_D).float().to(where), 1 / math.sqrt(variance)


def _normalised(order: RowOrder, from_step: int, mean_D: Tensor, scale: float, where: torch.device) -> Iterator[Tensor]:
    """Centred and scaled rows of each step in float32, in one buffer that the next step overwrites."""
    acts_BD = torch.empty(order.batch_rows, order.shape[1], device=where)
    for batch_BD in order.batches(from_step):
        yield acts_BD.copy_(torch.from_numpy(batch_BD)).sub_(mean_D).mul_(scale)


def _adam(parameters: dict[str, Tensor], learning_rate: float) -> torch.optim.Optimizer:
    groups = [{"params": list(parameters.values()), "peak_lr": learning_rate}]
    return torch.optim.Adam(groups, lr=learning_rate, fused=True)


def _tensors(
    members: dict[int, TiedRelu], optimizers: dict[int, torch.optim.Optimizer], sums: dict[int, Tensor]
) -> dict[str, Tensor]:
    """The partial state of all members."""
    tensors: dict[str, Tensor] = {}
    for seed, member in members.items():
        tensors |= {f"{seed}.{name}": parameter for name, parameter in member.parameters().items()}
        tensors |= optimizer_tensors(optimizers[seed], f"{seed}.optimizer")
        tensors[f"{seed}.sums"] = sums[seed]
    return tensors


def load_members(folder: Path) -> dict[int, Path]:
    """The folder of each seed of a dictionaries artifact."""
    Manifest.read(folder)
    return {int(path.name.removeprefix("seed")): path for path in sorted((folder / SAES).glob("seed*"))}
