"""How good dictionaries become, beside the peers: `python -m tests.benchmarks.sae_quality`.

`plant`: rows made of known directions, and the share of them that some latent writes with a cosine of at least 0.9. Each
trainer has the learning rate and the sparsity that find most of another plant's directions: `--choose` tries the same grid for
all, in one pass over the rows, then the best two in four, and prints the table that stands here as CHOSEN.

`model`: rows of a language model's MLP, and the share of the variance of held-out ones that is left unexplained (fvu), at the
same learning rate and schedule and the same L0: of topk as given, of the others the held-out one, reached to within 5 % by
their k or weight of sparsity.

Every trainer sees the same rows in the same order, with the same width; three seeds. Needs the peers' environment (`make
peers`), and for the language model the folders named in `sae_rows`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.external import load_external
from tests.benchmarks.sae_rows import NEEDED, PLANTED, model_rows
from tests.benchmarks.sae_trainers import Options
from tests.interop import peers

SEEDS = (0, 1, 2)
CHOICE, TRUTH = 0, 1
"""Seeds of the plant on which settings are chosen, and of the one that is scored."""
ROWS = {"plant": 400_000, "model": 200_000}
EPOCHS, BATCH_ROWS = 4, 1024
PLANTED_LATENTS, EXPANSION, MODEL_L0, MODEL_LAYER = 512, 4, 32, 3
L0_TOLERANCE = 0.05


class Contender(NamedTuple):
    architecture: str
    library: str = "rlsae"
    variant: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.library, self.variant)))


class Settings(NamedTuple):
    learning_rate: float
    sparsity: float
    """k of the TopK family; else the weight, see `sae_trainers`."""


K = ("topk", "batchtopk", "matryoshka")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
L1 = (0.1, 0.2, 0.4, 0.8)
SPARSITIES = {"relu": L1, "tied_relu": L1, "gated": L1, "jumprelu": (0.01, 0.1, 1.0, 10.0)} | dict.fromkeys(K, (3, 4, 5))
ON_MODEL = [
    Contender("relu"),
    Contender("relu", "sae_lens"),
    Contender("relu", "dictionary_learning"),
    Contender("relu", "dictionary_learning", "april"),
    Contender("topk"),
    Contender("topk", "sae_lens"),
    Contender("topk", "dictionary_learning"),
    Contender("topk", "sparsify"),
    Contender("batchtopk"),
    Contender("batchtopk", "sae_lens"),
    Contender("batchtopk", "dictionary_learning"),
]
CHOSEN = {
    Contender("relu", "rlsae", ""): Settings(0.01, 0.1),
    Contender("relu", "sae_lens", ""): Settings(0.01, 0.1),
    Contender("relu", "dictionary_learning", ""): Settings(0.03, 0.2),
    Contender("relu", "dictionary_learning", "april"): Settings(0.01, 0.1),
    Contender("gated", "rlsae", ""): Settings(0.01, 0.2),
    Contender("gated", "sae_lens", ""): Settings(0.01, 0.2),
    Contender("gated", "dictionary_learning", ""): Settings(0.03, 0.4),
    Contender("jumprelu", "rlsae", ""): Settings(0.01, 0.1),
    Contender("jumprelu", "sae_lens", "step"): Settings(0.03, 0.01),
    Contender("jumprelu", "sae_lens", "quadratic"): Settings(0.01, 0.01),
    Contender("jumprelu", "dictionary_learning", ""): Settings(0.01, 0.01),
    Contender("topk", "rlsae", ""): Settings(0.01, 5),
    Contender("batchtopk", "rlsae", ""): Settings(0.01, 3),
    Contender("matryoshka", "rlsae", ""): Settings(0.01, 3),
    Contender("matryoshka", "rlsae", "quarter"): Settings(0.01, 3),
    Contender("tied_relu", "rlsae", ""): Settings(0.03, 0.2),
}
"""For the plant, by `--choose`."""


class Contest:
    """Rows that all contenders train on, held-out ones, and what is common to them."""

    def __init__(self, rows_ND: torch.Tensor, latents: int, epochs: int, k: int, truth_GD: torch.Tensor | None = None) -> None:
        self.folder, self.truth_GD = tempfile.TemporaryDirectory(), truth_GD
        train = len(rows_ND) * 10 // 11
        self.held_out_ND, file = rows_ND[train:], Path(self.folder.name) / "rows.npy"
        np.save(file, rows_ND[:train].numpy())
        batch_rows = min(BATCH_ROWS, train // 8)
        steps, channels = epochs * (train // batch_rows), rows_ND.shape[1]
        self.options = Options("", "", channels, latents, batch_rows, steps, k=k, rows=str(file))

    def of(self, contender: Contender, settings: Settings, seed: int = 0) -> Options:
        key = "k" if contender.architecture in K else "sparsity"
        own = contender._asdict() | {key: settings.sparsity, "learning_rate": settings.learning_rate, "seed": seed}
        return dataclasses.replace(self.options, **own)

    def scores(self, *several: Options) -> list[dict[str, float]]:
        """Train several of one library, with the interpreter that has it, and score them."""
        folders = [Path(tempfile.mkdtemp(dir=self.folder.name)) / "sae" for _ in several]
        runs = [dataclasses.replace(options, out=str(out)) for options, out in zip(several, folders, strict=True)]
        python = sys.executable if several[0].library == "rlsae" else str(peers.PYTHON)
        command = [python, "-m", "tests.benchmarks.sae_trainers", *(json.dumps(dataclasses.asdict(run)) for run in runs)]
        done = subprocess.run(command, cwd=peers.REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{several[0]} or one after it failed:\n{done.stderr[-2000:]}")
        return [scores(load_external(out), self.held_out_ND, self.truth_GD) for out in folders]


@torch.inference_mode()
def scores(sae: SparseAutoencoder, rows_ND: torch.Tensor, truth_GD: torch.Tensor | None) -> dict[str, float]:
    """`fvu`, `l0`, `dead_share` on these rows, and the share of planted directions that are `recovered`."""
    error, active, fired_F = 0.0, 0, torch.zeros(sae.latents, dtype=torch.bool)
    for acts_BD in rows_ND.split(4096):
        latents_BF = sae.encode(acts_BD)
        error += (sae.decode(latents_BF) - acts_BD).double().square().sum().item()
        active += int(torch.count_nonzero(latents_BF))
        fired_F |= (latents_BF > 0).any(0)
    variance = (rows_ND - rows_ND.mean(0)).double().square().sum().item()
    found = {"fvu": error / variance, "l0": active / len(rows_ND), "dead_share": 1 - fired_F.double().mean().item()}
    if truth_GD is not None:
        nearest_G = (sae.directions() @ truth_GD.T).max(0).values
        found["recovered"] = (nearest_G >= 0.9).double().mean().item()
    return found


def planted(seed: int, rows: int, epochs: int) -> Contest:
    both_ND = PLANTED.rows(rows + rows // 10, seed)
    return Contest(both_ND, PLANTED_LATENTS, epochs, PLANTED.active, PLANTED.truth(seed))


def choose(contenders: list[Contender], rows: int) -> None:
    """Print the settings that find most directions, and among those have the least fvu, on the plant that is not scored."""
    heats, final = (planted(CHOICE, rows, epochs) for epochs in (1, EPOCHS))
    for contender in contenders:
        settings = [Settings(*cell) for cell in itertools.product(RATES, SPARSITIES[contender.architecture])]
        for contest in (heats, final):
            found = contest.scores(*(contest.of(contender, one) for one in settings))
            ranking = sorted(zip(found, settings, strict=True), key=lambda run: (-run[0]["recovered"], run[0]["fvu"]))
            settings = [one for _, one in ranking[:2]]
        print(f"    Contender{tuple(contender)}: Settings{tuple(settings[0])},", flush=True)


def compare_on_plant(contenders: list[Contender], rows: int) -> None:
    contest = planted(TRUTH, rows, EPOCHS)
    print(
        "| architecture | | learning rate | sparsity | recovered | fvu | L0 | dead share |\n|---|---|---|---|---|---|---|---|"
    )
    for contender in contenders:
        settings = CHOSEN[contender]
        found = contest.scores(*(contest.of(contender, settings, seed) for seed in SEEDS))
        cells = [spread([run[name] for run in found]) for name in ("recovered", "fvu", "l0", "dead_share")]
        print(f"| {contender.architecture} | {contender} | {settings.learning_rate:g} | {settings.sparsity:g} | ", end="")
        print(" | ".join(cells), "|", flush=True)


def compare_on_model(contenders: list[Contender], rows_ND: torch.Tensor, learning_rate: float) -> None:
    contest = Contest(rows_ND, EXPANSION * rows_ND.shape[1], EPOCHS, MODEL_L0)
    print("| architecture | | sparsity | fvu | rlsae's fvu over theirs | L0 | dead share |\n|---|---|---|---|---|---|---|")
    ours: dict[str, list[float]] = {}
    for contender in contenders:
        settings, first = at_the_wanted_l0(contest, contender, learning_rate)
        found = [first, *contest.scores(*(contest.of(contender, settings, seed) for seed in SEEDS[1:]))]
        fvu = [run["fvu"] for run in found]
        base = ours.setdefault(contender.architecture, fvu)
        ratios = spread([mine / theirs for mine, theirs in zip(base, fvu, strict=True)])
        cells = [spread(fvu), ratios, *(spread([run[name] for run in found]) for name in ("l0", "dead_share"))]
        print(f"| {contender.architecture} | {contender} | {settings.sparsity:.3g} | {' | '.join(cells)} |", flush=True)


def at_the_wanted_l0(contest: Contest, contender: Contender, learning_rate: float) -> tuple[Settings, dict[str, float]]:
    """Settings at which held-out L0 is the wanted one, and the scores of seed 0 there: log L0 is nearly linear in their log."""
    by_k = contender.architecture in K
    sparsity, slope = (float(MODEL_L0), 1.0) if by_k else (0.1, -0.8)
    tried: list[tuple[float, float]] = []
    for _ in range(8):
        settings = Settings(learning_rate, round(sparsity) if by_k else sparsity)
        (found,) = contest.scores(contest.of(contender, settings))
        if abs(found["l0"] / MODEL_L0 - 1) <= L0_TOLERANCE or contender.architecture == "topk":
            return settings, found
        tried.append((math.log(settings.sparsity), math.log(found["l0"] / MODEL_L0)))
        if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
            measured = (tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0])
            slope = measured if measured * slope > 0 else slope
        sparsity *= math.exp(max(-2.0, min(2.0, -tried[-1][1] / slope)))
    raise SystemExit(
        f"{contender}: no sparsity gives {contender.architecture} an L0 of {MODEL_L0}; the last gave {found['l0']:.1f}"
    )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-of", nargs="+", default=["plant", "model"], choices=["plant", "model"])
    parser.add_argument("--choose", action="store_true", help="Try the grid of settings instead.")
    parser.add_argument("--architectures", nargs="+", default=list(SPARSITIES), choices=list(SPARSITIES))
    parser.add_argument("--rows", type=int, help="Fewer than the default, to try it out.")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="On the rows of a model.")
    given = parser.parse_args()
    if not peers.PYTHON.exists():
        raise SystemExit(peers.MISSING)

    on_plant, on_model = ([one for one in all_ if one.architecture in given.architectures] for all_ in (list(CHOSEN), ON_MODEL))
    if given.choose:
        return choose(on_plant, given.rows or ROWS["plant"])
    if "plant" in given.rows_of:
        rows = given.rows or ROWS["plant"]
        print(f"\n### {PLANTED}, {rows} rows {EPOCHS} times, {PLANTED_LATENTS} latents\n")
        compare_on_plant(on_plant, rows)
    if "model" in given.rows_of:
        rows = given.rows or ROWS["model"]
        rows_ND = model_rows(rows + rows // 10, MODEL_LAYER)
        if rows_ND is None:
            return print(f"\nWithout the rows of a model: {NEEDED}.")
        print(f"\n### MLP {MODEL_LAYER} of neox-imdb, {rows} rows {EPOCHS} times, {EXPANSION} latents per channel, ", end="")
        print(f"L0 {MODEL_L0}, learning rate {given.learning_rate:g}\n")
        compare_on_model(on_model, rows_ND, given.learning_rate)


if __name__ == "__main__":
    main()
