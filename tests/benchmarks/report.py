"""How long a report with many latents takes to build, how large it is, and how fast its table answers in a real browser.

The latents of a finished demo are multiplied, so that pages are as long as real ones.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd

from rlsae.report.build import build_report
from rlsae.report.study import Study
from tests.browser.chromium import chromium

KEYSTROKES = "fires on the"
ANSWER = """async text => {
  const field = document.querySelector("input[type=search]");
  field.value = text;
  const start = performance.now();
  field.dispatchEvent(new Event("input", { bubbles: true }));
  document.body.offsetHeight;
  const computed = performance.now() - start;
  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  return [computed, performance.now() - start];
}"""
SORT = """name => {
  const start = performance.now();
  [...document.querySelectorAll("th button")].find(button => button.textContent === name).click();
  document.body.offsetHeight;
  return performance.now() - start;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="of a finished demo")
    parser.add_argument("--latents", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        shutil.copytree(given.results, results, ignore=shutil.ignore_patterns("*.zarr", "*.safetensors", ".*"))
        count = multiply(results, given.latents)
        started = time.perf_counter()
        out = results / "reports" / "demo"
        build_report(Study.find(results, "demo"), out, None)
        seconds = time.perf_counter() - started
        sizes = [path.stat().st_size for path in (out / "latents").iterdir()]
        print(f"{count} latents: built in {seconds:.1f} s")
        print(f"pages of latents: median {statistics.median(sizes) / 1000:.1f} kB, largest {max(sizes) / 1000:.1f} kB")
        print(f"table: {(out / 'latents.html').stat().st_size / 1e6:.2f} MB")
        with chromium() as visit:
            page = visit.open(out / "latents.html")
            answers = [page.evaluate(ANSWER, KEYSTROKES[:length]) for length in range(1, len(KEYSTROKES) + 1)]
            computed, painted = (sorted(times) for times in zip(*answers, strict=True))
            print(f"keystroke, filtered and laid out: median {statistics.median(computed):.0f} ms, worst {computed[-1]:.0f} ms")
            print(f"keystroke, painted: median {statistics.median(painted):.0f} ms, worst {painted[-1]:.0f} ms")
            page.evaluate(ANSWER, "")
            times = [page.evaluate(SORT, name) for name in ("density", "score", "explanation", "tag")]
            print(f"sorting: median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms")


def multiply(results: Path, wanted: int) -> int:
    """Repeat the latents of every table under other numbers; returns how many there are."""
    explained = len(pd.read_parquet(results / "interpretation" / "demo" / "latents.parquet"))
    times = -(-wanted // explained)
    names = [f"interpretation/demo/{name}" for name in ("latents", "examples", "explanations", "failures")]
    for name in [*names, "comparison/demo/latents"]:
        path = results / f"{name}.parquet"
        table = pd.read_parquet(path)
        copies = [table.assign(latent=table.latent + 100_000 * copy) for copy in range(times)]
        pd.concat(copies).to_parquet(path, index=False)
    return times * explained


if __name__ == "__main__":
    main()
