"""Stage `reports`: static pages that show what a study found, openable from disk without a server or a network."""

from __future__ import annotations

from pathlib import Path

from rlsae.report import findings
from rlsae.report.histogram import histogram
from rlsae.report.latents import Latent, latents
from rlsae.report.overview import figures_of, overview
from rlsae.report.render import ASSETS, asset, render
from rlsae.report.study import Study
from rlsae.resumable import Stage
from rlsae.status import write_banner

CHOICES = ("model", "layer", "dictionary", "tag", "selected_for")
"""Columns of the table of latents by whose values it can be filtered."""
RANGES = {"reward_correlation": "reward correlation", "score": "score", "density": "density"}
"""And those by bounds."""


def build_report(study: Study, out: Path, work: Path | None) -> None:
    """Write `index.html` and `latents.html`, each whole in itself but for the banner that says when they are stale, a page per
    latent, and the figures of the main page with their data."""
    with Stage("reports", out, {}, study.folders, work) as stage:
        shown = latents(study)
        content = overview(study, shown, stage.inputs)
        write(stage.staging / "index.html", render("index.html.j2", **content))
        write(stage.staging / "latents.html", latents_page(study, shown))
        for name in ASSETS:
            write(stage.staging / name, asset(name))
        for figure in figures_of(content):
            write(stage.staging / "figures" / f"{figure.name}.svg", figure.file)
            write(stage.staging / "figures" / f"{figure.name}.csv", figure.data.to_csv(index=False))
        for place, latent in enumerate(shown):
            before, after = (shown[i].page if 0 <= i < len(shown) else None for i in (place - 1, place + 1))
            write(stage.staging / "latents" / f"{latent.page}.html", latent_page(study.name, latent, before, after))
        measured = study.manifests["tuned"].metrics
        stage.publish(
            {key: measured.get(key) for key in ("reward_gain", "reward_gain_ci95", "kl")}
            | {"layers": study.chosen["layers"], "latents": len(study.latents)}
        )
    write_banner(out, None)


def latents_page(study: Study, shown: list[Latent]) -> str:
    """The table of explained latents."""
    columns = ["role" if column == "model" else column for column in CHOICES]
    return render(
        "latents.html.j2",
        study=study,
        sentence=findings.latents_sentence(study.manifests["interpretation"].metrics),
        latents=shown,
        choices={name: sorted({latent.row[column] for latent in shown}) for name, column in zip(CHOICES, columns, strict=True)},
        ranges=RANGES,
    )


def latent_page(study: str, latent: Latent, before: str | None, after: str | None) -> str:
    """The page of one latent.

    Args:
        before, after: pages of its neighbours in the table.
    """
    return render(
        "latent.html.j2",
        root="../",
        whole=False,
        study=study,
        latent=latent,
        histogram=histogram(latent.histogram, latent.row["max_active"]),
        failing=[one for one in latent.explanations if one.failures],
        before=before,
        after=after,
    )


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
