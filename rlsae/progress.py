"""Progress for people: a bar with rate and remaining time in a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 15.0


def say(message: str) -> None:
    """One line to the log or above the bar."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """Counts `total` units of work, from `done` on.

    In a terminal it is a tqdm bar; elsewhere a line every 15 seconds with rate and remaining time.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._first, self._start = done, time.monotonic()
        self._last = self._start
        self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() else None

    def update(self, count: int = 1, **values: float) -> None:
        """Count finished units; `values` are shown beside the rate."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)
            self._bar.update(count)
            if self.done >= self.total:
                self._bar.close()
            return
        now = time.monotonic()
        if now - self._last >= LOG_SECONDS or self.done >= self.total:
            self._last = now
            rate = (self.done - self._first) / max(now - self._start, 1e-9)
            remaining = (self.total - self.done) / rate
            shown = ", ".join(f"{k} {v:.3g}" for k, v in values.items())
            say(
                f"{self.label}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.1f}/s, {remaining:.0f} s left"
                + (f" ({shown})" if shown else "")
            )
