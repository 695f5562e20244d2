"""`rlsae <verb>`: one verb per stage, called by the rules and typed by people, and a few to look at results.

Stage modules are imported inside the verbs, so that `rlsae --help` and the verbs that only read stay fast.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlsae import config
from rlsae.errors import RlsaeError
from rlsae.expand import load, parse_settings
from rlsae.layout import PER_TOKENS

DUMP = ("hook", "layers", "rows", "rows_per_part", "dtype", "checkpoint")
"""Settings of a dump."""

app = typer.Typer(
    help="What did this tuning change inside my language model, and how sure are we?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="Folder of the artifact to write.")]
Work = Annotated[Path | None, typer.Option(help="Folder for partial state; beside --out by default.")]
Settings = Annotated[str, typer.Option(help="The entry's settings as JSON, as in the configuration but for paths.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")]
Folder = Annotated[Path, typer.Option(help="Folder of an input artifact.")]
MaybeFile = Annotated[Path | None, typer.Option(help="The entry's own file or folder, where it has one.")]
Named = Annotated[list[str], typer.Option(help="KEY=FOLDER, repeated.")]
ConfigFile = Annotated[Path, typer.Argument(help="Configuration file.")]


def main() -> None:
    """Run the command line; mistakes that people can mend are explained without a traceback."""
    # Waiting threads sleep instead of spinning: an eighth slower alone, six times faster beside another job.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except RlsaeError as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        sys.exit(f"error: cannot write {error.filename or 'the results'}: {error.strerror}; make room or choose another folder")


def _configure(threads: int | None) -> None:
    from rlsae.compute import configure

    configure(threads)


# --- stages ------------------------------------------------------------------------------------------------------


@app.command()
def corpus(settings: Settings, out: Out, work: Work = None, source: MaybeFile = None) -> None:
    """Write the documents of a corpus.

    Example: rlsae corpus --settings '{"source": "generated", "documents": 100}' --out results/corpora/reviews
    """
    from rlsae.corpora import build_corpus

    entry = parse_settings(config.AnyCorpus, _with_path(settings, source))
    given = {key: value for key, value in entry.settings().items() if key not in PER_TOKENS}
    build_corpus(entry, given, out, work, source)


@app.command()
def model(
    settings: Settings,
    out: Out,
    work: Work = None,
    source: MaybeFile = None,
    corpus: Annotated[Path | None, typer.Option(help="Corpus artifact to pretrain on.")] = None,
    threads: Threads = None,
) -> None:
    """Publish a base model: pretrain it, copy a local folder, or take it from the hub.

    Example: rlsae model --settings '{"source": "path"}' --source ~/models/pythia-70m --out results/models/pythia
    """
    _configure(threads)
    from rlsae.models import build_model

    given = _json(settings)
    length = given.pop("context_length", None)
    entry = parse_settings(config.AnyModel, _with_path(_text(given), source))
    if isinstance(entry, config.PretrainedModel) and (corpus is None or length is None):
        raise RlsaeError("--corpus and a context_length in --settings are needed to pretrain a model")
    shaped = entry.settings() | ({"context_length": length} if length is not None else {})
    build_model(entry, shaped, out, work, source, corpus)


@app.command()
def tune(
    settings: Annotated[str, typer.Option(help='{"tuning": ..., "reward": ...}')],
    base: Folder,
    corpus: Folder,
    out: Out,
    work: Work = None,
    reward_file: MaybeFile = None,
    threads: Threads = None,
) -> None:
    """Tune a base model on a reward and evaluate what it gained.

    Example: rlsae tune --settings '{"tuning": {"method": "ppo", "reward": "vader", "corpus": "reviews"},
    "reward": {"kind": "lexicon"}}' --base results/models/tiny --corpus results/corpora/reviews
    --out results/policies/tiny.ppo
    """
    _configure(threads)
    from rlsae.tuning.stage import build_policy

    given = _json(settings, "tuning", "reward")
    entry = parse_settings(config.PPOTuning, _text(given["tuning"]))
    reward = parse_settings(config.AnyReward, _with_path(_text(given["reward"]), reward_file))
    shaped = {"tuning": entry.settings(), "reward": reward.settings()}
    build_policy(entry, reward, shaped, out, work, base, corpus, reward_file)


@app.command()
def tokens(
    settings: Annotated[str, typer.Option(help="seed, context_length, drop_positions")],
    model: Folder,
    corpus: Folder,
    out: Out,
    work: Work = None,
) -> None:
    """Tokenise a corpus for a base model and all policies tuned from it.

    Example: rlsae tokens --settings '{"seed": 0, "context_length": 64, "drop_positions": 0}'
    --model results/models/tiny --corpus results/corpora/reviews --out results/tokens/tiny.reviews
    """
    from rlsae.activations.tokens import build_tokens

    build_tokens(_json(settings, "seed", *PER_TOKENS), out, work, model, corpus)


@app.command()
def extract(
    settings: Annotated[str, typer.Option(help="hook, layers, rows, rows_per_part, dtype, checkpoint")],
    part: Annotated[int, typer.Option(help="Number of the part, from 0.")],
    stamp: Annotated[Path, typer.Option(help="File to write when the part is done.")],
    policy: Folder,
    weights: Annotated[Path, typer.Option(help="Transformers folder of the policy.")],
    tokens: Folder,
    work: Annotated[Path, typer.Option(help="Folder that all parts of the dump share.")],
    threads: Threads = None,
) -> None:
    """Dump one part of a policy's activations; `rlsae consolidate` publishes them.

    Example: rlsae extract --part 0 --settings '{"hook": "mlp", "layers": [3], "rows": 65536, "rows_per_part": 65536,
    "dtype": "float16", "checkpoint": null}' --policy results/models/tiny --weights results/models/tiny/model
    --tokens results/tokens/tiny.reviews --work /scratch/dump --stamp /scratch/part-0.json
    """
    _configure(threads)
    from rlsae.activations.extract import extract_part

    extract_part(_json(settings, *DUMP), part, stamp, work, policy, weights, tokens)


@app.command()
def consolidate(
    settings: Annotated[str, typer.Option(help="As given to the parts.")],
    policy: Folder,
    tokens: Folder,
    work: Annotated[Path, typer.Option(help="Folder that the parts share.")],
    out: Out,
    stamp: Annotated[list[Path], typer.Option(help="Stamp of each part, in order, repeated.")],
) -> None:
    """Check the parts of a dump and publish the activation store.

    Example: rlsae consolidate --settings ... --policy results/models/tiny --tokens results/tokens/tiny.reviews
    --work /scratch/dump --stamp /scratch/part-0.json --out results/activations/tiny.reviews/mlp/layers-3
    """
    from rlsae.activations.extract import consolidate as publish

    publish(_json(settings, *DUMP), out, work, policy, tokens, stamp)


@app.command()
def divergence(
    settings: Annotated[str, typer.Option(help='{"layers": ...} as in the study')],
    base: Folder,
    tuned: Folder,
    base_weights: Folder,
    tuned_weights: Folder,
    survey_base: Folder,
    survey_tuned: Folder,
    out: Out,
    work: Work = None,
    same_as: MaybeFile = None,
) -> None:
    """Measure how far each layer moved and choose layers.

    Example: rlsae divergence --settings '{"layers": [2, 3]}' --base results/models/tiny --tuned results/policies/tiny.ppo
    --base-weights results/models/tiny/model --tuned-weights results/policies/tiny.ppo/model --survey-base ...
    --survey-tuned ... --out results/divergence/demo
    """
    from rlsae.divergence import build_divergence

    build_divergence(
        _json(settings, "layers"), out, work, base, tuned, base_weights, tuned_weights, survey_base, survey_tuned, same_as
    )


@app.command()
def dictionary(
    settings: Settings,
    layer: Annotated[int, typer.Option(help="Layer of the store to train on.")],
    activations: Folder,
    weights: Annotated[Path, typer.Option(help="Transformers folder of the policy, for the cross-entropy recovered.")],
    tokens: Folder,
    out: Out,
    work: Work = None,
    threads: Threads = None,
) -> None:
    """Train the sparse autoencoders of one layer, all seeds.

    Example: rlsae dictionary --settings '{"expansion": 2, "l1": 0.005}' --layer 3
    --activations results/activations/tiny.reviews/mlp/layers-2-3 --weights results/models/tiny/model
    --tokens results/tokens/tiny.reviews --out results/dictionaries/mine
    """
    _configure(threads)
    from rlsae.sae.train import build_dictionaries

    entry = parse_settings(config.Dictionary, settings)
    build_dictionaries(entry, entry.settings(), layer, out, work, activations, weights, tokens)


@app.command()
def compare(
    settings: Annotated[str, typer.Option(help="dictionaries and sizes of the study")],
    dictionary: Named,
    store: Named,
    out: Out,
    work: Work = None,
    threads: Threads = None,
) -> None:
    """Match the latents of base and tuned dictionaries.

    Example: rlsae compare --settings '{"dictionaries": ["small"], "sizes": null}'
    --dictionary base/3/small=results/dictionaries/... --dictionary tuned/3/small=...
    --store base=results/activations/... --store tuned=... --out results/comparison/demo
    """
    _configure(threads)
    from rlsae.comparison.stage import build_comparison

    build_comparison(_json(settings, "dictionaries", "sizes"), out, work, _dictionaries(dictionary), _pairs(store))


@app.command()
def interpret(
    settings: Annotated[str, typer.Option(help="latents, examples, window, top_tokens")],
    comparison: Folder,
    dictionary: Named,
    store: Named,
    model: Folder,
    out: Out,
    work: Work = None,
    threads: Threads = None,
) -> None:
    """Show where latents fire and explain them by tokens, scored on held-out documents.

    Example: rlsae interpret --settings '{"latents": 20, "examples": 10, "window": 16, "top_tokens": 8}'
    --comparison results/comparison/demo --dictionary base/3/small=... --store base=... --model results/models/tiny
    --out results/interpretation/demo
    """
    _configure(threads)
    from rlsae.interpretation.stage import build_interpretation

    given = parse_settings(config.Interpretation, settings).settings()
    build_interpretation(given, out, work, comparison, _dictionaries(dictionary), _pairs(store), model)


@app.command()
def report(
    study: Annotated[str, typer.Option(help="Name of the study.")],
    base: Folder,
    tuned: Folder,
    divergence: Folder,
    comparison: Folder,
    interpretation: Folder,
    dictionary: Named,
    store: Named,
    out: Out,
    work: Work = None,
) -> None:
    """Write the report of a study: a page that opens from disk.

    Example: rlsae report --study demo --base results/models/tiny --tuned results/policies/tiny.ppo
    --divergence results/divergence/demo --comparison results/comparison/demo --interpretation results/interpretation/demo
    --dictionary base/3/small=... --store base=... --out results/reports/demo
    """
    from rlsae.report.build import build_report

    build_report(
        study, {}, out, work, base, tuned, divergence, comparison, interpretation, _dictionaries(dictionary), _pairs(store)
    )


# --- looking at configurations and results -----------------------------------------------------------------------


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


# --- reading options ---------------------------------------------------------------------------------------------


def _json(text: str, *required: str) -> dict[str, Any]:
    """The object that --settings holds; it must have the required keys."""
    import json

    try:
        given = json.loads(text)
    except ValueError as error:
        raise RlsaeError(f"--settings is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise RlsaeError(f"--settings: expected an object, found {text!r:.60}")
    missing = [key for key in required if key not in given]
    if missing:
        raise RlsaeError(f"--settings: the key {missing[0]} is missing; expected: {', '.join(required)}")
    return given


def _text(values: dict[str, Any]) -> str:
    import json

    return json.dumps(values)


def _with_path(text: str, path: Path | None) -> str:
    """Settings with the path that was given beside them."""
    return _text(_json(text) | {"path": str(path)}) if path else text


def _pairs(named: list[str]) -> dict[str, Path]:
    """KEY=FOLDER options as a mapping."""
    found = {}
    for text in named:
        key, equals, folder = text.partition("=")
        if not equals:
            raise RlsaeError(f"expected KEY=FOLDER, found {text!r}")
        found[key] = Path(folder)
    return found


def _dictionaries(named: list[str]) -> dict[tuple[str, int, str], Path]:
    """ROLE/LAYER/NAME=FOLDER options as a mapping."""
    found = {}
    for key, folder in _pairs(named).items():
        role, _, rest = key.partition("/")
        layer, _, name = rest.partition("/")
        if role not in ("base", "tuned") or not layer.isdigit() or not name:
            raise RlsaeError(f"--dictionary: expected base/LAYER/NAME=FOLDER or tuned/LAYER/NAME=FOLDER, found {key!r}")
        found[role, int(layer), name] = folder
    return found
