"""Dictionaries as a folder to upload to a model hub, from which `sae_lens.SAE.from_pretrained` loads each by its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsae.artifacts import MANIFEST, Manifest, artifact_id, canonical_json, digest
from rlsae.errors import RlsaeError
from rlsae.sae.dictionary import CONFIG, SPARSITY, WEIGHTS, read_config
from rlsae.sae.train import SAES, load_members

STAGE = "dictionaries"
CARD = "README.md"
SCORES = {"fvu": "FVU", "l0": "L0", "dead_share": "dead", "ce_recovered": "CE recovered", "kl_recovered": "KL recovered"}
CARD_TEXT = """---
library_name: saelens
tags:
- sparse-autoencoder
- saelens
- interpretability
{license}---

# Sparse autoencoders

They read raw activations of the hooked module of the model that is named, in the format of SAELens:

```python
from sae_lens import SAE

sae = SAE.from_pretrained("OWNER/REPOSITORY", "{first}")
```

## Autoencoders

Scores are measured on held-out documents: FVU is the share of variance left unexplained, L0 the mean number of active latents,
dead the share of latents that never fire; CE and KL recovered are 1 where the reconstruction serves the model as well as its
own activations and 0 where no better than zeros.

{autoencoders}

## Provenance

Digests of manifests written by rlsae: of the dictionaries, and of the activations that trained them.

{provenance}
"""


@dataclass(frozen=True)
class Published:
    """One autoencoder of a hub folder."""

    folder: Path
    config: dict[str, Any]
    """Its cfg.json."""
    scores: dict[str, Any]
    source: str
    """Identifier of its artifact."""

    @property
    def name(self) -> str:
        """Its folder in the repository: policy, hook, dictionary and seed."""
        metadata = self.config["metadata"]
        return f"{metadata['model_name']}/{metadata['hook_name']}/{self.folder.parents[1].name}/{self.folder.name}"


def export(folders: list[Path], out: Path, license_id: str | None = None) -> list[str]:
    """Write a folder per autoencoder, in the format of SAELens, and a model card.

    Args:
        folders: dictionaries artifacts; out: a folder that is empty or not there.
        license_id: licence of the card as the hub names it; the card states none otherwise.

    Returns:
        the names under which the autoencoders load.

    Raises:
        RlsaeError: a folder holds no dictionaries artifact or changed since it was written, two autoencoders would have one
            name, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RlsaeError(f"{out} is not empty; choose another folder for the export or empty it")
    digests: dict[str, str] = {}
    found: dict[str, Published] = {}
    for folder in folders:
        for sae in published(folder):
            if other := found.get(sae.name):
                raise RlsaeError(f"{sae.folder} and {other.folder} would both be {sae.name}; export them into two folders")
            found[sae.name] = sae
            digests[sae.source] = digest(folder / MANIFEST)
    for name, sae in found.items():
        (out / name).mkdir(parents=True)
        for file in (CONFIG, WEIGHTS, SPARSITY):
            shutil.copyfile(sae.folder / file, out / name / file)
    (out / CARD).write_text(card(found, digests, license_id), encoding="utf-8")
    return list(found)


def published(folder: Path) -> Iterator[Published]:
    """The autoencoders of an artifact.

    Raises:
        RlsaeError: it is none of dictionaries, or its autoencoders are not those of its manifest.
    """
    manifest = Manifest.read(folder)
    if manifest.stage != STAGE:
        raise RlsaeError(f"{folder} is an artifact of the stage {manifest.stage}; expected a folder of {STAGE}")
    if digest(folder / SAES) != manifest.outputs[SAES]:
        raise RlsaeError(f"{folder / SAES} changed since it was written; run `rlsae verify {folder}`")
    for seed, path in load_members(folder).items():
        yield Published(path, read_config(path / CONFIG), manifest.metrics[f"seed{seed}"], artifact_id(folder, STAGE))


def card(saes: dict[str, Published], digests: dict[str, str], license_id: str | None) -> str:
    """The model card: how to load the autoencoders, what each is, how well it does and where it comes from.

    Args:
        saes: by name; digests: of the manifests, by identifier of the artifact.
    """
    rows, made = [], {}
    for name, sae in saes.items():
        metadata, scores = sae.config["metadata"], [_number(sae.scores[key]) for key in SCORES]
        what = [metadata["training_architecture"], str(sae.config["d_in"]), str(sae.config["d_sae"])]
        rows.append([f"`{name}`", metadata["model_name"], f"`{metadata['hook_name']}`", *what, *scores])
        facts = metadata["rlsae"]
        cells = [sae.source, digests[sae.source], facts["activations"], canonical_json(facts["settings"])]
        made[sae.source] = [f"`{cell}`" for cell in cells]
    return CARD_TEXT.format(
        license=f"license: {license_id}\n" if license_id else "",
        first=next(iter(saes)),
        autoencoders=_table(["name", "model", "hook", "architecture", "channels", "latents", *SCORES.values()], rows),
        provenance=_table(["artifact", "manifest", "activations", "settings"], list(made.values())),
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"
