"""A finished study opened in a notebook, from its results folder alone: tables, stores, dictionaries, models, texts.

Nothing is read before it is asked for. Models and dictionaries lie on the device that stages would use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
import zarr
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlsae.activations import tokens as token_store
from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.compute import device
from rlsae.corpora import DOCUMENTS
from rlsae.errors import RlsaeError
from rlsae.layout import weights_name
from rlsae.models import load
from rlsae.report.study import STAGES, Study
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import load_members
from rlsae.tuning.fixed_prompts import FixedPrompts, judged_by

if TYPE_CHECKING:
    import xarray


def open_study(results: str | Path, name: str) -> OpenStudy:
    """Open a finished study; no configuration, Snakemake or network is needed.

        study = rlsae.open_study("results", "demo")
        study.tables["comparison/latents"]

    Args:
        results: the folder of all artifacts, wherever it lies now.

    Raises:
        RlsaeError: it holds no such study, or the study is not finished.
    """
    return OpenStudy.find(Path(results), name)


class Tables(Mapping[str, pd.DataFrame]):
    """Tables by stage and name (`comparison/latents`), read when asked for; listing them reads nothing."""

    def __init__(self, readers: Mapping[str, Callable[[], pd.DataFrame]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self:
            raise RlsaeError(f"there is no table {name!r}; the study has: {', '.join(self)}")
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __repr__(self) -> str:
        return "\n".join(self)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class OpenStudy(Study):
    """A study with all that it holds; `manifests` tell settings and metrics of each artifact, `folders` where it lies."""

    def __repr__(self) -> str:
        base, tuned = self.policies.values()
        layers, names = self._choices
        return f"<study {self.name}: {base} against {tuned} on {self.corpus}, layers {layers}, dictionaries {names}>"

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """By the labels of `folders`, of those artifacts that were not left behind."""
        return {label: Manifest.read(folder) for label, folder in self.folders.items() if (folder / MANIFEST).exists()}

    @cached_property
    def where(self) -> torch.device:
        """On which models and dictionaries lie."""
        return device()

    @cached_property
    def tables(self) -> Tables:
        """All tables: of the tuning, divergence, comparison and interpretation, and the training of the dictionaries.

        Columns: docs/artifacts.md.
        """
        folders = {"policies": self.tuned} | {stage: getattr(self, stage) for stage in STAGES}
        files = {
            f"{stage}/{path.stem}": path
            for stage, folder in folders.items()
            for path in [*folder.glob("*.tsv"), *folder.glob("*.parquet")]
        }
        readers = {name: partial(_read_table, files[name]) for name in sorted(files)}
        return Tables(readers | {"dictionaries/metrics": self._training_curves})

    def _training_curves(self) -> pd.DataFrame:
        curves = {key: _read_table(folder / "metrics.parquet") for key, folder in self.dictionaries.items()}
        return pd.concat(curves, names=["role", "layer", "dictionary"]).reset_index(level=[0, 1, 2]).reset_index(drop=True)

    def store(self, role: str) -> ActivationStore:
        """The activations of a policy: `.acts(layer)` is a lazy Zarr array [row, channel], `.group` the Zarr group.

        Raises:
            RlsaeError: there is no such role, or the store is damaged or was not kept.
        """
        return ActivationStore(self.stores[self._role(role)])

    def dataset(self, role: str, layer: int) -> xarray.Dataset:
        """A layer of a store as a lazy dataset: `acts` [row, channel] with the rows' `token`, `document` and `position`.

        Raises:
            RlsaeError: xarray is not installed, or there is no such role or layer.
        """
        try:
            import xarray
        except ImportError:
            raise RlsaeError("xarray is not installed: pip install xarray; or read study.store(role).acts(layer)") from None
        store = self.store(role)
        store.acts(layer)
        of_rows = xarray.open_zarr(store.path, chunks=None)[["token", "document", "position"]]
        return xarray.open_zarr(store.path, group=f"layer/{layer}", chunks=None).assign_coords(of_rows)

    def sae(self, role: str, layer: int, dictionary: str, seed: int | None = None) -> SparseAutoencoder:
        """A trained dictionary, which reads and writes raw activations.

        Args:
            seed: the first by default, which is the one that is interpreted.

        Raises:
            RlsaeError: there is none of this role, layer, name or seed.
        """
        folder = self.dictionaries.get((self._role(role), layer, dictionary))
        if folder is None:
            layers, names = self._choices
            raise RlsaeError(f"there is no dictionary {dictionary!r} of layer {layer}; layers: {layers}; dictionaries: {names}")
        seeds = load_members(folder)
        chosen = min(seeds) if seed is None else seed
        if chosen not in seeds:
            raise RlsaeError(f"dictionary {dictionary!r} of layer {layer} has no seed {seed}; seeds: {_listed(sorted(seeds))}")
        return SparseAutoencoder.load(seeds[chosen]).to(self.where)

    def model(self, role: str) -> PreTrainedModel:
        """A policy as a transformers model in float32; of a checkpoint that is studied, this checkpoint.

        Raises:
            RlsaeError: there is no such role, or transformers cannot load it.
        """
        base, tuned = self.base / "model", self.tuned / weights_name(self.checkpoint)
        return load({"base": base, "tuned": tuned}[self._role(role)], self.where)[0]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of both policies."""
        return AutoTokenizer.from_pretrained(self.base / "model", local_files_only=True, trust_remote_code=False)

    @cached_property
    def tokens(self) -> Tokens:
        """Token ids of the documents: `.ids(document)`."""
        return Tokens.open(self._source(self.comparison, "tokens"))

    @cached_property
    def documents(self) -> pd.DataFrame:
        """`text` and `held_out` of each document, numbered as in stores and tables."""
        tokens = self._source(self.comparison, "tokens")
        table = pd.read_parquet(self._source(tokens, "corpora") / DOCUMENTS).set_index("document")
        return table.loc[zarr.open_group(tokens / token_store.STORE, mode="r")["document"][:]].reset_index(drop=True)

    def prompts(self, count: int, reward_file: str | Path | None = None) -> FixedPrompts:
        """Held-out prompts of the tuning; `.answers(model)` samples responses and scores them by the tuning's reward.

        They meet the same noise in every model, however it is changed, so that differences are those of the models.

        Args:
            count: so many at most.
            reward_file: the file or folder of yours that the reward came from, where it did; the results do not hold it.

        Raises:
            RlsaeError: that file is not given, or is another one than the tuning used.
        """
        path = Path(reward_file) if reward_file else None
        made_from = Manifest.read(self.tuned).inputs.get("file:reward")
        if (digest(path) if path else None) != made_from:
            what = "the reward of this tuning came from a file of yours; give that one" if made_from else "it needs no file"
            raise RlsaeError(f"reward_file is {reward_file}: {what}")
        entry, reward = judged_by(self.tuned, path)
        return FixedPrompts.draw(self._source(self.tuned, "corpora"), self.tokenizer, self.model("base"), entry, reward, count)

    @property
    def _choices(self) -> tuple[str, str]:
        """The layers and the dictionaries that there are."""
        _, layers, names = zip(*self.dictionaries, strict=True)
        return _listed(dict.fromkeys(layers)), _listed(dict.fromkeys(names))

    def _role(self, role: str) -> str:
        if role not in self.stores:
            raise RlsaeError(f"role is {role!r}; expected {' or '.join(map(repr, self.stores))}")
        return role

    def _source(self, folder: Path, stage: str) -> Path:
        """The artifact of a stage that another one was made from."""
        identity = next(name for name in Manifest.read(folder).inputs if name.startswith(f"{stage}/"))
        return self.base.parents[1] / identity


def _read_table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_table(path)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
