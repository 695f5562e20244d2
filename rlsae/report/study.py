"""The finished artifacts of a study: where they lie, found from the results alone, and what their manifests tell."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd

from rlsae.artifacts import MANIFEST, Manifest, artifact_id, digest
from rlsae.comparison.kinds import KEY
from rlsae.errors import RlsaeError

STAGES = ("divergence", "comparison", "interpretation")
"""Stages whose artifacts bear the name of the study, in their order."""


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

    @classmethod
    def find(cls, results: Path, name: str) -> Self:
        """Find the artifacts of a study by what its manifests name, wherever the results lie now; no configuration is needed.

        It warns where the interpretation was made from an artifact that has been replaced since.

        Raises:
            RlsaeError: there is no such study, or a stage of it is not finished.
        """
        folders = _finished(results, name)
        stores: dict[str, Path] = {}
        dictionaries: dict[tuple[str, int, str], Path] = {}
        policies: dict[str, Path] = {}
        for identity, made_from in Manifest.read(folders["interpretation"]).inputs.items():
            if identity.startswith("file:"):
                continue
            stage, of, *inside = identity.split("/")
            folder, role = results / identity, "tuned" if "." in of.rpartition(".")[0] else "base"
            if stage in ("models", "policies"):
                policies[stage] = folder
            elif stage == "activations":
                stores[role] = folder
            elif stage == "dictionaries":
                dictionaries[role, int(inside[-2].removeprefix("layer")), inside[-1]] = folder
            if (folder / MANIFEST).exists() and digest(folder / MANIFEST) != made_from:
                warnings.warn(f"interpretation/{name} was made from another {identity}; run the workflow again", stacklevel=3)
        order = Manifest.read(folders["comparison"]).parameters["dictionaries"]
        dictionaries = {key: dictionaries[key] for key in sorted(dictionaries, key=lambda key: (*key[:2], order.index(key[2])))}
        stores = dict(sorted(stores.items()))
        return cls(name, policies["models"], policies["policies"], **folders, dictionaries=dictionaries, stores=stores)

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
        return {role: _policy_and_corpus(folder)[0] for role, folder in self.stores.items()}

    @property
    def checkpoint(self) -> int | None:
        """Step of the tuned policy whose activations are studied; None for the finished one."""
        _, _, step = self.policies["tuned"].partition("@")
        return int(step) if step else None

    @property
    def corpus(self) -> str:
        """Name of the corpus whose activations are compared."""
        return _policy_and_corpus(self.stores["base"])[1]

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


def _finished(results: Path, name: str) -> dict[str, Path]:
    """Folder of each of a study's own stages."""
    folders = {stage: results / stage / name for stage in STAGES}
    missing = [stage for stage, folder in folders.items() if not (folder / MANIFEST).exists()]
    if len(missing) == len(STAGES):
        known = sorted({path.parent.name for stage in STAGES for path in results.glob(f"{stage}/*/{MANIFEST}")})
        there = f"its studies: {', '.join(known)}" if known else "expected a folder with divergence/ and comparison/ in it"
        raise RlsaeError(f"{results} holds no study {name!r}; {there}")
    if missing:
        raise RlsaeError(
            f"the study {name!r} is not finished: {folders[missing[0]]} has no {MANIFEST}; make it with "
            f"snakemake --cores all {missing[0]}"
        )
    return folders


def _policy_and_corpus(store: Path) -> tuple[str, str]:
    """Of `activations/tiny.ppo@16.reviews/mlp/layers-3`, `tiny.ppo@16` and `reviews`."""
    policy, _, corpus = store.parents[1].name.rpartition(".")
    return policy, corpus
