"""The numbers of the paper that are known as text: `published.csv`, each with where it stands.

The cells of most of its tables are pictures; what is not in the file is not known here and shows as `n/a`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

EVERY = "all"
"""A model or task for which a number holds throughout."""
KEY = ["model", "tuned_on"]


@cache
def published() -> pd.DataFrame:
    """Rows of `artifact model tuned_on quantity value source`, all of them text."""
    return pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str)


def beside(table: pd.DataFrame, artifact: str) -> pd.DataFrame:
    """A table with a column `published_*` for every quantity that the paper's counterpart tells.

    Args:
        table: of ours, with the columns `model` and `tuned_on`.
        artifact: `table4`, `figure7`.

    What the paper tells of a model and task that no study has is a row of its own, without values of ours.
    """
    theirs = published()[published().artifact == artifact]
    table = table.convert_dtypes()  # whole numbers stay whole beside rows without any
    for quantity in dict.fromkeys(theirs.quantity):
        values = {(row.model, row.tuned_on): row.value for row in theirs[theirs.quantity == quantity].itertuples()}
        missing = sorted(set(values) - set(zip(table.model, table.tuned_on, strict=True)))
        known = [] if table.empty else [key for key in missing if EVERY in key]
        rows = [dict(zip(KEY, key, strict=True)) for key in missing if key not in known]
        table = pd.concat([table, pd.DataFrame(rows, columns=KEY)], ignore_index=True) if rows else table
        keys = zip(table.model, table.tuned_on, strict=True)
        table[f"published_{quantity}"] = [
            next((values[key] for key in ((model, task), (EVERY, task), (model, EVERY)) if key in values), None)
            for model, task in keys
        ]
    return table
