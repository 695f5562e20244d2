"""A plant: activations of a base and a tuned model whose every change is known, to prove a procedure on.

Rows are sparse sums of unit directions, x = Σ_k a_k w_k + noise, and both models see the same amplitudes. The tuned model
writes other vectors: some directions are removed, some added, some turned by a known angle, some scaled; every direction
drifts by a small random angle; and one shared linear map of low rank may act on all of them:

    y_base = a W_base + noise,     y_tuned = a (W_base + changes + drift) (I + B) + noise

Documents are bursty: how often a direction fires varies from document to document, and each document adds a small vector of
its own to each model's rows. Shapes: B rows, K known directions, D channels, T documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from rlsae.activations import store as activation_store
from rlsae.activations.tokens import Tokens, consolidate_metadata
from rlsae.resumable import Stage

ANGLES = (15, 30, 45, 60, 90)
TRUTH = "truth.parquet"
OLD = "old-activations"
"""Rows of both models on other documents, in which each direction fires as often as another one does in the new ones."""
TOPICS = 16
TOPIC_BOOST = 3.0
"""How much more often a direction fires in documents of its topic: what correlates directions mildly."""
AMPLITUDE_JITTER = 0.02
"""Relative noise of the amplitudes in the tuned model."""
ROWS_PER_PART = 1 << 20
Map = NDArray[np.float64]
BURSTS = 4.0
"""Shape of the gamma distribution of a direction's rate in a document; smaller is burstier."""


@dataclass(frozen=True)
class Plant:
    """What is planted."""

    seed: int = 0
    channels: int = 64
    directions: int = 256
    documents: int = 2048
    document_rows: int = 100
    densities: tuple[float, float] = (0.005, 0.08)
    """Range of the shares of rows on which a direction fires, drawn log-uniformly."""
    added: int = 8
    removed: int = 8
    rotated: int = 4
    """Per angle of `ANGLES`."""
    rescaled: int = 4
    """Per factor: 2 and 0.5."""
    drift: float = 3.0
    """Largest angle, in degrees, by which each direction turns."""
    linear_share: float = 0.0
    """Size of the shared linear map: energy that it moves, as a share of the variance of the rows."""
    linear_rank: int = 4
    noise: float = 0.03
    """Standard deviation per channel, of each row and of each document's own vector."""

    def without_changes(self) -> Plant:
        """The null: drift, the linear map and noise alone."""
        return replace(self, added=0, removed=0, rotated=0, rescaled=0)


@dataclass(frozen=True)
class Truth:
    """The known directions and what became of them."""

    table: pd.DataFrame
    """`direction kind angle factor density`, one row per direction; kind as in the tags of latents."""
    base_KD: NDArray[np.float64]
    """Vector that each direction writes in base; zeros for added ones."""
    tuned_KD: NDArray[np.float64]

    def of_difference(self) -> Truth:
        """The same with the vector that each direction adds to tuned - base, for dictionaries of the difference."""
        return replace(self, base_KD=self.tuned_KD - self.base_KD, tuned_KD=self.tuned_KD - self.base_KD)


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same directions with length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def turn(vectors_KD: NDArray[np.float64], degrees_K: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Each vector turned by its angle, in a random plane; lengths stay."""
    lengths = np.linalg.norm(vectors_KD, axis=1, keepdims=True)
    along = vectors_KD / lengths
    across = rng.normal(size=vectors_KD.shape)
    across = unit(across - (across * along).sum(1, keepdims=True) * along)
    radians = np.radians(degrees_K)[:, None]
    return lengths * (np.cos(radians) * along + np.sin(radians) * across)


def draw_truth(plant: Plant) -> Truth:
    """Directions, densities and changes, but for the shared linear map."""
    rng = np.random.default_rng([plant.seed, 0])
    kinds = [("added", 0, 0.0)] * plant.added + [("removed", 0, 0.0)] * plant.removed
    kinds += [("rotated", angle, 1.0) for angle in ANGLES for _ in range(plant.rotated)]
    kinds += [("rescaled", 0, factor) for factor in (2.0, 0.5) for _ in range(plant.rescaled)]
    kinds += [("unchanged", 0, 1.0)] * (plant.directions - len(kinds))
    table = pd.DataFrame(kinds, columns=["kind", "angle", "factor"])
    table.insert(0, "direction", range(plant.directions))
    low, high = np.log(plant.densities)
    table["density"] = np.exp(rng.uniform(low, high, plant.directions))
    directions_KD = unit(rng.normal(size=(plant.directions, plant.channels)))
    base_KD = np.where((table.kind == "added").to_numpy()[:, None], 0, directions_KD)
    turned_KD = turn(directions_KD, rng.uniform(0, plant.drift, plant.directions), rng)
    turned_KD = turn(turned_KD, table.angle.to_numpy(float), rng)
    factor = np.where(table.kind == "added", 1, table.factor)
    return Truth(table, base_KD, turned_KD * factor[:, None])


def draw_amplitudes(plant: Plant, density_K: NDArray[np.float64], stream: int = 1) -> Iterator[NDArray[np.float32]]:
    """How strongly each direction fires on the rows of a document [row, K], document by document."""
    rng = np.random.default_rng([plant.seed, stream])
    topic_K = rng.integers(TOPICS, size=plant.directions)
    for _ in range(plant.documents):
        boost_K = np.where(topic_K == rng.integers(TOPICS), TOPIC_BOOST, 1.0) / (1 + (TOPIC_BOOST - 1) / TOPICS)
        rate_K = density_K * boost_K * rng.gamma(BURSTS, 1 / BURSTS, plant.directions)
        fires = rng.random((plant.document_rows, plant.directions)) < rate_K
        yield (fires * (0.5 + rng.exponential(0.6, fires.shape))).astype(np.float32)


def draw_rows(plant: Plant, old_map_DD: Map | None = None) -> tuple[Truth, NDArray[np.float32], NDArray[np.float32], Map]:
    """The truth, the rows of base and the rows of tuned [row, D], and the linear map.

    Args:
        old_map_DD: the map of the tuned model, to draw its rows on the documents of `OLD`.
    """
    truth = draw_truth(plant)
    density_K, stream = truth.table.density.to_numpy(), 1
    if old_map_DD is not None:
        density_K, stream = np.random.default_rng([plant.seed, 3]).permutation(density_K), 4
    rng = np.random.default_rng([plant.seed, 2])
    shape = (plant.documents, plant.document_rows, plant.channels)
    base_TBD, tuned_TBD = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for document, amplitudes_BK in enumerate(draw_amplitudes(plant, density_K, stream)):
        jitter_BK = amplitudes_BK * rng.normal(1, AMPLITUDE_JITTER, amplitudes_BK.shape)
        base_TBD[document] = amplitudes_BK @ truth.base_KD
        tuned_TBD[document] = jitter_BK @ truth.tuned_KD
    base_ND, tuned_ND = base_TBD.reshape(-1, plant.channels), tuned_TBD.reshape(-1, plant.channels)
    map_DD = _linear_map(plant, base_ND, rng) if old_map_DD is None else old_map_DD
    tuned_ND = (tuned_ND @ map_DD).astype(np.float32)
    for acts_ND in (base_ND, tuned_ND):
        own_TD = rng.normal(0, plant.noise, (plant.documents, plant.channels))
        acts_ND += np.repeat(own_TD, plant.document_rows, axis=0) + rng.normal(0, plant.noise, acts_ND.shape)
    return Truth(truth.table, truth.base_KD, truth.tuned_KD @ map_DD), base_ND, tuned_ND, map_DD


def _linear_map(plant: Plant, base_ND: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float64]:
    """I + B, B moving the wanted share of the variance of the base rows."""
    first_RD = unit(rng.normal(size=(plant.linear_rank, plant.channels)))
    second_RD = unit(rng.normal(size=(plant.linear_rank, plant.channels)))
    moved = (base_ND @ first_RD.T @ second_RD).var(0).sum()
    return np.eye(plant.channels) + np.sqrt(plant.linear_share * base_ND.var(0).sum() / moved) * first_RD.T @ second_RD


def write_plant(plant: Plant, out: Path, old: bool = False) -> None:
    """Write `activations/base/` and `activations/tuned/`, as the activations stage would, and `truth.parquet`.

    Args:
        old: write both models' rows on older documents besides, to `old-activations/`.
    """
    truth, *rows, map_DD = draw_rows(plant)
    _write_rows(plant, rows, out / "activations")
    if old:
        _, *rows, _ = draw_rows(plant, map_DD)
        _write_rows(plant, rows, out / OLD)
    _write_truth(truth, out)


def _write_rows(plant: Plant, rows: Sequence[NDArray[np.float32]], folder: Path) -> None:
    for role, acts_ND in zip(("base", "tuned"), rows, strict=True):
        write_activations(folder / role, acts_ND, plant.documents, asdict(plant) | {"role": role})


def write_recovery_plant(out: Path, seed: int = 0, documents: int = 2048) -> None:
    """Write one model's rows to recover directions from: 256 in 64 channels, 3 fire per row, amplitudes from 0.5 to 1.5.

    The plain test of a dictionary, without noise or any change: `activations/base/` and `truth.parquet`.
    """
    plant = Plant(seed, documents=documents, densities=(3 / 256, 3 / 256), drift=0).without_changes()
    truth = draw_truth(plant)
    rng = np.random.default_rng([seed, 1])
    fires = rng.random((documents * plant.document_rows, plant.directions)) < truth.table.density.to_numpy()
    amplitudes_NK = fires * rng.uniform(0.5, 1.5, fires.shape)
    acts_ND = (amplitudes_NK @ truth.base_KD).astype(np.float32)
    write_activations(out / "activations" / "base", acts_ND, documents, {"seed": seed, "role": "base"})
    _write_truth(truth, out)


def _write_truth(truth: Truth, out: Path) -> None:
    vectors = {"base": list(truth.base_KD), "tuned": list(truth.tuned_KD)}
    truth.table.assign(**vectors).to_parquet(out / TRUTH, index=False)


def read_truth(out: Path) -> Truth:
    """What `write_plant` planted."""
    table = pd.read_parquet(out / TRUTH)
    return Truth(table.drop(columns=["base", "tuned"]), np.stack(list(table.base)), np.stack(list(table.tuned)))


def write_activations(folder: Path, acts_ND: NDArray[np.float32], documents: int, settings: dict[str, Any]) -> None:
    """Write rows as the store of layer 0; every tenth document is held out, tokens are numbered by their position."""
    rows, channels = acts_ND.shape
    start = np.linspace(0, rows, documents + 1).astype(np.int64)
    token = (np.arange(rows) - np.repeat(start[:-1], np.diff(start))).astype(np.int32)
    tokens = Tokens(token, start, np.arange(documents) % 10 == 9, drop_positions=0)
    with Stage("activations", folder, settings, {}) as stage:
        path = stage.staging / activation_store.STORE
        attributes = {"policy": settings["role"], "hook": "plant", "modules": {"0": "plant"}}
        activation_store.create(path, tokens, rows, [0], channels, "float16", ROWS_PER_PART, None, **attributes)
        group = zarr.open_group(path, mode="a")
        array = group["layer/0/acts"]
        size = array.shards[0]
        written = [
            activation_store.write_shard(path, array, 0, first, acts_ND[first : first + size].astype(np.float16))
            for first in range(0, rows, size)
        ]
        activation_store.finish(path, 0, written)
        consolidate_metadata(group)
        stage.publish({"documents": documents, "rows": rows, "dropped_rows": 0, "layers": [0], "channels": channels})
