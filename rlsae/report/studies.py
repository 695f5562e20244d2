"""The page that shows several studies side by side: null and strong, PPO and DPO, one seed and another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from rlsae.artifacts import write_atomically
from rlsae.divergence.figures import TITLES, whole_layers
from rlsae.errors import RlsaeError
from rlsae.plots import ACCENT, SMALL, STYLE, Chart, chart
from rlsae.report import content, findings
from rlsae.report.formatting import tenths
from rlsae.report.render import render
from rlsae.report.study import Study
from rlsae.report.sweep import dictionaries, frontier

FIGURES = {
    "reward_gain": "Gain of reward on held-out prompts",
    "kl": "KL from the base (nats per response)",
    "tagged": "Share of the tested latents that are tagged",
    "fvu": "FVU of each dictionary",
    "detection": "AUC of detection of the explanations",
    "probe": "Probe of the tuned model's latents (τ)",
    "ablation": "Change of reward without its latents, by dictionary",
    "transplant": "Share of the gain that all levels carry over, by layer",
}
"""Title of each figure that has a row per study."""
FOLDER = "index.figures"
"""No study can have this name."""


@dataclass(frozen=True)
class Shift:
    """How far each layer of each study moved, by one measure."""

    title: str
    layers: list[int]
    rows: dict[str, list[tuple[float | None, int]]]
    """By study, the value of each layer and its size as tenths of the largest."""


def build_page(results: Path, names: Sequence[str]) -> None:
    """Write `reports/index.html`, with the files of its own figures beside it.

    Raises:
        RlsaeError: a study has no report yet, or there are none at all.
    """
    reports = results / "reports"
    missing = [name for name in names if not (reports / name / "index.html").exists()]
    if missing or not names:
        raise RlsaeError(
            f"{reports} holds no report of {', '.join(missing) or 'any study'}; make it with: snakemake --cores all reports"
        )
    studies = [Study.find(results, name) for name in names]
    table = pd.DataFrame(
        [row for study in studies for row in points(study)], columns=["study", "figure", "value", "low", "high"]
    )
    drawn = [_dots(rows, str(figure), list(names)) for figure, rows in table.groupby("figure", sort=False)]
    (reports / FOLDER).mkdir(exist_ok=True)
    sweep = dictionaries(studies)
    swept = [frontier(sweep)]
    for figure in [*drawn, *swept]:
        write_atomically(reports / FOLDER / f"{figure.name}.svg", figure.file)
        write_atomically(reports / FOLDER / f"{figure.name}.csv", figure.data.to_csv(index=False))
    page = render(
        "studies.html.j2",
        comparing=True,
        studies=studies,
        headlines=[findings.reward_sentence(study.manifests["tuned"].metrics) for study in studies],
        changed=[findings.changes_sentence(content.changes(study)) for study in studies],
        metrics=_metrics(studies),
        settings=differing(studies),
        figures=drawn,
        sweep=content.records(sweep),
        swept=swept,
        folder=FOLDER,
        shifts=list(_shifts(studies)),
        gallery=gallery(reports, list(names)),
    )
    write_atomically(reports / "index.html", page)


def points(study: Study) -> Iterator[tuple[str, str, Any, Any, Any]]:
    """Study, figure, value and 95 % interval of every dot of the figures; the interval is nan where there is none."""
    none = float("nan")
    tuned = study.manifests["tuned"].metrics
    for key in ("reward_gain", "kl"):
        if tuned.get(key) is not None:
            yield study.name, key, tuned[key], *(tuned.get(f"{key}_ci95") or (none, none))
    for pair in content.changes(study):
        if pair.tested:
            yield study.name, "tagged", pair.changed / pair.tested, none, none
    for quality in content.qualities(study):
        yield study.name, "fvu", quality.scores["fvu"], none, none
    summary = json.loads((study.interpretation / "summary.json").read_text(encoding="utf-8"))
    if found := summary["scores"].get("ensemble detection"):
        yield study.name, "detection", found["mean"], *found["ci95"]
    probes = content.scored_probes(pd.read_parquet(study.interpretation / "probes.parquet"))
    if tau := probes.get(("tuned_sae", "tau")):
        yield study.name, "probe", tau["value"], tau["ci_low"], tau["ci_high"]
    ablations = pd.read_parquet(study.interpretation / "ablations.parquet")
    for row in content.records(ablations[(ablations.policy == "tuned") & (ablations.set == "reward")]):
        yield study.name, "ablation", row["reward_change"], row["ci_low"], row["ci_high"]
    transplants = pd.read_parquet(study.interpretation / "transplants.parquet")
    for row in content.records(transplants.groupby("layer", sort=False).tail(1)):
        yield study.name, "transplant", row["share"], row["share_low"], row["share_high"]


@rc_context(STYLE)
def _dots(rows: pd.DataFrame, figure: str, names: list[str]) -> Chart:
    """A dot per value with its interval, a line of the figure per study."""
    drawn = Figure(figsize=(SMALL[0], 0.6 + 0.24 * len(names)), layout="constrained")
    axes = drawn.subplots()
    for place, name in enumerate(names):
        mine = rows[rows.study == name]
        for number, (value, low, high) in enumerate(zip(mine.value, mine.low, mine.high, strict=True)):
            height = place + 0.5 * ((number + 1) / (len(mine) + 1) - 0.5)
            axes.plot([low, high], [height, height], color=ACCENT, linewidth=0.8)
            axes.plot(value, height, "o", color=ACCENT, markersize=3.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.08)
    return chart(drawn, f"studies-{figure}", FIGURES[figure], rows)


def _metrics(studies: list[Study]) -> dict[str, list[content.Metric | None]]:
    """The rows of the tables of the tunings by name, a metric per study."""
    of = [{metric.name: metric for metric in content.tuning_metrics(study.manifests["tuned"].metrics)} for study in studies]
    return {name: [metrics.get(name) for metrics in of] for name in dict.fromkeys(name for metrics in of for name in metrics)}


def differing(studies: list[Study]) -> dict[str, list[str]]:
    """Settings of tuning and reward in which the studies differ, and what else tells them apart, a value per study."""
    of = []
    for study in studies:
        tuned = study.manifests["tuned"].parameters
        flat = {f"{part}.{key}": value for part in ("tuning", "reward") for key, value in tuned[part].items()}
        told = {"base": study.policies["base"], "corpus": study.corpus, "checkpoint": study.checkpoint or "finished"}
        of.append({key: "" if value is None else str(value) for key, value in (told | flat).items()})
    keys = dict.fromkeys(key for settings in of for key in settings)
    found = {key: [settings.get(key, "") for settings in of] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _shifts(studies: list[Study]) -> Iterator[Shift]:
    tables = {study.name: whole_layers(pd.read_parquet(study.divergence / "layers.parquet")) for study in studies}
    every = pd.concat(tables, names=["study"])
    layers = sorted(every.layer.unique().tolist())
    for measure, rows in every.groupby("measure", sort=False):
        values = rows.reset_index("study").pivot_table(index="study", columns="layer", values="value")
        values = values.reindex(index=list(tables), columns=layers)
        largest = float(np.nanmax(np.abs(values.to_numpy(float)))) or 1.0
        yield Shift(
            TITLES[str(measure)],
            layers,
            {
                name: [_shaded(value, largest) for value in row]
                for name, row in zip(tables, values.to_numpy().tolist(), strict=True)
            },
        )


def _shaded(value: float, largest: float) -> tuple[float | None, int]:
    return (None, 0) if math.isnan(value) else (value, tenths(abs(value) / largest))


def gallery(reports: Path, names: list[str]) -> dict[str, list[str | None]]:
    """Files of the figures that at least two reports have, by the figure's name; None for a study without it."""
    of = {name: {path.name for path in (reports / name / "figures").glob("*.svg")} for name in names}
    shared = sorted(file for file in set().union(*of.values()) if sum(file in files for files in of.values()) > 1)
    return {
        file.removesuffix(".svg"): [f"{name}/figures/{file}" if file in of[name] else None for name in names] for file in shared
    }
