"""What the tables and figures are made of: rows of finished studies, each with its study, model and task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rlsae.errors import RlsaeError
from rlsae.report.content import records
from rlsae.report.study import Study

STUDY = ["study", "model", "tuned_on"]
EXTREMES = (-3.9, 3.4)
"""Range of VADER's lexicon, onto which the paper stretches the predictions of a probe between their 10 % and 90 % quantiles."""


@dataclass(frozen=True)
class Exhibit:
    """One table or figure in the paper's form."""

    name: str
    """`table4`, `figure7`."""
    title: str
    note: str
    """What is measured otherwise than in the paper."""
    rows: pd.DataFrame
    """Ours, with what is published beside it."""
    svg: str | None = None
    """None of a table, and of a figure where no study has what it shows."""


def told(study: Study) -> dict[str, str]:
    """Study, model, and the corpus of the tuning's prompts or pairs."""
    prompts = next(name for name in study.manifests["tuned"].inputs if name.startswith("corpora/"))
    return {"study": study.name, "model": study.policies["base"], "tuned_on": prompts.partition("/")[2]}


def interpreted(study: Study, name: str) -> pd.DataFrame:
    """A table of a study's interpretation.

    Raises:
        RlsaeError: the study was interpreted by a version that did not write it.
    """
    path = study.interpretation / f"{name}.parquet"
    if not path.exists():
        raise RlsaeError(
            f"{path} is not there: the study {study.name!r} was made by an earlier version; run the workflow again"
        )
    return pd.read_parquet(path)


def of_studies(studies: Sequence[Study], name: str) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """What tells each study, and its table of the interpretation, where that has rows."""
    for study in studies:
        table = interpreted(study, name)
        if len(table):
            yield told(study), table


def probe_scores(studies: Sequence[Study], probe: str, metrics: Mapping[str, str], by: Sequence[str] = ()) -> pd.DataFrame:
    """Scores of the tuned model's latents, a row per study (and target), each metric a column with its interval beside it.

    Args:
        metrics: column by the name of a metric of `probes.parquet`.
        by: columns of `probes.parquet` that have rows of their own.
    """
    rows: list[dict[str, Any]] = []
    for who, table in of_studies(studies, "probes"):
        mine = table[(table.probe == probe) & (table.features == "tuned_sae") & (table.status == "scored")]
        for target, scores in mine.groupby("target", sort=False):
            row: dict[str, Any] = {**who, **{key: target for key in by}}
            for score in records(scores[scores.metric.isin(list(metrics))]):
                column = metrics[score["metric"]]
                row |= {column: score["value"], f"{column}_low": score["ci_low"], f"{column}_high": score["ci_high"]}
            rows.append(row)
    columns = [column for name in metrics.values() for column in (name, f"{name}_low", f"{name}_high")]
    return pd.DataFrame(rows, columns=[*STUDY, *by, *columns])


def probed_words(studies: Sequence[Study]) -> Iterator[tuple[Study, pd.DataFrame]]:
    """Of each study with a scored probe: word, polarity and held-out prediction (mean over rows), by rising polarity.

    Predictions are stretched onto VADER's range as the paper does; words are lower-cased.
    """
    for study in studies:
        found = interpreted(study, "probe_predictions")
        found = found[(found.features == "tuned_sae") & (found.target == "lexicon")]
        if found.empty:
            continue
        low, high = found.prediction.quantile([0.1, 0.9])
        scaled = EXTREMES[0] + (found.prediction - low) / max(high - low, 1e-12) * (EXTREMES[1] - EXTREMES[0])
        words = found.assign(word=found.word.str.lower(), predicted=scaled.clip(*EXTREMES))
        mean = words.groupby("word", as_index=False)[["polarity", "predicted"]].mean()
        yield study, mean.sort_values(["polarity", "word"], ignore_index=True)


def evenly(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most so many rows of a table, evenly spaced, the first and last among them."""
    places = np.unique(np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(int))
    return table.iloc[places]


def frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A table with these columns, also without rows."""
    return pd.DataFrame(rows, columns=[*STUDY, *columns])
