"""The finished artifacts of a study, opened for its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from rlsae.artifacts import Manifest, artifact_id

KEY = ["role", "layer", "dictionary", "seed", "latent"]


@dataclass(frozen=True)
class Study:
    """Where the artifacts of a study lie, and what they hold."""

    name: str
    base: Path
    tuned: Path
    divergence: Path
    comparison: Path
    interpretation: Path
    dictionaries: dict[tuple[str, int, str], Path]
    """By role, layer and dictionary."""
    stores: dict[str, Path]
    """By role."""

    @property
    def folders(self) -> dict[str, Path]:
        """Every artifact by a label that a person understands."""
        labels = ("base", "tuned", "divergence", "comparison", "interpretation")
        return (
            {label: getattr(self, label) for label in labels}
            | {f"{role} layer {layer} {name}": folder for (role, layer, name), folder in self.dictionaries.items()}
            | {f"{role} activations": folder for role, folder in self.stores.items()}
        )

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """By the labels of `folders`."""
        return {label: Manifest.read(folder) for label, folder in self.folders.items()}

    @cached_property
    def identifiers(self) -> dict[str, str]:
        """Identifier of each artifact (`models/tiny`), by the labels of `folders`."""
        return {label: artifact_id(folder, self.manifests[label].stage) for label, folder in self.folders.items()}

    @property
    def policies(self) -> dict[str, str]:
        """Name of the policy of each role; that of a checkpoint ends with `@` and its step."""
        names = {role: self.identifiers[role].split("/")[-1] for role in ("base", "tuned")}
        if self.checkpoint is not None:
            names["tuned"] += f"@{self.checkpoint}"
        return names

    @property
    def checkpoint(self) -> int | None:
        """Step of the tuned policy whose activations are studied; None for the finished one."""
        return self.manifests["tuned activations"].parameters.get("checkpoint")

    @property
    def corpus(self) -> str:
        """Name of the corpus whose activations are compared."""
        return self.identifiers["base activations"].split("/")[1].removeprefix(self.policies["base"] + ".")

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """The chosen layers, why, and the stability of the choice."""
        return json.loads((self.divergence / "chosen.json").read_text(encoding="utf-8"))

    @cached_property
    def aggregates(self) -> pd.DataFrame:
        """Mean matched cosines with a `note` that says why a value is missing, ordered by layer, sizes last."""
        table = pd.read_parquet(self.comparison / "aggregates.parquet")
        table = table[table.measure.str.startswith("mmcs")]
        seeds = {name: len(self.manifests[f"{role} layer {layer} {name}"].metrics) for role, layer, name in self.dictionaries}
        one = table.dictionary.map(seeds) == 1
        table["note"] = ""
        table.loc[table.value.isna(), "note"] = "no live latents"
        table.loc[one & (table.measure == "mmcs_base_tuned_other_seed"), "note"] = "needs two seeds"
        table.loc[one & (table.measure == "mmcs_floor"), "note"] = "no floor: one seed"
        sizes = table.measure.str.startswith("mmcs_small_big")
        return table.assign(sizes=sizes).sort_values(["layer", "sizes"], kind="stable", ignore_index=True)

    @cached_property
    def latents(self) -> pd.DataFrame:
        """The explained latents with what the comparison knows of them."""
        explained = pd.read_parquet(self.interpretation / "latents.parquet")
        if explained.empty:
            return explained
        return explained.merge(pd.read_parquet(self.comparison / "latents.parquet"), on=KEY, how="left", validate="1:1")
