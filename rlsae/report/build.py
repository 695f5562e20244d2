"""Stage `reports`: static pages that show what a study found, openable from disk without a server or a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlsae.comparison.kinds import TAGS
from rlsae.divergence.figures import TITLES, agreement_and_steps, charts
from rlsae.report import cause_figures, change_figures, content, figures, findings, formatting
from rlsae.report.content import (
    chain,
    changes,
    families,
    largest_changes,
    latents,
    qualities,
    records,
    shifts,
    transfers,
    tuning_metrics,
    well_explained,
)
from rlsae.report.study import Study
from rlsae.resumable import Stage
from rlsae.status import BANNER, write_banner

HERE = Path(__file__).parent
SAMPLES = 20
"""Prompts whose responses are shown side by side."""
PREVIEW = 6
"""Latents on the main page."""
LARGEST = 10
"""Changed latents on the main page."""


def build_report(
    study: str, settings: dict[str, Any], out: Path, work: Path | None, base: Path, tuned: Path, divergence: Path,
    comparison: Path, interpretation: Path, dictionaries: dict[tuple[str, int, str], Path], stores: dict[str, Path],
) -> None:  # fmt: skip
    """Write `index.html` and `latents.html`, each whole in itself but for the banner that says when they are stale.

    Args:
        study: its name.
        base, tuned: artifacts of the policies; divergence, comparison, interpretation: of the study.
        dictionaries: artifact by role, layer and dictionary; stores: activation artifact by role.
    """
    sources = Study(study, base, tuned, divergence, comparison, interpretation, dictionaries, stores)
    with Stage("reports", out, settings, sources.folders, work) as stage:
        pages = {"index.html": index(sources, stage.inputs), "latents.html": latents_page(sources)}
        for name, text in pages.items():
            (stage.staging / name).write_text(text, encoding="utf-8")
        measured = sources.manifests["tuned"].metrics
        stage.publish(
            {key: measured.get(key) for key in ("reward_gain", "reward_gain_ci95", "kl")}
            | {"layers": sources.chosen["layers"], "latents": len(sources.latents)}
        )
    write_banner(out, None)


def index(study: Study, digests: dict[str, str]) -> str:
    """The main page."""
    tuned, chosen = study.manifests["tuned"], study.chosen
    layers = pd.read_parquet(study.divergence / "layers.parquet")
    curves = {key: pd.read_parquet(folder / "metrics.parquet") for key, folder in study.dictionaries.items()}
    explained, changed = latents(study), changes(study)
    compared = pd.read_parquet(study.comparison / "latents.parquet")
    levels = pd.read_parquet(study.comparison / "levels.parquet")
    causes = findings.causes_sentence(pd.read_parquet(study.interpretation / "ablations.parquet"))
    return render(
        "index.html.j2",
        study=study,
        headline=findings.reward_sentence(tuned.metrics),
        findings=[
            findings.cost_sentence(tuned.metrics),
            findings.preference_sentence(tuned.metrics),
            findings.hacking_sentence(tuned.metrics),
            findings.layers_sentence(chosen, layers.layer.nunique()),
            findings.changes_sentence(changed),
            causes,
            findings.cosine_sentences(study.aggregates),
            findings.latents_sentence(study.manifests["interpretation"].metrics),
        ],
        chain=chain(study, digests),
        tuning=tuned.parameters["tuning"],
        reward=tuned.parameters["reward"],
        metrics=list(tuning_metrics(tuned.metrics)),
        tuning_curves=figures.tuning_curves(
            pd.read_parquet(study.tuned / "history.parquet"), tuned.parameters["tuning"].get("kl_target")
        ),
        samples=records(pd.read_parquet(study.tuned / "samples.parquet").head(SAMPLES)),
        titles=TITLES,
        families=families(layers),
        shifts=shifts(layers, chosen["layers"]),
        divergence_charts=charts(layers, chosen["layers"]),
        agreement_and_steps=agreement_and_steps(
            pd.read_parquet(study.divergence / "steps.parquet"), pd.read_csv(study.divergence / "agreement.tsv", sep="\t")
        ),
        qualities=qualities(study),
        transfers=transfers(study),
        training_curves=figures.training_curves(curves),
        changes=changed,
        tags=TAGS,
        write_change=change_figures.write_change(compared, levels),
        angles=change_figures.angles(compared),
        tag_counts=change_figures.tag_counts(compared),
        largest_changes=largest_changes(explained, LARGEST),
        ablations=records(pd.read_parquet(study.interpretation / "ablations.parquet")),
        ablation_sets=cause_figures.SETS,
        dose_response=cause_figures.dose_response(pd.read_parquet(study.interpretation / "steering.parquet")),
        transplants=cause_figures.transplant_rows(pd.read_parquet(study.interpretation / "transplants.parquet")),
        causes=causes,
        probes=content.probe_rows(pd.read_parquet(study.interpretation / "probes.parquet")),
        probed=findings.probes_sentence(pd.read_parquet(study.interpretation / "probes.parquet")),
        scores=cause_figures.scores(json.loads((study.interpretation / "summary.json").read_text())),
        map_directions=records(pd.read_parquet(study.interpretation / "map_directions.parquet")),
        cosines=records(study.aggregates),
        cosine_labels={measure: label for measure, (label, *_) in figures.COSINES.items()},
        cosine_dots=figures.cosine_dots(study.aggregates),
        latents=len(explained),
        well_explained=well_explained(explained, PREVIEW),
    )


def latents_page(study: Study) -> str:
    """The page of explained latents with the text at which they fire."""
    shown = latents(study)
    return render(
        "latents.html.j2",
        study=study,
        sentence=findings.latents_sentence(study.manifests["interpretation"].metrics),
        latents=shown,
        filters={key: sorted({latent.row[key] for latent in shown}) for key in ("role", "layer", "dictionary", "selected_for")},
    )


def render(template: str, **content: Any) -> str:
    """Fill a template; every value is escaped unless it is markup of our own."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "interval", "percent", "size", "quoted"):
        environment.filters[name] = getattr(formatting, name)
    own = {"style": _static("report.css"), "script": _static("report.js"), "banner": BANNER}
    return environment.get_template(template).render(content | own)


def _static(name: str) -> Markup:
    return Markup((HERE / "static" / name).read_text(encoding="utf-8"))
