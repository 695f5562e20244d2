"""Verbs that look at configurations and results, and take results elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlsae.cli.app import app
from rlsae.cli.options import ConfigFile
from rlsae.expand import load

ArtifactFolder = Annotated[Path, typer.Argument(help="Folder of an artifact, which holds a manifest.json.", metavar="PATH")]


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
def prefetch(
    config_file: ConfigFile,
    record: Annotated[Path, typer.Option(help="File that tells what was fetched; a second run checks against it.")] = Path(
        "prefetch.json"
    ),
) -> None:
    """Download every model and data set that a configuration names, so that the workflow runs without a network.

    They go into the caches of the hub's libraries (HF_HOME). Afterwards run the workflow with HF_HUB_OFFLINE=1, here or
    where those caches have been copied to. Models are fetched as safetensors with tokenizer and configuration, no code.

    Example: rlsae prefetch config.yaml
    """
    from rlsae import hub

    found = 0
    for wanted, fetched in hub.prefetch(load(config_file), record):
        found += 1
        size = fetched.bytes / 1e6
        typer.echo(
            f"{wanted.key}: {fetched.kind} {fetched.repository} at {fetched.revision or 'main'} = {fetched.commit}, "
            f"{size:,.1f} MB, {fetched.digest[:19]}"
        )
    typer.echo(f"{found} fetched and recorded in {record}" if found else "the configuration names nothing of the hub")


@app.command()
def orphans(
    config_file: ConfigFile,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the artifacts.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel the jobs.")] = False,
) -> None:
    """List the artifacts in `results/` that a configuration does not name, and jobs in Slurm that a lost Snakemake left behind.

    Run it where the workflow runs. Jobs that a running Snakemake waits for are not listed.

    Example: rlsae orphans config.yaml --cancel
    """
    from rlsae import heads, status

    folders, jobs = status.orphans(load(config_file)), heads.left_behind()
    for orphan in [*folders, *jobs]:
        typer.echo(str(orphan))
    if delete:
        status.delete(folders)
    if cancel:
        heads.cancel(jobs)


@app.command("inspect")
def inspect_artifact(
    artifact: ArtifactFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for scripts.")] = False,
) -> None:
    """Show what an artifact holds: how it was made, its tables, models and arrays, and a sample of its rows.

    It reads headers and at most 65,536 rows per layer, so that a store of any size takes seconds. The lengths of rows tell
    outliers, whose norm is above ten medians; one row is shown between its neighbours, ‹marked›.

    Example: rlsae inspect results/activations/tiny.ppo.reviews/mlp/survey --json
    """
    from rlsae.cli.tree import render
    from rlsae.inspection import inspect

    facts = inspect(artifact)
    typer.echo(json.dumps(facts, ensure_ascii=False, allow_nan=False, indent=1) if as_json else render(facts))


@app.command("verify")
def verify_artifact(artifact: ArtifactFolder) -> None:
    """Check every file and every row of an artifact; name all that is wrong, worst first, and exit with status 1.

    It reads all of the artifact: files against the digests of the manifest, stored rows against their checksums and
    statistics.

    Example: rlsae verify results/activations/tiny.ppo.reviews/mlp/survey
    """
    from rlsae.verification import verify

    problems, summary = verify(artifact)
    for problem in problems:
        typer.echo(problem)
    typer.echo(summary)
    if problems:
        raise typer.Exit(1)


@app.command()
def export(
    dictionaries: Annotated[list[Path], typer.Argument(help="Folders of dictionaries.", metavar="PATH...")],
    hub_layout: Annotated[Path, typer.Option(help="Folder to write, empty or not there.")],
    license_id: Annotated[str | None, typer.Option("--license", help="Licence on the card, as the hub names it: mit.")] = None,
) -> None:
    """Write dictionaries as a folder to upload to a model hub, with a model card; SAELens loads each by the name it prints.

    Example: rlsae export results/dictionaries/tiny.reviews/mlp/layers-2-3/layer3/small --hub-layout upload --license mit
    """
    from rlsae.sae.hub import export as write

    for name in write(dictionaries, hub_layout, license_id):
        typer.echo(name)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, as in workflow/schemas/config.schema.yaml.

    Example: rlsae schema > workflow/schemas/config.schema.yaml
    """
    from rlsae.schema import schema_yaml

    typer.echo(schema_yaml(), nl=False)
