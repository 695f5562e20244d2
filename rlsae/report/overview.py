"""The main page of a report: everything that its template shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from rlsae.comparison.kinds import TAGS
from rlsae.divergence.figures import TITLES, agreement_and_steps, charts
from rlsae.plots import Chart
from rlsae.report import cause_figures, change_figures, content, figures, findings
from rlsae.report.content import records
from rlsae.report.latents import Latent, largest_changes, well_explained
from rlsae.report.samples import samples
from rlsae.report.study import Study

PLACES = {
    "tuning": "Tuning",
    "layers": "Layers",
    "dictionaries": "Dictionaries",
    "changes": "Changes",
    "causes": "Causes",
    "probes": "Probes",
    "comparison": "Cosines",
    "latents": "Latents",
}
"""Sections of the page that have findings."""
SAMPLES = 20
"""Prompts whose responses are shown side by side."""
PREVIEW = 6
"""Latents on the main page."""
LARGEST = 10
"""Changed latents on the main page."""


def overview(study: Study, explained: list[Latent], digests: dict[str, str]) -> dict[str, Any]:
    """Values of the template `index.html.j2` by name.

    Args:
        digests: of the artifacts that the report is made from, by identifier.
    """
    tuned, chosen = study.manifests["tuned"], study.chosen
    layers = pd.read_parquet(study.divergence / "layers.parquet")
    curves = {key: pd.read_parquet(folder / "metrics.parquet") for key, folder in study.dictionaries.items()}
    changed, qualities = content.changes(study), content.qualities(study)
    compared = pd.read_parquet(study.comparison / "latents.parquet")
    levels = pd.read_parquet(study.comparison / "levels.parquet")
    summary = json.loads((study.interpretation / "summary.json").read_text(encoding="utf-8"))
    ablations = pd.read_parquet(study.interpretation / "ablations.parquet")
    carried = pd.read_parquet(study.interpretation / "carried.parquet")
    probes = pd.read_parquet(study.interpretation / "probes.parquet")
    causes, probed = findings.causes_sentence(ablations, study.name), findings.probes_sentence(probes, study.name)
    return {
        "study": study,
        "headline": findings.reward_sentence(tuned.metrics),
        "places": PLACES,
        "findings": {
            "tuning": [sentence(tuned.metrics) for sentence in findings.OF_TUNING],
            "layers": [findings.layers_sentence(chosen, layers.layer.nunique())],
            "dictionaries": [findings.quality_sentence(qualities)],
            "changes": [findings.changes_sentence(changed)],
            "causes": [causes],
            "probes": [probed],
            "comparison": [findings.cosine_sentences(study.aggregates)],
            "latents": [
                findings.latents_sentence(study.manifests["interpretation"].metrics),
                findings.language_model_sentence(summary["scores"], study.name),
            ],
        },
        "chain": content.chain(study, digests),
        "versions": content.versions(study),
        "tuning": tuned.parameters["tuning"],
        "reward": tuned.parameters["reward"],
        "metrics": list(content.tuning_metrics(tuned.metrics)),
        "tuning_curves": figures.tuning_curves(
            pd.read_parquet(study.tuned / "history.parquet"), tuned.parameters["tuning"].get("kl_target")
        ),
        "samples": samples(pd.read_parquet(study.tuned / "samples.parquet").head(SAMPLES)),
        "titles": TITLES,
        "families": content.families(layers),
        "shifts": content.shifts(layers, chosen["layers"]),
        "divergence_charts": charts(layers, chosen["layers"]),
        "agreement_and_steps": agreement_and_steps(
            pd.read_parquet(study.divergence / "steps.parquet"), pd.read_csv(study.divergence / "agreement.tsv", sep="\t")
        ),
        "qualities": qualities,
        "transfers": content.transfers(study),
        "training_curves": figures.training_curves(curves),
        "changes": changed,
        "tags": TAGS,
        "write_change": change_figures.write_change(compared, levels),
        "angles": change_figures.angles(compared),
        "tag_counts": change_figures.tag_counts(compared),
        "largest_changes": largest_changes(explained, LARGEST),
        "ablations": records(ablations),
        "ablation_sets": cause_figures.SETS,
        "dose_response": cause_figures.dose_response(pd.read_parquet(study.interpretation / "steering.parquet")),
        "transplants": cause_figures.transplant_rows(pd.read_parquet(study.interpretation / "transplants.parquet")),
        "carried": records(carried),
        "carried_charts": cause_figures.carried(carried),
        "causes": causes,
        "probes": content.probe_rows(probes),
        "probed": probed,
        "scores": cause_figures.scores(summary),
        "map_directions": records(pd.read_parquet(study.interpretation / "map_directions.parquet")),
        "cosines": records(study.aggregates),
        "cosine_labels": {measure: label for measure, (label, *_) in figures.COSINES.items()},
        "cosine_dots": figures.cosine_dots(study.aggregates),
        "latents": len(explained),
        "well_explained": well_explained(explained, PREVIEW),
    }


def figures_of(values: Any) -> Iterator[Chart]:
    """Every figure among the values of a template, in their order."""
    if isinstance(values, Chart):
        yield values
    elif isinstance(values, Mapping | list):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from figures_of(value)
