"""The Hugging Face hub: what a configuration wants from it, fetched ahead, and the one message where it cannot be reached.

Light, so that a login node can run it: without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlsae.artifacts import digest, stored_bytes, write_atomically
from rlsae.config import Config, HubCorpus, HubModel
from rlsae.errors import RlsaeError

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Configuration, weights and tokenizer: nothing that has to be unpickled, and no code."""


@dataclass(frozen=True)
class Wanted:
    """A repository that a configuration names."""

    key: str
    """Of the configuration: `models.pythia`."""
    kind: str
    """`model` or `dataset`."""
    repository: str
    revision: str | None
    subset: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Fetched:
    """What lies in the cache now."""

    kind: str
    repository: str
    revision: str | None
    commit: str
    """Commit of a model, fingerprint of a data set's rows."""
    bytes: int
    digest: str
    """SHA-256 over the names and contents of all files; of a data set, over its rows in the cache."""


def unreachable(kind: str, repository: str, revision: str | None, error: Exception) -> RlsaeError:
    """The error of every stage that could not load something from the hub."""
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True", "ON", "YES") else ""
    told = str(error).strip().splitlines() or [type(error).__name__]
    return RlsaeError(
        f"cannot load the {kind} {repository} at revision {revision or 'main'} from the hub{offline}: {told[0]}\n"
        "Is this machine offline? Run `rlsae prefetch CONFIG` where there is a network and bring the cache along "
        "(docs/offline.md), or copy it and give its path"
    )


def wanted(config: Config) -> list[Wanted]:
    """Every repository that a configuration names, each once."""
    found: dict[tuple[Any, ...], Wanted] = {}
    for one in _named(config):
        found.setdefault((one.kind, one.repository, one.revision, one.subset, one.split), one)
    return list(found.values())


def _named(config: Config) -> Iterator[Wanted]:
    for name, corpus in config.corpora.items():
        if isinstance(corpus, HubCorpus) and not Path(corpus.dataset).exists():
            yield Wanted(f"corpora.{name}", "dataset", corpus.dataset, corpus.revision, corpus.subset, corpus.split)
    for name, model in config.models.items():
        if isinstance(model, HubModel):
            yield Wanted(f"models.{name}", "model", model.repository, model.revision)
    for section in ("rewards", "tunings", "llms"):
        for name, entry in getattr(config, section).items():
            if repository := getattr(entry, "repository", None):
                yield Wanted(f"{section}.{name}", "model", repository, entry.revision)


def prefetch(config: Config, record: Path) -> Iterator[tuple[Wanted, Fetched]]:
    """Bring everything that a configuration wants into the caches of the hub's libraries (`HF_HOME`).

    What is there already is not fetched again, and must be what the record says.

    Args:
        record: JSON file of what was fetched, by kind, repository and revision; written after each.

    Raises:
        RlsaeError: the hub cannot be reached, or a revision holds something else than when it was recorded.
    """
    known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for one in wanted(config):
        fetched = _dataset(one) if one.kind == "dataset" else _model(one)
        name = f"{one.kind} {one.repository}@{one.revision or 'main'}" + (f" {one.split}" if one.split else "")
        before = known.setdefault(name, asdict(fetched))
        if before["digest"] != fetched.digest:
            raise RlsaeError(
                f"{one.key}: the {one.kind} {one.repository} at revision {one.revision or 'main'} is not what {record} says: "
                f"it was commit {before['commit']}, {before['digest'][:19]}…; now it is {fetched.commit}, "
                f"{fetched.digest[:19]}…. Pin its commit, or delete the record if the change is wanted"
            )
        write_atomically(record, json.dumps(known, indent=1, sort_keys=True) + "\n")
        yield one, fetched


def _model(one: Wanted) -> Fetched:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(one.repository, revision=one.revision, allow_patterns=MODEL_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise unreachable("model", one.repository, one.revision, error) from None
    if not list(folder.glob("*.safetensors")):
        raise RlsaeError(f"{one.key}: {one.repository} at revision {one.revision} holds no weights in safetensors")
    return Fetched("model", one.repository, one.revision, folder.name, stored_bytes(folder), digest(folder))


def _dataset(one: Wanted) -> Fetched:
    table = load_rows(one.repository, one.subset, one.split or "train", one.revision)
    files = [Path(file["filename"]) for file in table.cache_files]
    size = sum(path.stat().st_size for path in files)
    content = "+".join(digest(path) for path in files)
    return Fetched("dataset", one.repository, one.revision, table._fingerprint, size, content)


def load_rows(dataset: str, subset: str | None, split: str, revision: str | None) -> Any:
    """A split of a data set of the hub, or of a local folder in its layout, as `datasets.Dataset`.

    Raises:
        RlsaeError: it cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(dataset, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a loading script
        if Path(dataset).exists():
            raise RlsaeError(f"cannot load the data set {dataset} (split {split}): {error}") from None
        raise unreachable("data set", f"{dataset} (split {split})", revision, error) from None
