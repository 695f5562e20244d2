"""Start-up and planning time of the workflow: `python -m tests.benchmarks.workflow_scale [studies]`.

Three kinds of call, taken in turn: a dry run of nothing done yet, a run of a finished results folder with nothing to do, and
`snakemake --version` as the floor. The results folder is made of empty files: only planning is measured.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from rlsae.expand import parse_config
from rlsae.layout import Layout

REPOSITORY = Path(__file__).parents[2]
ROUNDS = 3
FILES = {
    "corpora": ["documents.parquet"],
    "models": ["model/"],
    "policies": ["model/", "checkpoints/", "history.parquet", "samples.parquet"],
    "tokens": ["store/"],
    "activations": ["store/"],
    "divergence": ["layers.parquet", "layers.tsv", "chosen.json"],
    "dictionaries": ["saes/", "metrics.parquet", "figures/"],
    "comparison": ["latents.parquet", "aggregates.parquet", "floor.parquet"],
    "interpretation": ["latents.parquet", "explanations.parquet", "examples.parquet"],
    "reports": ["index.html", "latents.html"],
}


def configuration(studies: int) -> dict[str, Any]:
    """So many tunings of one model, each a study of 3 layers × 2 dictionaries × 3 seeds."""
    return {
        "corpora": {"reviews": {"source": "generated"}},
        "models": {"tiny": {"source": "pretrain", "corpus": "reviews"}},
        "rewards": {"vader": {"kind": "lexicon"}},
        "tunings": {"ppo": {"method": "ppo", "reward": "vader", "corpus": "reviews", "seed": list(range(studies))}},
        "activations": {"mlp": {}},
        "dictionaries": {"small": {"seeds": [0, 1, 2]}, "big": {"expansion": 2, "seeds": [0, 1, 2]}},
        "studies": {
            "many": {"model": "tiny", "tuning": "ppo", "corpus": "reviews", "activation": "mlp", "layers": [1, 2, 3]}
            | {"dictionaries": ["small", "big"], "sizes": {"small": "small", "big": "big"}}
        },
    }


def finish(folder: Path, content: dict[str, Any]) -> int:
    """Empty files where the artifacts of a configuration would lie, oldest first along the chain; returns their number."""
    layout = Layout(parse_config(content))
    artifacts = {a.folder: a for study in layout.config.studies for a in layout.artifacts(study)}
    for artifact in sorted(artifacts.values(), key=lambda a: list(FILES).index(a.stage)):
        for name in [*FILES[artifact.stage], "manifest.json"]:
            path = folder / artifact.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.write_text("{}")
    return len(artifacts)


def snakemake(folder: Path, *arguments: str) -> float:
    """Wall seconds of one call."""
    command = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder)]
    command += ["--configfile", str(folder / "many.yaml"), "--cores", "2", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return seconds


def main() -> None:
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    content = configuration(studies)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        fresh, finished = Path(one), Path(two)
        for folder in (fresh, finished):
            (folder / "many.yaml").write_text(yaml.safe_dump(content))
        artifacts = finish(finished, content)
        snakemake(finished, "--touch", "--quiet", "all")  # records what Snakemake knows of a finished run
        calls = {
            "dry run, nothing done": lambda: snakemake(fresh, "--dry-run", "--quiet", "all"),
            "run, nothing to do": lambda: snakemake(finished, "--quiet", "all"),
            "snakemake --version": lambda: snakemake(fresh, "--version"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                seconds[name].append(call())
    print(f"{studies} studies, {artifacts} artifacts, median of {ROUNDS} rounds [fastest, slowest], wall seconds")
    for name, values in seconds.items():
        print(f"{name:24} {statistics.median(values):6.1f} [{min(values):.1f}, {max(values):.1f}]")


if __name__ == "__main__":
    main()
