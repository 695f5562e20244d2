"""One verb per stage, called by the rules and typed by people.

Stage modules are imported inside the verbs, so that `rlsae --help` and the verbs that only read stay fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlsae import config
from rlsae.cli.app import app
from rlsae.cli.options import (
    DUMP,
    Folder,
    Gpus,
    MaybeFile,
    Named,
    Out,
    Settings,
    Threads,
    Work,
    as_text,
    configure,
    dictionaries,
    pairs,
    read_json,
    with_path,
)
from rlsae.errors import RlsaeError
from rlsae.expand import parse_settings
from rlsae.layout import PER_TOKENS, RESULTS


@app.command()
def corpus(settings: Settings, out: Out, work: Work = None, source: MaybeFile = None) -> None:
    """Write the documents of a corpus.

    Example: rlsae corpus --settings '{"source": "generated", "documents": 100}' --out results/corpora/reviews
    """
    from rlsae.corpora import build_corpus

    entry = parse_settings(config.AnyCorpus, with_path(settings, source))
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
    gpus: Gpus = None,
) -> None:
    """Publish a base model: pretrain it, copy a local folder, or take it from the hub.

    Example: rlsae model --settings '{"source": "path"}' --source ~/models/pythia-70m --out results/models/pythia
    """
    configure(threads, gpus)
    from rlsae.models import build_model

    given = read_json(settings)
    length = given.pop("context_length", None)
    entry = parse_settings(config.AnyModel, with_path(as_text(given), source))
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
    tuned: Annotated[Path | None, typer.Option(help="Folder of an external tuned model.")] = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Tune a base model, or take a tuned one, and evaluate what it gained.

    Example: rlsae tune --settings '{"tuning": {"method": "ppo", "reward": "vader", "corpus": "reviews"},
    "reward": {"kind": "lexicon"}}' --base results/models/tiny --corpus results/corpora/reviews
    --out results/policies/tiny.ppo
    """
    configure(threads, gpus)
    from rlsae.tuning.stage import build_policy

    given = read_json(settings, "tuning", "reward")
    entry = parse_settings(config.AnyTuning, with_path(as_text(given["tuning"]), tuned))
    reward = parse_settings(config.AnyReward, with_path(as_text(given["reward"]), reward_file))
    shaped = {"tuning": entry.settings(), "reward": reward.settings()}
    build_policy(entry, reward, shaped, out, work, base, corpus, reward_file, tuned)


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

    build_tokens(read_json(settings, "seed", *PER_TOKENS), out, work, model, corpus)


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
    gpus: Gpus = None,
) -> None:
    """Dump one part of a policy's activations; `rlsae consolidate` publishes them.

    Example: rlsae extract --part 0 --settings '{"hook": "mlp", "layers": [3], "rows": 65536, "rows_per_part": 65536,
    "dtype": "float16", "precision": "float32", "codec": null, "checkpoint": null}'
    --policy results/models/tiny --weights results/models/tiny/model --tokens results/tokens/tiny.reviews
    --work /scratch/dump --stamp /scratch/part-0.json
    """
    configure(threads, gpus)
    from rlsae.activations.extract import extract_part

    extract_part(read_json(settings, *DUMP), part, stamp, work, policy, weights, tokens)


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

    publish(read_json(settings, *DUMP), out, work, policy, tokens, stamp)


@app.command()
def divergence(
    settings: Annotated[str, typer.Option(help='{"layers": ...} as in the study')],
    base: Folder,
    tuned: Folder,
    base_weights: Folder,
    tuned_weights: Folder,
    survey_base: Folder,
    survey_tuned: Folder,
    tokens: Folder,
    corpus: Annotated[Path, typer.Option(help="Corpus artifact of the tuning's prompts.")],
    out: Out,
    checkpoint: Annotated[list[str] | None, typer.Option(help="STEP=FOLDER of a checkpoint's survey, repeated.")] = None,
    reward_file: MaybeFile = None,
    same_as: MaybeFile = None,
    work: Work = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Measure how far each layer moved and choose layers.

    Example: rlsae divergence --settings '{"layers": [2, 3]}' --base results/models/tiny --tuned results/policies/tiny.ppo
    --base-weights results/models/tiny/model --tuned-weights results/policies/tiny.ppo/model --survey-base ...
    --survey-tuned ... --tokens results/tokens/tiny.reviews --corpus results/corpora/reviews --out results/divergence/demo
    """
    configure(threads, gpus)
    from rlsae.divergence.stage import Policy, build_divergence

    surveys = {int(step): folder for step, folder in pairs(checkpoint or []).items()}
    both = Policy(base, base_weights, survey_base), Policy(tuned, tuned_weights, survey_tuned)
    build_divergence(read_json(settings, "layers"), out, work, *both, surveys, tokens, corpus, reward_file, same_as)


@app.command()
def dictionary(
    settings: Settings,
    layer: Annotated[int, typer.Option(help="Layer of the store to train on.")],
    activations: Folder,
    weights: Annotated[Path, typer.Option(help="Transformers folder of the policy, for the cross-entropy recovered.")],
    tokens: Folder,
    out: Out,
    start: Annotated[Path | None, typer.Option(help="The base's dictionaries to go on from, for start: from_base.")] = None,
    source: MaybeFile = None,
    base_activations: Annotated[Path | None, typer.Option(help="The base's, where `reads` is both or difference.")] = None,
    base_weights: Annotated[Path | None, typer.Option(help="The base's transformers folder, likewise.")] = None,
    work: Work = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Train the sparse autoencoders of one layer, all seeds; or take one from elsewhere.

    Example: rlsae dictionary --settings '{"expansion": 2, "l1": 0.005}' --layer 3
    --activations results/activations/tiny.reviews/mlp/layers-2-3 --weights results/models/tiny/model
    --tokens results/tokens/tiny.reviews --out results/dictionaries/mine
    """
    configure(threads, gpus)
    from rlsae.sae.train import build_dictionaries

    entry = parse_settings(config.AnyDictionary, with_path(settings, source))
    given = (activations, weights, tokens, start, source, base_activations, base_weights)
    build_dictionaries(entry, entry.settings(), layer, out, work, *given)


@app.command()
def compare(
    settings: Annotated[str, typer.Option(help="dictionaries and sizes of the study")],
    dictionary: Named,
    store: Named,
    weights: Named,
    tokens: Folder,
    out: Out,
    work: Work = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Test which latents changed between base and tuned, and describe how alike their dictionaries are.

    --weights are the transformers folders of both policies, --tokens the text on which each dictionary is tried in both.

    Example: rlsae compare --settings '{"dictionaries": ["small"], "sizes": null}'
    --dictionary base/3/small=results/dictionaries/... --dictionary tuned/3/small=...
    --store base=results/activations/... --store tuned=... --weights base=results/models/tiny/model
    --weights tuned=results/policies/tiny.ppo/model --tokens results/tokens/tiny.reviews --out results/comparison/demo
    """
    configure(threads, gpus)
    from rlsae.comparison.stage import build_comparison

    given = read_json(settings, "dictionaries", "sizes")
    build_comparison(given, out, work, dictionaries(dictionary), pairs(store), pairs(weights), tokens)


@app.command()
def interpret(
    settings: Annotated[str, typer.Option(help="latents, listed, examples, window, judged_windows, interventions")],
    comparison: Folder,
    dictionary: Named,
    store: Named,
    base: Folder,
    tuned: Folder,
    tuned_weights: Folder,
    corpus: Annotated[Path, typer.Option(help="Corpus artifact of the tuning's prompts.")],
    out: Out,
    reward_file: MaybeFile = None,
    llm_path: MaybeFile = None,
    triples: Annotated[Path | None, typer.Option(help="Triples of your own for the probes.")] = None,
    llm_answers: Annotated[Path | None, typer.Option(help="Folder that keeps a language model's answers.")] = None,
    work: Work = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Explain latents and judge what is said; ablate, scale and transplant them while the models generate.

    Example: rlsae interpret --settings '{"latents": 20}' --comparison results/comparison/demo
    --dictionary base/3/small=... --store base=... --base results/models/tiny --tuned results/policies/tiny.ppo
    --tuned-weights results/policies/tiny.ppo/model --corpus results/corpora/reviews --out results/interpretation/demo
    """
    configure(threads, gpus)
    from rlsae.interpretation.stage import Files, build_interpretation

    given = read_json(settings)
    if given.get("llm"):
        given["llm"] = read_json(with_path(as_text(given["llm"]), llm_path))
    entry, both = parse_settings(config.InterpretationJob, as_text(given)), (dictionaries(dictionary), pairs(store))
    files = Files(reward_file, llm_path, llm_answers, triples)
    build_interpretation(entry, out, work, comparison, *both, base, tuned, tuned_weights, corpus, files)


@app.command()
def report(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    results: Annotated[Path, typer.Option(help="Folder of all artifacts.")] = RESULTS,
    work: Work = None,
) -> None:
    """Write the report of a finished study: pages in reports/ of the results, which open from disk.

    What the study is made of is told by the manifests, so that no configuration is needed.

    Example: rlsae report demo
    """
    from rlsae.report.build import build_report
    from rlsae.report.study import Study

    build_report(Study.find(results, study), results / "reports" / study, work)


@app.command("paper-tables")
def paper_tables(
    results: Annotated[Path, typer.Option(help="Folder of all artifacts.")] = RESULTS,
    work: Work = None,
) -> None:
    """Write the tables and figures of arXiv 2310.08164 from every finished study, published numbers beside ours: paper/ of the
    results.

    Example: rlsae paper-tables --results results
    """
    from rlsae.paper.stage import build_paper

    build_paper(results, results / "paper", work)


@app.command("report-studies")
def report_studies(
    studies: Annotated[
        list[str] | None, typer.Argument(help="Names of the studies; by default all that have a report.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of all artifacts.")] = RESULTS,
) -> None:
    """Write the page that shows several studies side by side: reports/index.html of the results.

    Example: rlsae report-studies null weak strong
    """
    from rlsae.report.studies import build_page

    build_page(results, studies or sorted(folder.parent.name for folder in results.glob("reports/*/manifest.json")))
