"""Stage `dictionaries`: train the sparse autoencoders of one policy × layer × recipe, all seeds on one read of the store.

Base and tuned dictionaries of one recipe see the same rows in the same order and, unless `start` says otherwise, start
equal, so that they differ only by what the models differ in. Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rlsae.activations.joint import JointStore
from rlsae.activations.store import ActivationStore, RowOrder
from rlsae.artifacts import Manifest, artifact_id
from rlsae.compute import device
from rlsae.config import Dictionary, ExternalDictionary, JumpReluDictionary, TopKFamily
from rlsae.errors import RlsaeError
from rlsae.progress import Progress
from rlsae.resumable import Stage
from rlsae.sae.architectures import ARCHITECTURES
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.evaluate import held_out_quality, recovered
from rlsae.sae.external import load_external
from rlsae.sae.member import Member
from rlsae.training import joint_seed, load_optimizer, optimizer_tensors, set_learning_rate, warmup_hold_decay

SAES = "saes"
ROW_ORDER_SEED = 0
"""One order for all members, so that a job of many seeds equals many jobs of one."""
CURVE_POINTS = 100
STATE_VERSION = 2


def build_dictionaries(
    entry: Dictionary | ExternalDictionary, settings: dict[str, Any], layer: int, out: Path, work: Path | None,
    activations: Path, weights: Path, tokens: Path, start: Path | None = None, source: Path | None = None,
    base_activations: Path | None = None, base_weights: Path | None = None,
) -> None:  # fmt: skip
    """Train, export and score the dictionaries of one layer.

    Args:
        activations: artifact of the store; weights: transformers folder of its policy; tokens: tokens artifact.
        start: dictionaries artifact that training continues, for `start: from_base` and `from_own`.
        source: folder of an external autoencoder.
        base_activations, base_weights: of the base policy, for a recipe that reads the rows of both.

    Writes `saes/seed{s}/` (SAELens format), `metrics.parquet`, the training curves, and `figures/`.
    """
    from rlsae.sae import figures  # half a second of matplotlib that other stages, which read dictionaries, need not wait for

    inputs = {"activations": activations, "tokens": tokens}
    others = ("start", start), ("source", source), ("base activations", base_activations)
    inputs |= {name: path for name, path in others if path}
    with Stage("dictionaries", out, settings, inputs, work, STATE_VERSION) as stage:
        where = device()
        store, reads = rows_to_read(entry, activations, base_activations, base_weights), getattr(entry, "reads", "own")
        check_rows(store, layer)
        facts: dict[str, Any] = {"layer": layer, "settings": settings, "reads": reads}
        facts["activations"] = stage.inputs[artifact_id(activations, "activations")]
        curves = pd.DataFrame(columns=["seed", "step", "mse", "l1", "l0"])
        scores: dict[str, Any] = {"rows_trained": None, "rows_digest": None}
        steps: dict[int, Tensor] = {}
        if isinstance(entry, ExternalDictionary):
            saes = {0: external_autoencoder(source, store, layer).to(where)}
        else:
            order = store.row_order(layer, entry.batch_rows, ROW_ORDER_SEED, entry.epochs)
            started = autoencoders_to_continue(start, entry) if entry.continues else {}
            mean_D, facts["scale"] = centre_and_scale(store, layer, entry, where)
            for sae in started.values():  # so that unit rows stay unit rows, and base and tuned start as one function
                facts["scale"] = sae.metadata["rlsae"]["scale"]
            members = new_members(entry, order.shape[1], store.group.attrs["policy"], where)
            with torch.no_grad():
                for seed, sae in started.items():
                    members[seed].load(sae.to(where).reading_normalised_rows(mean_D, facts["scale"]))
            curves = train(members, order, entry, mean_D, facts["scale"], stage)
            saes = {seed: member.export().reading_raw_rows(mean_D, facts["scale"]) for seed, member in members.items()}
            steps = model_steps(entry, started, saes)
            scores = {"rows_trained": order.steps * entry.batch_rows, "rows_digest": rows_digest(order)}
        curves.to_parquet(stage.staging / "metrics.parquet", index=False)
        hook, modules = store.group.attrs["hook"], store.group.attrs["modules"]
        metrics, densities = {}, {}
        for seed, sae in saes.items():
            metadata = {
                **sae.metadata,
                "model_name": store.group.attrs["policy"],
                "model_class_name": "AutoModelForCausalLM",
                "hook_name": modules[str(layer)],
                "training_architecture": entry.architecture,
                "rlsae": {"seed": seed, **facts},
            }
            saes[seed] = replace(sae, metadata=metadata)
            quality, density_F = held_out_quality(saes[seed], store, layer, where)
            saes[seed].save(stage.staging / SAES / f"seed{seed}", density_F, steps.get(seed))
            metrics[f"seed{seed}"] = {**quality, **scores}
            densities[seed] = density_F.cpu().numpy()
        replaced = recovered(list(saes.values()), weights, tokens, layer, hook, where, base_weights)
        for of_seed, in_the_model in zip(metrics.values(), replaced, strict=True):
            of_seed |= in_the_model
        figures.save(stage.staging / "figures", densities, curves)
        stage.details["device"] = str(where)
        stage.publish(metrics)


@torch.no_grad()
def train(
    members: dict[int, Member], order: RowOrder, entry: Dictionary, mean_D: Tensor, scale: float, stage: Stage
) -> pd.DataFrame:
    """Train the members, by seed, side by side on the batches of `order`; goes on from the stage's partial state.

    Returns:
        their curves: seed, step, and each figure's mean since the point before.

    Raises:
        RlsaeError: a loss is not finite.
    """
    optimizers = {seed: _adam(member.parameters(), entry.learning_rate) for seed, member in members.items()}
    done, curve = 0, []
    sums: dict[int, Tensor] = {}
    if (state := stage.load_state()) is not None:
        tensors, values = state
        done, curve = values["step"], values["curve"]
        for seed, member in members.items():
            for name, tensor in (member.parameters() | member.counters()).items():
                tensor.copy_(tensors[f"{seed}.{name}"])
            load_optimizer(optimizers[seed], tensors, f"{seed}.optimizer")
            if f"{seed}.sums" in tensors:
                sums[seed] = tensors[f"{seed}.sums"].to(mean_D.device)

    warmup, decay = round(entry.warmup_share * order.steps), round(entry.decay_share * order.steps)
    sparsity_warmup = max(1, round(entry.sparsity_warmup_share * order.steps))
    every = max(1, order.steps // CURVE_POINTS)
    progress = Progress("dictionary", order.steps * entry.batch_rows, "rows", done=done * entry.batch_rows)
    for step, acts_BD in enumerate(_normalised(order, done, mean_D, scale, mean_D.device), start=done):
        factor = warmup_hold_decay(step, warmup, decay, order.steps)
        strength = min(1.0, (step + 1) / sparsity_warmup)
        for seed, member in members.items():
            figures = member.backward(acts_BD, strength)
            if entry.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(member.parameters().values(), entry.max_grad_norm)
            set_learning_rate(optimizers[seed], factor)
            optimizers[seed].step()
            member.constrain()
            values_of_batch = torch.stack(list(figures.values()))
            sums[seed] = sums[seed] + values_of_batch if seed in sums else values_of_batch
        if (step + 1) % every == 0:
            for seed in members:
                means = dict(zip(figures, (sums.pop(seed) / every).tolist(), strict=True))
                if not math.isfinite(means["mse"]):
                    raise RlsaeError(
                        f"seed {seed}: the loss is not finite at step {step + 1} of {order.steps}; lower learning_rate, "
                        "and look for extreme rows with `rlsae inspect` on the activations"
                    )
                curve.append({"seed": seed, "step": step + 1, **means})
        progress.update(entry.batch_rows)
        if stage.due():
            stage.save_state(_tensors(members, optimizers, sums), {"step": step + 1, "curve": curve})
    return pd.DataFrame(curve)


def rows_to_read(
    entry: Dictionary | ExternalDictionary, activations: Path, base_activations: Path | None, base_weights: Path | None
) -> ActivationStore:
    """
    Raises:
        RlsaeError: the recipe reads the rows of both models, and what it needs of the base was not given.
    """
    own = ActivationStore(activations)
    if isinstance(entry, ExternalDictionary) or entry.reads == "own":
        return own
    if base_activations is None or base_weights is None:
        raise RlsaeError(f"reads: {entry.reads} needs the base's activations and model (--base-activations, --base-weights)")
    return JointStore(ActivationStore(base_activations), own, entry.reads)


def new_members(entry: Dictionary, channels: int, policy: str, where: torch.device) -> dict[int, Member]:
    """A member before its first step for every seed.

    Args:
        channels: of the rows that it reads, both models' of a crosscoder.

    Raises:
        RlsaeError: the recipe asks for more active latents than there are.
    """
    latents = max(1, round(entry.expansion * (channels // 2 if entry.reads == "both" else channels)))
    key, wanted = "k", 0.0
    if isinstance(entry, TopKFamily):
        wanted = entry.k
    elif isinstance(entry, JumpReluDictionary):
        key, wanted = "l0", entry.l0
    if wanted > latents:
        raise RlsaeError(f"{key}: {wanted:g} active latents of {latents}; lower it or raise expansion")
    own = int.from_bytes(hashlib.sha256(policy.encode()).digest()[:4])
    seeds = {seed: joint_seed(seed, own) if entry.start == "independent" else seed for seed in entry.seeds}
    return {s: ARCHITECTURES[entry.architecture](channels, latents, entry, start, where) for s, start in seeds.items()}


def autoencoders_to_continue(folder: Path | None, entry: Dictionary) -> dict[int, SparseAutoencoder]:
    """The autoencoders that training continues, by seed.

    Raises:
        RlsaeError: no artifact was given, it lacks a seed, or holds another architecture or size.
    """
    if folder is None:
        raise RlsaeError(f"start: {entry.start} needs the dictionaries (--start) that training goes on from")
    found = {seed: SparseAutoencoder.load(path) for seed, path in load_members(folder).items()}
    if missing := sorted(set(entry.seeds) - set(found)):
        raise RlsaeError(f"seeds: {folder} has no seed {missing[0]} to go on from; it has {sorted(found)}")
    for sae in found.values():
        architecture, expansion = sae.metadata["training_architecture"], sae.latents / sae.channels
        if architecture != entry.architecture or sae.latents != max(1, round(entry.expansion * sae.channels)):
            raise RlsaeError(
                f"continues: {folder} holds {architecture} with {expansion:g} latents per channel; "
                f"{entry.architecture} with {entry.expansion:g} cannot go on from it"
            )
    return {seed: found[seed] for seed in entry.seeds}


def model_steps(
    entry: Dictionary, started: dict[int, SparseAutoencoder], saes: dict[int, SparseAutoencoder]
) -> dict[int, Tensor]:
    """Of stage-wise dictionaries, by seed: cosine of each latent's decoder before and after the step from the base's rows to
    those of the policy [F] (Bricken et al. 2024); from then on it is carried along. Of the base: a step without any change."""
    if entry.start == "from_own":
        return {seed: sae.model_step_F for seed, sae in started.items() if sae.model_step_F is not None}
    return {seed: torch.nn.functional.cosine_similarity(sae.W_dec_FD, saes[seed].W_dec_FD) for seed, sae in started.items()}


def external_autoencoder(source: Path | None, store: ActivationStore, layer: int) -> SparseAutoencoder:
    """
    Raises:
        RlsaeError: no folder was given, or its autoencoder reads rows of another width.
    """
    if source is None:
        raise RlsaeError("architecture: external needs the folder of the autoencoder (--source)")
    sae, channels = load_external(source), store.acts(layer).shape[1]
    if sae.channels != channels:
        raise RlsaeError(f"{source}: it reads {sae.channels} channels; layer {layer} of the store has {channels}")
    return sae


def check_rows(store: ActivationStore, layer: int) -> None:
    """
    Raises:
        RlsaeError: nothing could be learnt or scored: no held-out rows, a layer that is constant, or one that is not finite.
    """
    if not store.held_out_rows().any():
        raise RlsaeError(
            "held_out: the store has no held-out rows to score a dictionary on; raise the corpus's held_out or rows"
        )
    mean_D, second_D = store.statistics(layer)
    if not np.isfinite(second_D).all():
        raise RlsaeError(f"layer {layer}: the store holds NaN or infinity; run `rlsae verify` on it")
    if not (second_D - mean_D**2 > 0).any():
        raise RlsaeError(f"layer {layer}: its output is the same at every row; there is nothing to learn")


def rows_digest(order: RowOrder) -> str:
    """Digest of the rows that training reads and of their order: equal for base and tuned, or they are no pair."""
    group = order.store.group
    found = hashlib.sha256(repr((order.batch_rows, order.chunk_rows, order.seed, order.steps)).encode())
    for values in (order.train, group["token"][:], group["document"][:], group["position"][:]):
        found.update(values.tobytes())
    return f"sha256:{found.hexdigest()}"


def centre_and_scale(store: ActivationStore, layer: int, entry: Dictionary, where: torch.device) -> tuple[Tensor, float]:
    """Mean [D] to subtract and factor that brings the mean variance of a channel to 1, or of a row where the architecture
    trains on rows of unit length; 0 and 1 without `normalize`."""
    mean_D, second_D = store.statistics(layer)
    if not entry.normalize:
        return torch.zeros(len(mean_D), device=where), 1.0
    variance_D = second_D - mean_D**2
    variance = float(variance_D.sum() if ARCHITECTURES[entry.architecture].unit_length else variance_D.mean())
    return torch.from_numpy(mean_D).float().to(where), 1 / math.sqrt(variance)


def _normalised(order: RowOrder, from_step: int, mean_D: Tensor, scale: float, where: torch.device) -> Iterator[Tensor]:
    """Centred and scaled rows of each step in float32, in one buffer that the next step overwrites."""
    acts_BD, shift_D = torch.empty(order.batch_rows, order.shape[1], device=where), -scale * mean_D
    for batch_BD in order.batches(from_step):
        yield torch.add(shift_D, acts_BD.copy_(torch.from_numpy(batch_BD)), alpha=scale, out=acts_BD)


def _adam(parameters: dict[str, Tensor], learning_rate: float) -> torch.optim.Optimizer:
    groups = [{"params": list(parameters.values()), "peak_lr": learning_rate}]
    return torch.optim.Adam(groups, lr=learning_rate, fused=True)


def _tensors(
    members: dict[int, Member], optimizers: dict[int, torch.optim.Optimizer], sums: dict[int, Tensor]
) -> dict[str, Tensor]:
    """The partial state of all members."""
    tensors: dict[str, Tensor] = {}
    for seed, member in members.items():
        tensors |= {f"{seed}.{name}": tensor for name, tensor in (member.parameters() | member.counters()).items()}
        tensors |= optimizer_tensors(optimizers[seed], f"{seed}.optimizer")
    return tensors | {f"{seed}.sums": total for seed, total in sums.items()}


def load_members(folder: Path) -> dict[int, Path]:
    """The folder of each seed of a dictionaries artifact."""
    Manifest.read(folder)
    return {int(path.name.removeprefix("seed")): path for path in sorted((folder / SAES).glob("seed*"))}
