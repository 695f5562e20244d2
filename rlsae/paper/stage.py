"""Stage `paper`: the tables and figures as CSV, Markdown and SVG."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlsae.artifacts import MANIFEST
from rlsae.errors import RlsaeError
from rlsae.paper.figures import all_figures
from rlsae.paper.published import published
from rlsae.paper.rows import Exhibit
from rlsae.paper.tables import all_tables
from rlsae.report.formatting import MISSING, number
from rlsae.report.study import Study
from rlsae.resumable import Stage

SHOWN = 60
"""Rows of a table in the Markdown file; the CSV holds all."""


def finished(results: Path) -> list[Study]:
    """Every study of a results folder that has been interpreted.

    Raises:
        RlsaeError: there is none.
    """
    names = sorted(path.parent.name for path in results.glob(f"interpretation/*/{MANIFEST}"))
    if not names:
        raise RlsaeError(f"{results} holds no finished study; make one with: snakemake --cores all interpretation")
    return [Study.find(results, name) for name in names]


def build_paper(results: Path, out: Path, work: Path | None) -> None:
    """Write `tables.md` with everything, `table{n}.csv`, and `figure{n}.csv` and `.svg` where a study has what it shows.

    Args:
        results: folder of all artifacts; every finished study in it is shown.
    """
    studies = finished(results)
    folders = {f"{study.name}: {label}": folder for study in studies for label, folder in study.folders.items()}
    with Stage("paper", out, {}, folders, work) as stage:
        exhibits = [*all_tables(studies), *all_figures(studies)]
        for made in exhibits:
            made.rows.to_csv(stage.staging / f"{made.name}.csv", index=False)
            if made.svg:
                (stage.staging / f"{made.name}.svg").write_text(made.svg, encoding="utf-8")
        (stage.staging / "tables.md").write_text(markdown(studies, exhibits), encoding="utf-8")
        stage.publish({"studies": [study.name for study in studies]})


def markdown(studies: Sequence[Study], exhibits: Sequence[Exhibit]) -> str:
    """One document with all tables and figures."""
    parts = [
        "# The paper's tables and figures",
        "Ours of every finished study, beside the numbers of arXiv 2310.08164 that are known as text (`published_*`; "
        f"`{MISSING}` where none is). Studies: {', '.join(study.name for study in studies)}.",
    ]
    for made in exhibits:
        parts += [f"## {re.sub('(?=[0-9])', ' ', made.name, count=1).capitalize()}: {made.title}", made.note]
        if made.svg:
            parts.append(f"![{made.title}]({made.name}.svg)")
        else:
            parts.append(as_markdown(made.rows))
        parts.append(sources(made))
    return "\n\n".join(parts) + "\n"


def sources(made: Exhibit) -> str:
    """Where what is published of a table stands; of a figure, which has no columns for them, the values too."""
    theirs = published()[published().artifact == made.name]
    if theirs.empty:
        return f"Published: {MISSING}, the cells are pictures."
    lines = []
    for (quantity, source), rows in theirs.groupby(["quantity", "source"], sort=False):
        values = ", ".join(f"{row.value} ({row.model}, {row.tuned_on})" for row in rows.itertuples())
        lines.append(f"Published {quantity}: {source}" + (f": {values}." if made.svg else "."))
    return " ".join(lines)


def as_markdown(table: pd.DataFrame) -> str:
    """A table of text; tokens and explanations are data and are escaped."""
    if table.empty:
        return "No study has what it shows."
    lines = ["| " + " | ".join(str(column).replace("_", " ") for column in table.columns) + " |", "|---" * table.shape[1] + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in table.head(SHOWN).itertuples(index=False)]
    if len(table) > SHOWN:
        lines.append(f"\n{len(table) - SHOWN:,} more rows in the CSV.")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return MISSING
    if isinstance(value, str | bool):
        text = html.escape(str(value), quote=False)
        return "".join(f"\\{sign}" if sign in "|\\`*_[]" else " " if sign in "\r\n" else sign for sign in text)
    return number(value)
