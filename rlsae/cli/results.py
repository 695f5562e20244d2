"""Verbs that look at configurations and results."""

from __future__ import annotations

from typing import Annotated

import typer

from rlsae.cli.app import app
from rlsae.cli.options import ConfigFile
from rlsae.expand import load


@app.command()
def studies(config_file: ConfigFile) -> None:
    """List the studies of a configuration and what each is made of, lists expanded.

    Example: rlsae studies config.yaml
    """
    for name, study in load(config_file).studies.items():
        typer.echo(
            f"{name}: {study.base} against {study.tuned} on {study.corpus}, {study.activation}, {', '.join(study.dictionaries)}"
        )


@app.command()
def status(config_file: ConfigFile) -> None:
    """Say which artifacts of a configuration are missing or stale, and why; exit status 1 if any is.

    Run it where the workflow runs: it looks at `results/` in this folder.

    Example: rlsae status config.yaml
    """
    from rlsae.status import check

    states = check(load(config_file))
    for folder, state in states.items():
        word = "missing" if state.missing else "stale" if state.problem else "current"
        typer.echo(f"{word:8} {folder}" + (f": {state.problem}" if state.problem and not state.missing else ""))
    if any(state.problem for state in states.values()):
        raise typer.Exit(1)


@app.command()
def orphans(
    config_file: ConfigFile,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them.")] = False,
) -> None:
    """List the artifacts in `results/` that a configuration does not name.

    Example: rlsae orphans config.yaml --delete
    """
    from rlsae import status

    found = status.orphans(load(config_file))
    for folder in found:
        typer.echo(str(folder))
    if delete:
        status.delete(found)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, as in workflow/schemas/config.schema.yaml.

    Example: rlsae schema > workflow/schemas/config.schema.yaml
    """
    from rlsae.schema import schema_yaml

    typer.echo(schema_yaml(), nl=False)
