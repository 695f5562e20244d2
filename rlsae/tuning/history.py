"""History of a training: one row per batch, shown as progress, kept for the artifact, passed to a tracker on demand.

`RLSAE_REPORT_TO=tensorboard` (or `wandb`, any tracker that accelerate knows) reports while the training runs; under
`logs/tensorboard` for TensorBoard. It is a variable of the environment because it shapes no artifact.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd

from rlsae.config import Training
from rlsae.errors import RlsaeError
from rlsae.progress import Progress
from rlsae.resumable import Stage

TRACKER = "RLSAE_REPORT_TO"
LOGS = Path("logs")


class History:
    """Rows of numbers, one per batch, with the column `batch` from 0.

    Args:
        rows: those of an earlier, unfinished run.
    """

    def __init__(self, stage: Stage, entry: Training, rows: list[dict[str, float]]) -> None:
        self.rows = rows
        self._rows_per_batch = entry.batch_size
        self._progress = Progress("tune", entry.batches * entry.batch_size, "samples", done=len(rows) * entry.batch_size)
        self._rates: list[float | None] = [None] * len(rows)
        stage.details["samples_per_second"] = self._rates
        self._tracker = tracker(stage.out.name, stage.parameters)
        self._clock = time.monotonic()

    def add(self, row: dict[str, float]) -> None:
        """Append the next batch's row; its samples per second go to the provenance, since they differ from run to run.

        Raises:
            RlsaeError: a number is not finite: the training has diverged.
        """
        broken = [key for key, value in row.items() if not math.isfinite(value)]
        if broken:
            raise RlsaeError(
                f"the tuning diverged in batch {len(self.rows)}: {', '.join(broken)} not finite; lower learning_rate or "
                "max_grad_norm"
            )
        now = time.monotonic()
        self._rates.append(round(self._rows_per_batch / (now - self._clock), 2))
        self._clock = now
        self.rows.append({"batch": len(self.rows), **row})
        self._progress.update(self._rows_per_batch, **{key: row[key] for key in ("reward", "kl", "loss") if key in row})
        if self._tracker is not None:
            self._tracker.log(row | {"samples_per_second": self._rates[-1]}, step=self.rows[-1]["batch"])

    def table(self) -> pd.DataFrame:
        """All rows; the tracker, where there is one, is told that the run is over."""
        if self._tracker is not None:
            self._tracker.finish()
        return pd.DataFrame(self.rows)


def tracker(name: str, parameters: dict[str, Any]) -> Any:
    """The tracker that the environment asks for, or None.

    Raises:
        RlsaeError: it is unknown or not installed.
    """
    wanted = os.environ.get(TRACKER)
    if not wanted:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = sorted(str(getattr(kind, "value", kind)) for kind in get_available_trackers())
    if wanted not in available:
        raise RlsaeError(f"{TRACKER}={wanted}: expected one that is installed: {', '.join(available) or 'none is'}")
    kind = LOGGER_TYPE_TO_CLASS[wanted]
    made = kind(name, LOGS / wanted) if kind.requires_logging_directory else kind(name)
    made.start()
    made.store_init_configuration(flat(parameters))
    return made


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of names and plain values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
