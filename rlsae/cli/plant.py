"""The verb `rlsae plant`: activations whose every change is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlsae.cli.app import app
from rlsae.errors import RlsaeError


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
    from rlsae.comparison.plant import Plant, write_plant, write_recovery_plant

    if recovery:
        write_recovery_plant(out, seed, documents)
        return
    planted = Plant(seed, documents=documents, drift=drift, linear_share=linear_share, linear_rank=linear_rank)
    write_plant(planted.without_changes() if null else planted, out)
