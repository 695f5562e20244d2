"""Explained latents as the pages show them: the table's rows, and all that is known of each on a page of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rlsae.comparison.kinds import CHANGED, KEY
from rlsae.report.content import records
from rlsae.report.formatting import tenths, visible
from rlsae.report.study import Study

BEFORE, AFTER = 5, 2
"""Tokens around the peak of the strongest window that the table shows."""


@dataclass(frozen=True)
class Token:
    """One token of a window, its spaces drawn."""

    text: str
    activation: float
    heat: int
    """Activation as tenths of the latent's largest shown, from 0 to 9."""
    peak: bool


@dataclass(frozen=True)
class Window:
    """The tokens around one of the strongest activations of a latent, with what it reads in the rows of either model."""

    document: int
    held_out: bool
    by_role: dict[str, list[Token]]


@dataclass(frozen=True)
class Failure:
    """A held-out window that an explanation ranks wrongly."""

    kind: str
    document: int
    tokens: list[Token]
    predicted: list[Token]
    """The same tokens with what the explanation expects there."""


@dataclass(frozen=True)
class Judged:
    """What one explainer says of a latent, and what the judges find of it."""

    explainer: str
    text: str
    status: str
    scores: dict[str, dict[str, Any]]
    """Row of `explanations.parquet` by judge."""
    failures: list[Failure]


@dataclass(frozen=True)
class Latent:
    """One explained latent."""

    row: dict[str, Any]
    """Columns of the interpretation's and the comparison's `latents.parquet`."""
    page: str
    """Name of its page, which is also its anchor in the table."""
    partner: str | None
    """Page of its partner in the other model, where that one is explained too."""
    windows: list[Window]
    explanations: list[Judged]
    judges: list[str]

    @property
    def role(self) -> str:
        return self.row["role"]

    @property
    def other(self) -> str:
        return "tuned" if self.role == "base" else "base"

    @property
    def strongest(self) -> list[Token]:
        """A few tokens around the peak of the strongest window."""
        if not self.windows:
            return []
        tokens = self.windows[0].by_role[self.role]
        peak = next(place for place, token in enumerate(tokens) if token.peak)
        return tokens[max(0, peak - BEFORE) : peak + AFTER + 1]

    @property
    def histogram(self) -> list[int]:
        return list(self.row["histogram"])


def latents(study: Study) -> list[Latent]:
    """The explained latents in the order of the artifact."""
    rows = records(study.latents)
    if not rows:
        return []
    windows = {key: list(_windows(group)) for key, group in _by_latent(study, "examples")}
    said = _explanations(study)
    pages = {_key(row): _page(row) for row in rows}
    judges = list(dict.fromkeys(judge for of_latent in said.values() for one in of_latent for judge in one.scores))
    return [
        Latent(
            row,
            pages[_key(row)],
            pages.get(("tuned" if row["role"] == "base" else "base", *_key(row)[1:4], row["match_latent"])),
            windows.get(_key(row), []),
            said.get(_key(row), []),
            judges,
        )
        for row in rows
    ]


def well_explained(latents: Sequence[Latent], count: int) -> list[Latent]:
    """The latents of the tuned model whose explanations do best on held-out rows."""
    scored = [latent for latent in latents if latent.role == "tuned" and latent.row["status"] == "scored"]
    return sorted(scored, key=lambda latent: -latent.row["detection_auc"])[:count]


def largest_changes(latents: Sequence[Latent], count: int) -> list[Latent]:
    """The latents whose writes changed most: replicated ones first, and none without a tag."""
    changed = [latent for latent in latents if latent.row["tag"] in CHANGED]
    return sorted(changed, key=lambda latent: (latent.row["replicated"] is not True, -latent.row["write_change"]))[:count]


def _explanations(study: Study) -> dict[tuple[Any, ...], list[Judged]]:
    failures = {key: list(_failures(group)) for key, group in _by_latent(study, "failures", "explainer")}
    table = pd.read_parquet(study.interpretation / "explanations.parquet")
    found: dict[tuple[Any, ...], list[Judged]] = {}
    by_judge: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in records(table[table.control == ""]):
        by_judge.setdefault((*_key(row), row["explainer"]), []).append(row)
    for key, rows in by_judge.items():
        scores = {row["judge"]: row for row in rows}
        judged = Judged(key[-1], rows[0]["explanation"], rows[0]["status"], scores, failures.get(key, []))
        found.setdefault(key[:-1], []).append(judged)
    return found


def _by_latent(study: Study, table: str, *further: str) -> Any:
    return pd.read_parquet(study.interpretation / f"{table}.parquet").groupby([*KEY, *further], sort=False)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[column] for column in KEY)


def _page(row: dict[str, Any]) -> str:
    return "{role}-{layer}-{dictionary}-{latent}".format(**row)


def _windows(examples: pd.DataFrame) -> Iterator[Window]:
    largest = max(max(activations) for activations in examples.activations)
    for row in records(examples.sort_values("rank")):
        own, other = row["role"], "tuned" if row["role"] == "base" else "base"
        columns = {own: row["activations"], other: row["activations_other"]}
        by_role = {role: _tokens(row["tokens"], columns[role], largest, row["peak"]) for role in ("base", "tuned")}
        yield Window(row["document"], row["held_out"], by_role)


def _failures(rows: pd.DataFrame) -> Iterator[Failure]:
    for row in records(rows):
        shown = [_tokens(row["tokens"], row[column], max(row[column])) for column in ("activations", "predictions")]
        yield Failure(row["failure"], row["document"], *shown)


def _tokens(texts: Sequence[str], activations: Sequence[float], largest: float, peak: int | None = None) -> list[Token]:
    return [
        Token(visible(text), float(value), tenths(value / largest) if value > 0 else 0, place == peak)
        for place, (text, value) in enumerate(zip(texts, activations, strict=True))
    ]
