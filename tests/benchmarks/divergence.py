"""What the measures of divergence cost: `python -m tests.benchmarks.divergence`.

Of the demo's artifacts, which `make demo` leaves in results/, and of random surveys of six layers of 512 channels.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlsae import compute
from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.artifacts import Manifest
from rlsae.config import LexiconReward, Tuning
from rlsae.divergence.activations import activation_divergence
from rlsae.divergence.function import Sample, kl_of_swaps, reward_of_swaps
from rlsae.divergence.weights import weight_divergence
from rlsae.models import load
from rlsae.rewards import Lexicon
from tests.unit.small_artifacts import random_documents, tokens_of, write_store

LAYERS, CHANNELS, DOCUMENT = 6, 512, 64


def timed(label: str, run: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    found = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"| {label} | {time.perf_counter() - start:.1f} | {peak:,} |", flush=True)
    return found


def random_surveys(folder: Path, rows: int) -> list[ActivationStore]:
    tokens = tokens_of(random_documents([DOCUMENT] * (rows // DOCUMENT)))
    stores = []
    for name in ("base", "tuned"):
        rng = np.random.default_rng(len(name))
        acts = {layer: rng.standard_normal((rows, CHANNELS), np.float32).astype(np.float16) for layer in range(LAYERS)}
        stores.append(
            ActivationStore(write_store(folder / f"{name}-{rows}", tokens, acts, rows_per_part=rows, dtype="float16"))
        )
    return stores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    results = parser.parse_args().results
    compute.configure()
    base, tuned = results / "models/tiny", results / "policies/tiny.ppo"
    stores = [ActivationStore(results / f"activations/{p}.reviews/mlp/survey") for p in ("tiny", "tiny.ppo")]
    (model, tokenizer), (other, _) = load(base / "model"), load(tuned / "model")
    recipe = Manifest.read(tuned).parameters["tuning"]
    entry = Tuning(**{key: recipe[key] for key in Tuning.model_fields})
    tokens = Tokens.open(results / "tokens/tiny.reviews")
    sample = Sample(tokens, tokenizer, results / "corpora/reviews", Lexicon(LexiconReward(kind="lexicon")), entry)
    print("\n| | seconds | peak of the process so far (MB) |\n|---|---|---|")
    timed("demo: weights", lambda: weight_divergence(base / "model", tuned / "model"))
    timed("demo: activations", lambda: activation_divergence(*stores))
    timed("demo: KL of swaps", lambda: kl_of_swaps(model, other, tokens))
    timed("demo: reward of swaps", lambda: reward_of_swaps(model, other, sample))
    with tempfile.TemporaryDirectory() as folder:
        for rows in (16_384, 65_536):
            surveys = random_surveys(Path(folder), rows)
            timed(
                f"{LAYERS} layers × {CHANNELS} channels, {rows:,} rows: activations", partial(activation_divergence, *surveys)
            )


if __name__ == "__main__":
    main()
