"""The verbs `plant`, `plant-trial` and `plant-curves`: activations whose every change is known, and what is found of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlsae.cli.app import app
from rlsae.cli.options import Gpus, Out, Settings, Threads, Work, configure, read_json
from rlsae.errors import RlsaeError
from rlsae.plants.trials import Trial


@app.command()
def plant(
    out: Annotated[Path, typer.Option(help="Folder to write: activations/base, activations/tuned, truth.parquet.")],
    seed: Annotated[int, typer.Option(help="Directions, changes and rows follow from it.")] = 0,
    documents: Annotated[int, typer.Option(help="Documents of 100 rows each.", min=16)] = 2048,
    drift: Annotated[float, typer.Option(help="Largest angle, in degrees, by which every direction turns.", min=0)] = 3.0,
    linear_share: Annotated[
        float, typer.Option(help="Energy that a shared linear map moves, as a share of the variance.", min=0)
    ] = 0.0,
    linear_rank: Annotated[int, typer.Option(help="Rank of that map.", min=1)] = 4,
    null: Annotated[bool, typer.Option("--null", help="Plant no change of single directions.")] = False,
    recovery: Annotated[
        bool, typer.Option("--recovery", help="Plant directions to recover in one model, and no second model.")
    ] = False,
) -> None:
    """Write activations of a base and a tuned model whose every change is known, to prove a procedure on.

    Example: rlsae plant --out plants/drifting --seed 1 --linear-share 0.1
    """
    if (out / "activations").exists():
        raise RlsaeError(f"{out} holds a plant already; choose another --out or delete it")
    from rlsae.plants.plant import Plant, write_plant, write_recovery_plant

    if recovery:
        write_recovery_plant(out, seed, documents)
        return
    planted = Plant(seed, documents=documents, drift=drift, linear_share=linear_share, linear_rank=linear_rank)
    write_plant(planted.without_changes() if null else planted, out)


@app.command()
def plant_trial(settings: Settings, out: Out, work: Work = None, threads: Threads = None, gpus: Gpus = None) -> None:
    """Plant known changes, train dictionaries of both models, tag in several ways, and count what is right.

    Example: rlsae plant-trial --out trial
        --settings '{"method": "topk", "variation": "rest", "documents": 500, "seed": 3}'
    """
    given = read_json(settings, "method", "variation", "documents", "seed")
    configure(threads, gpus)
    from rlsae.plants.trial import run_trial

    run_trial(Trial(**given), out, work)


@app.command()
def plant_curves(
    trials: Annotated[list[Path], typer.Argument(help="Folders that plant-trial wrote.")], out: Out, work: Work = None
) -> None:
    """Recall, coverage and false discovery of all trials, by the size of the effect, the density and the rows.

    Example: rlsae plant-curves results/plants/topk/rest/documents2000/seed* --out results/plants/curves
    """
    from rlsae.plants.curves import build_curves

    build_curves(trials, out, work)
