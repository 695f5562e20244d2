"""Stage `interpretation`: what latents mean, whether they have to do with the feedback, and whether they cause the behaviour.

`latents.parquet` has a row per explained latent, `explanations.parquet` one per latent × explainer × judge × control,
`examples.parquet` one per window, `failures.parquet` one per window that an explanation gets wrong, `reward_links.parquet` one
per latent of a dictionary; `map_directions.parquet` tells what the map that all latents share writes; `ablations.parquet`,
`steering.parquet` and `transplants.parquet` what becomes of the reward; `summary.json` the figures to quote. Columns:
docs/artifacts.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.activations.joint import rows_of
from rlsae.activations.store import ActivationStore
from rlsae.beside import at_model
from rlsae.comparison.kinds import KEY
from rlsae.comparison.linear_map import LinearMaps, fit_linear_maps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.compute import device
from rlsae.config import InterpretationJob
from rlsae.interpretation.examples import row_acts
from rlsae.interpretation.explain import Findings, Settings, Text, explain_dictionary
from rlsae.interpretation.interventions.effects import Place
from rlsae.interpretation.interventions.study import Member, Tables, intervene
from rlsae.interpretation.llm import LlmDetection, LlmExplainer, LlmFuzzing, open_client, related
from rlsae.interpretation.llm.client import Client
from rlsae.interpretation.map_directions import COLUMNS as DIRECTION_COLUMNS
from rlsae.interpretation.map_directions import document_rewards, map_directions
from rlsae.interpretation.positions import Vocabulary
from rlsae.interpretation.probes.tables import ProbeTables, build_probes
from rlsae.interpretation.reward_gradient import Rewarded, reward_gradients
from rlsae.interpretation.reward_link import document_sums, reward_links
from rlsae.interpretation.selection import listed_latents, select
from rlsae.interpretation.summary import summarise
from rlsae.models import load
from rlsae.progress import Progress
from rlsae.resumable import Stage
from rlsae.rewards import Lexicon, Reward, vader_lexicon
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import load_members
from rlsae.tuning.fixed_prompts import FixedPrompts, judged_by

EXAMPLE_COLUMNS = [*KEY, "rank", "document", "held_out", "peak", "tokens", "activations", "activations_other"]
EXPLANATION_COLUMNS = [
    *KEY, "explainer", "judge", "control", "explanation", "score", "ci_low", "ci_high", "status",
]  # fmt: skip
FAILURE_COLUMNS = [*KEY, "explainer", "failure", "document", "tokens", "activations", "predictions"]
LATENT_COLUMNS = [
    *KEY, "selected_for", "reward_correlation", "reward_gradient", "task_tagged", "task_effect", "explanation",
    "detection_auc", "status", "raises", "lowers", "histogram",
]  # fmt: skip
LLM = "llm"
"""Explainer of a language model, and the first word of its judges."""
LLM_ANSWERS = ".llm-answers"
ROLES = ("base", "tuned")
GRADIENT_PROMPTS = 1024
"""Training prompts whose responses tell which latents raise the reward, at most."""

Key = tuple[str, int, str]
"""Role, layer and name of a dictionary."""
Gradient = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Subject:
    """What is interpreted: both models, and their rows on the same documents."""

    models: dict[str, PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    stores: dict[str, ActivationStore]
    rows: dict[int, PairedRows]
    maps: dict[int, tuple[LinearMaps, int]]
    """By layer, with the rank that its latents share."""
    reward: Reward
    rewards_T: NDArray[np.float64]
    """Of all documents of the stores."""

    @property
    def hook(self) -> str:
        return str(self.stores["base"].group.attrs["hook"])


@dataclass(frozen=True)
class Files:
    """Files and folders of the user, where there are any."""

    reward: Path | None = None
    llm: Path | None = None
    llm_answers: Path | None = None
    """Folder that keeps the answers of a language model for a rerun."""
    triples: Path | None = None


def build_interpretation(
    entry: InterpretationJob, out: Path, work: Path | None, comparison: Path,
    dictionaries: dict[tuple[str, int, str], Path], stores: dict[str, Path], base: Path, tuned: Path, tuned_weights: Path,
    corpus: Path, files: Files,
) -> None:  # fmt: skip
    """Interpret the dictionaries of a study, the first seed of each.

    Args:
        comparison: its artifact, for tags and the shared map; dictionaries, stores: as there.
        base, tuned: artifacts of the policies; tuned_weights: transformers folder of the one that is studied.
        corpus: corpus artifact of the tuning's prompts.
    """
    inputs = {"comparison": comparison, "base": base, "tuned": tuned, "corpus": corpus}
    inputs |= {f"{role} activations": path for role, path in stores.items()}
    inputs |= {f"{role} layer {layer} {name}": path for (role, layer, name), path in dictionaries.items()}
    named = {"reward": files.reward, "llm": files.llm, "triples": files.triples}
    inputs |= {label: path for label, path in named.items() if path}
    with Stage("interpretation", out, entry.settings(), inputs, work) as stage:
        where = device()
        base_model, tokenizer = load(base / "model", where)
        models = {"base": base_model, "tuned": load(tuned_weights, where)[0]}
        tuning, reward = judged_by(tuned, files.reward)
        subject = _subject(models, tokenizer, stores, pd.read_parquet(comparison / "levels.parquet"), reward, where)
        table = pd.read_parquet(comparison / "latents.parquet")
        saes = {key: load_first(folder, where) for key, folder in dictionaries.items()}
        gradients: dict[Key, Gradient] = {}
        if entry.interventions:
            training = FixedPrompts.draw(corpus, tokenizer, base_model, tuning, reward, GRADIENT_PROMPTS, held_out=False)
            gradients = _gradients(subject, saes, training)
        client = open_client(entry.llm, files.llm_answers or out.parent / LLM_ANSWERS) if entry.llm else None
        found, links, members = _explain(entry, subject, table, saes, gradients, client, where)
        effects = Tables.empty()
        if entry.interventions:
            prompts = FixedPrompts.draw(corpus, tokenizer, base_model, tuning, reward, entry.interventions.prompts)
            effects = intervene(
                entry.interventions, members, models, subject.hook, subject.rows, subject.maps, prompts, where, stage
            )
        latents = pd.DataFrame(found.latents, columns=LATENT_COLUMNS).merge(effects.single, "left", KEY)
        if client:
            latents = latents.assign(llm_task_related=task_answers(client, found, entry.task))
        tables = {
            "latents": latents,
            "explanations": pd.DataFrame(found.explanations, columns=EXPLANATION_COLUMNS),
            "examples": pd.DataFrame(found.examples, columns=EXAMPLE_COLUMNS),
            "failures": pd.DataFrame(found.failures, columns=FAILURE_COLUMNS),
            "reward_links": links,
            "map_directions": _directions(subject),
            "ablations": effects.ablations,
            "steering": effects.steering,
            "transplants": effects.transplants,
            "carried": effects.carried,
        }
        probed = _probe(entry, subject, saes, links, corpus, files.triples) if entry.probes else ProbeTables.empty()
        tables |= {
            "probe_triples": probed.triples,
            "probes": probed.probes,
            "probe_predictions": probed.predictions,
            "probe_overlap": probed.overlap,
            "probe_components": probed.components,
        }
        for name, of_name in tables.items():
            of_name.to_parquet(stage.staging / f"{name}.parquet", index=False)
        summary = summarise(tables) | probed.metrics
        (stage.staging / "summary.json").write_text(json.dumps(summary, indent=2))
        stage.publish({key: value for key, value in summary.items() if not isinstance(value, Mapping)})


def _subject(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    stores: dict[str, Path],
    levels: pd.DataFrame,
    reward: Reward,
    where: torch.device,
) -> Subject:
    opened = {role: ActivationStore(stores[role]) for role in ROLES}
    ranks = {layer: int(levels["rank"][levels.layer == layer].max()) for layer in levels.layer.unique().tolist()}
    rows = {layer: PairedRows(opened["base"], opened["tuned"], layer) for layer in ranks}
    maps = {layer: (fit_linear_maps(rows[layer], where), rank) for layer, rank in ranks.items()}
    return Subject(models, tokenizer, opened, rows, maps, reward, document_rewards(opened["base"], tokenizer, reward))


def _explain(
    entry: InterpretationJob,
    subject: Subject,
    table: pd.DataFrame,
    saes: dict[Key, tuple[int, SparseAutoencoder]],
    gradients: dict[Key, Gradient],
    client: Client | None,
    where: torch.device,
) -> tuple[Findings, pd.DataFrame, list[Member]]:
    """Rows of the tables of explained latents, the link of every latent to the reward, the dictionaries' first seeds."""
    store = subject.stores["base"]
    vocabulary = Vocabulary(
        subject.tokenizer, subject.models["base"].get_input_embeddings().weight.shape[0], polarity_of(subject.reward)
    )
    text = Text.of(store, entry.window, vocabulary)
    training_T = ~np.asarray(store.held_out, bool) & (np.diff(store.start) > 0)
    listed = listed_latents(entry.listed, [f"{layer}/{name}" for _, layer, name in saes])
    explainers = {LLM: LlmExplainer(client).explain} if client else {}
    judges = {f"{LLM}_detection": LlmDetection(client).score, f"{LLM}_fuzzing": LlmFuzzing(client).score} if client else {}
    settings = Settings(entry.judged_windows, entry.examples, entry.window, explainers, judges)
    found, members = Findings(), []
    links: list[pd.DataFrame] = []
    progress = Progress("explain", len(saes), "dictionaries")
    for (role, layer, name), (seed, sae) in saes.items():
        key = {"role": role, "layer": layer, "dictionary": name, "seed": seed}
        own, other = (rows_of(sae.reads, either, subject.stores) for either in (role, ROLES[role == "base"]))
        sums = document_sums(sae, own, layer, text.positions, vocabulary.polarity_V, where)
        link = reward_links(sums, subject.rewards_T[training_T], isinstance(subject.reward, Lexicon))
        link["reward_gradient"], link["reward_gradient_error"] = gradients.get((role, layer, name), (np.nan, np.nan))
        link = pd.concat([pd.DataFrame({**key, "latent": np.arange(sae.latents)}), link], axis=1)
        mine = table[(table[list(key)] == list(key.values())).all(axis=1)].merge(link, on=KEY)
        selection = select(mine, entry.latents, listed.get(f"{layer}/{name}", []))
        latents = selection.latent.to_numpy(np.int64)
        acts_NS = row_acts(sae, own, layer, latents, where)
        explain_dictionary(key, selection, sae, acts_NS, own, other, text, subject.models[role], settings, found)
        links.append(link)
        members.append(Member(role, layer, name, seed, sae, mine, latents.tolist()))
        progress.update()
    return found, pd.concat(links, ignore_index=True), members


def load_first(folder: Path, where: torch.device) -> tuple[int, SparseAutoencoder]:
    """The first seed of a dictionaries artifact, and its autoencoder."""
    seed, path = min(load_members(folder).items())
    return seed, SparseAutoencoder.load(path).to(where)


def task_answers(client: Client, found: Findings, task: str) -> list[str]:
    """Of each explained latent, whether the language model finds its explanation related to the task: 1, 0, or a status."""
    said = {tuple(row[k] for k in KEY): row["explanation"] for row in found.explanations if row["explainer"] == LLM}
    return [str(related(client, said[tuple(row[k] for k in KEY)], task)) for row in found.latents]


def _probe(
    entry: InterpretationJob,
    subject: Subject,
    saes: dict[Key, tuple[int, SparseAutoencoder]],
    links: pd.DataFrame,
    corpus: Path,
    triples: Path | None,
) -> ProbeTables:
    """Probes of each layer's first dictionary of one model's rows, which is the paper's small one where it is named first."""
    assert entry.probes
    first: dict[tuple[str, int], tuple[str, SparseAutoencoder]] = {}
    for (role, layer, name), (_, sae) in saes.items():
        if sae.reads == "own":
            first.setdefault((role, layer), (name, sae))
    tagged = {
        layer: links.query("role == 'tuned' and layer == @layer and dictionary == @name").task_tagged.to_numpy(bool)
        for (role, layer), (name, _) in first.items()
        if role == "tuned"
    }
    return build_probes(
        entry.probes,
        corpus=corpus,
        tokenizer=subject.tokenizer,
        base=subject.models["base"],
        tuned=subject.models["tuned"],
        hook=subject.hook,
        saes={place: sae for place, (_, sae) in first.items()},
        polarity=polarity_of(subject.reward),
        file=triples,
        tagged=tagged,
    )


def polarity_of(reward: Reward) -> dict[str, float]:
    """The lexicon of the reward, VADER's where it has none."""
    return reward.polarity if isinstance(reward, Lexicon) else vader_lexicon()


def _gradients(subject: Subject, saes: dict[Key, tuple[int, SparseAutoencoder]], prompts: FixedPrompts) -> dict[Key, Gradient]:
    found: dict[Key, Gradient] = {}
    rewarded = {role: Rewarded.by(model, prompts) for role, model in subject.models.items()}
    for role, layer in sorted({key[:2] for key in saes}):
        place = Place(subject.models[role], layer, subject.hook)
        keys = [key for key in saes if key[:2] == (role, layer)]
        with ExitStack() as stack:
            at = [at_model(saes[key][1], role, role, subject.models, layer, subject.hook) for key in keys]
            seen = [stack.enter_context(context) for context in at]
            found |= zip(keys, reward_gradients(place, seen, rewarded[role]), strict=True)
    return found


def _directions(subject: Subject) -> pd.DataFrame:
    tables = [
        map_directions(subject.rows[layer], maps, rank, subject.models["base"], subject.tokenizer, subject.rewards_T)
        for layer, (maps, rank) in subject.maps.items()
        if rank
    ]
    return pd.concat([pd.DataFrame(columns=DIRECTION_COLUMNS), *tables], ignore_index=True)
