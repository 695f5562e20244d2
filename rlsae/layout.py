"""Where every artifact lies and which settings shape it: what the Snakemake rules, `status` and `orphans` agree on."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsae.config import Choice, Config, Entry, ExternalDictionary, LocalModel, PretrainedModel, SameAs, Study
from rlsae.errors import RlsaeError

RESULTS = Path("results")
SURVEY = "survey"
PER_TOKENS = ("context_length", "drop_positions")
"""Settings of a corpus that shape its tokens, not its documents."""
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
"""Names of these numbers in the config.json of the model families."""


@dataclass(frozen=True)
class Artifact:
    """One stage folder that a configuration names."""

    stage: str
    folder: Path
    settings: dict[str, Any]
    """What its manifest must hold as parameters."""
    inputs: list[Path] = field(default_factory=list)
    """Folders of the artifacts that it is made from."""
    files: dict[str, Path] = field(default_factory=dict)
    """Files outside the results that it is made from, by the label that its manifest gives them."""
    temporary: bool = False
    """Whether its data may be gone once what is made from it is done."""


def run_this_checkout(folder: str) -> None:
    """Let the jobs of a workflow run its own checkout with its own interpreter, whichever folder it is started from."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def model_of(policy: str) -> str:
    """Name of the base model of a policy: `tiny` of `tiny.ppo@12`."""
    return policy.split(".")[0]


def policy_folder(policy: str) -> Path:
    """The artifact that holds a policy: of the base model, or of the tuning (for its checkpoints too)."""
    return RESULTS / "policies" / policy.split("@")[0] if "." in policy else RESULTS / "models" / policy


def weights_folder(policy: str) -> Path:
    """The transformers folder of a policy."""
    _, _, step = policy.partition("@")
    return policy_folder(policy) / weights_name(step)


def weights_name(step: str | int | None) -> str:
    """Where a policy's artifact holds the weights: of a checkpoint, or of the finished policy."""
    return f"checkpoints/{step}" if step else "model"


def kind_of(layers: list[int]) -> str:
    """Name of the dump that holds these layers: `layers-3-4`."""
    return "layers-" + "-".join(str(layer) for layer in layers)


def layers_of(kind: str) -> list[int] | None:
    """The layers of a dump; None means all of them."""
    return None if kind == SURVEY else [int(part) for part in kind.split("-")[1:]]


class Layout:
    """Paths and settings of everything that a configuration names."""

    def __init__(self, config: Config) -> None:
        self.config = config

    # --- settings of each stage, as passed to `rlsae <verb> --settings` and kept in the manifest --------------------

    def corpus_settings(self, corpus: str) -> dict[str, Any]:
        settings = self.config.corpora[corpus].settings()
        return {key: value for key, value in settings.items() if key not in PER_TOKENS}

    def model_settings(self, model: str) -> dict[str, Any]:
        entry = self.config.models[model]
        settings = entry.settings()
        if isinstance(entry, PretrainedModel):
            settings["context_length"] = self.config.corpora[entry.corpus].context_length
        return settings

    def policy_settings(self, tuning: str) -> dict[str, Any]:
        entry = self.config.tunings[tuning]
        return {"tuning": entry.settings(), "reward": self.config.rewards[entry.reward].settings()}

    def token_settings(self, corpus: str) -> dict[str, Any]:
        entry = self.config.corpora[corpus]
        return {"seed": entry.seed, **{key: getattr(entry, key) for key in PER_TOKENS}}

    def activation_settings(self, activation: str, kind: str, policy: str) -> dict[str, Any]:
        entry = self.config.activations[activation]
        _, _, step = policy.partition("@")
        return {
            "checkpoint": int(step) if step else None,
            "hook": entry.hook,
            "layers": layers_of(kind),
            "rows": entry.survey_rows if kind == SURVEY else entry.rows,
            "rows_per_part": entry.rows_per_part,
            "dtype": entry.dtype,
            "precision": entry.precision,
            "codec": entry.codec,
        }

    def divergence_settings(self, study: str) -> dict[str, Any]:
        layers = self.config.studies[study].layers
        return {"layers": layers.settings() if isinstance(layers, Choice | SameAs) else layers}

    def dictionary_settings(self, dictionary: str) -> dict[str, Any]:
        return self.config.dictionaries[dictionary].settings()

    def comparison_settings(self, study: str) -> dict[str, Any]:
        entry = self.config.studies[study]
        return {"dictionaries": entry.dictionaries, "sizes": entry.sizes.settings() if entry.sizes else None}

    def interpretation_settings(self, study: str) -> dict[str, Any]:
        entry = self.config.studies[study]
        return entry.interpretation.settings() | {"llm": self.config.llms[entry.llm].settings() if entry.llm else None}

    def checkpoints(self, study: str) -> dict[int, str]:
        """The policies on the way to the one that is studied, by step; none where that is itself a checkpoint."""
        entry = self.config.studies[study]
        if "@" in entry.tuning:
            return {}
        return {step: f"{entry.tuned}@{step}" for step in self.config.tunings[entry.tuning].checkpoint_steps()}

    # --- layers ---------------------------------------------------------------------------------------------------

    def parts(self, activation: str, kind: str) -> int:
        """Number of parts of a dump: it follows from the configuration alone, never from the machine."""
        entry = self.config.activations[activation]
        return math.ceil((entry.survey_rows if kind == SURVEY else entry.rows) / entry.rows_per_part)

    def part_megabytes(self, activation: str, kind: str, policy: str) -> int:
        """Disk that one part of a dump takes, at most; 0 for a model of the hub that has not been fetched yet."""
        entry, folder = self.config.activations[activation], self.model_folder(model_of(policy))
        if not (folder / "config.json").exists():
            return 0
        rows = min(entry.survey_rows if kind == SURVEY else entry.rows, entry.rows_per_part)
        layers = layers_of(kind)
        count = folder_layer_count(folder) if layers is None else len(layers)
        width = folder_number(folder, WIDTH_KEYS, "channels")
        return math.ceil(rows * count * width * (2 if entry.dtype == "float16" else 4) / 1e6)

    def model_folder(self, model: str) -> Path:
        """The transformers folder of a base model: the user's own, or the published one."""
        entry = self.config.models[model]
        return Path(entry.path) if isinstance(entry, LocalModel) else RESULTS / "models" / model / "model"

    def layer_source(self, study: str) -> str:
        """The study whose choice of layers counts, `same_as` followed to its end."""
        layers = self.config.studies[study].layers
        return self.layer_source(layers.same_as) if isinstance(layers, SameAs) else study

    def static_layers(self, study: str) -> list[int] | None:
        """The layers of a study where the configuration alone tells them; None where they must be measured."""
        entry = self.config.studies[self.layer_source(study)]
        if isinstance(entry.layers, list):
            return sorted(set(entry.layers))
        if isinstance(entry.layers, Choice) and entry.layers.order in ("highest", "lowest"):
            return None
        count = self.layer_count(entry.model)
        if count is None:
            return None
        if not isinstance(entry.layers, Choice):
            return list(range(count))
        return positional_layers(entry.layers, count)

    def check_layers(self) -> None:
        """
        Raises:
            RlsaeError: a model of a path is not there, or has fewer layers than a study asks for.
        """
        for study, entry in self.config.studies.items():
            if (count := self.layer_count(entry.model)) is not None:
                check_layers(f"studies.{study}.layers", self.divergence_settings(study)["layers"], count)

    def layer_count(self, model: str) -> int | None:
        """Number of layers of a model where that is known before it is loaded."""
        entry = self.config.models[model]
        if isinstance(entry, PretrainedModel):
            return entry.layers
        if not isinstance(entry, LocalModel):
            return None
        try:
            return folder_layer_count(Path(entry.path))
        except RlsaeError as error:
            raise RlsaeError(f"models.{model}.path: {error}") from None

    def chosen_layers(self, study: str) -> list[int] | None:
        """The layers of a study, from the configuration or from `chosen.json`; None while they are not chosen."""
        static = self.static_layers(study)
        if static is not None:
            return static
        path = RESULTS / "divergence" / self.layer_source(study) / "chosen.json"
        return json.loads(path.read_text())["layers"] if path.exists() else None

    # --- artifacts ------------------------------------------------------------------------------------------------

    def artifacts(self, study: str) -> Iterator[Artifact]:
        """The artifacts of a study along the chain; those behind the choice of layers once it has been made."""
        entry = self.config.studies[study]
        tuning, model = entry.tuning.split("@")[0], self.config.models[entry.model]
        policies, tuned = [entry.base, entry.tuned], policy_folder(entry.tuned)
        base, tokens = policy_folder(entry.base), RESULTS / "tokens" / f"{entry.model}.{entry.corpus}"
        trained_on = [self._corpus(model.corpus)] if isinstance(model, PretrainedModel) else []
        texts, prompts = self._corpus(entry.corpus), self._corpus(self.config.tunings[tuning].corpus)
        yield from {corpus.folder: corpus for corpus in [*trained_on, texts, prompts]}.values()
        files = self._files(model, "model")
        yield Artifact("models", base, self.model_settings(entry.model), [c.folder for c in trained_on], files)
        reward = self._files(self.config.rewards[self.config.tunings[tuning].reward], "reward")
        files = reward | self._files(self.config.tunings[tuning], "tuned")
        yield Artifact("policies", tuned, self.policy_settings(tuning), [base, prompts.folder], files)
        yield Artifact("tokens", tokens, self.token_settings(entry.corpus), [base, texts.folder])
        surveys = [self._activations(entry, policy, SURVEY, tokens) for policy in policies]
        surveys += [self._activations(entry, policy, SURVEY, tokens) for policy in self.checkpoints(study).values()]
        yield from surveys
        divergence, source = RESULTS / "divergence" / study, self.layer_source(study)
        inputs = [base, tuned, tokens, prompts.folder, *(survey.folder for survey in surveys)]
        inputs += [RESULTS / "divergence" / source] if source != study else []
        yield Artifact("divergence", divergence, self.divergence_settings(study), inputs, reward)
        layers = self.chosen_layers(study)
        if layers is None:
            return
        stores = [self._activations(entry, policy, kind_of(layers), tokens) for policy in policies]
        yield from stores
        trained = []
        for policy in policies:
            for layer in layers:
                for name in self.dictionaries_of(policy, entry):
                    found = self._dictionaries(entry, policy, kind_of(layers), layer, name, tokens)
                    trained.append(found[-1])
                    yield from found
        comparison, interpretation = RESULTS / "comparison" / study, RESULTS / "interpretation" / study
        data = [artifact.folder for artifact in [*stores, *trained]]
        yield Artifact("comparison", comparison, self.comparison_settings(study), [tokens, *data])
        inputs = [comparison, base, tuned, prompts.folder, *data]
        files = reward | (self._files(self.config.llms[entry.llm], "llm") if entry.llm else {})
        files |= self._files(entry.interpretation.probes, "triples") if entry.interpretation.probes else {}
        yield Artifact("interpretation", interpretation, self.interpretation_settings(study), inputs, files)
        inputs = [base, tuned, divergence, comparison, interpretation, *data]
        yield Artifact("reports", RESULTS / "reports" / study, {}, inputs)

    def waiting(self, study: str) -> list[str]:
        """Patterns of the folders that lie behind a choice of layers that has yet to be made; none once it is."""
        if self.chosen_layers(study) is not None:
            return []
        entry = self.config.studies[study]
        found = [f"{stage}/{study}" for stage in ("comparison", "interpretation", "reports")]
        for policy in (entry.base, entry.tuned):
            data = f"{policy}.{entry.corpus}/{entry.activation}"
            found += [f"activations/{data}/layers-*", f"dictionaries/{data}/*/*/*"]
        return found

    def _corpus(self, corpus: str) -> Artifact:
        files = self._files(self.config.corpora[corpus], "source")
        return Artifact("corpora", RESULTS / "corpora" / corpus, self.corpus_settings(corpus), [], files)

    def _activations(self, study: Study, policy: str, kind: str, tokens: Path) -> Artifact:
        folder = RESULTS / "activations" / f"{policy}.{study.corpus}" / study.activation / kind
        temporary = not self.config.activations[study.activation].keep
        settings = self.activation_settings(study.activation, kind, policy)
        return Artifact("activations", folder, settings, [policy_folder(policy), tokens], temporary=temporary)

    def _dictionaries(self, study: Study, policy: str, kind: str, layer: int, name: str, tokens: Path) -> list[Artifact]:
        """The dictionaries of one recipe, behind those that they continue and what these are trained on."""
        entry, behind = self.config.dictionaries[name], []
        store = self._activations(study, policy, kind, tokens).folder
        folder = self.dictionary_folder(policy, study, kind, layer, name)
        if isinstance(entry, ExternalDictionary):
            files = {"source": entry.folder(layer, policy)}
            return [Artifact("dictionaries", folder, self.dictionary_settings(name), [store, tokens], files)]
        inputs = [store, tokens]
        if start := self.started_from(name, policy, study.corpus):
            of, corpus, continued = start
            if corpus != study.corpus:
                study_of_start, texts = study.model_copy(update={"corpus": corpus}), self._corpus(corpus)
                tokens_of_start = RESULTS / "tokens" / f"{study.model}.{corpus}"
                inputs_of_tokens = [policy_folder(study.model), texts.folder]
                behind += [texts, Artifact("tokens", tokens_of_start, self.token_settings(corpus), inputs_of_tokens)]
                behind.append(self._activations(study_of_start, of, kind, tokens_of_start))
            else:
                study_of_start, tokens_of_start = study, tokens
            behind += self._dictionaries(study_of_start, of, kind, layer, continued, tokens_of_start)
            inputs.append(behind[-1].folder)
        if entry.reads != "own":
            inputs.append(self._activations(study, study.base, kind, tokens).folder)
        return [*behind, Artifact("dictionaries", folder, self.dictionary_settings(name), inputs)]

    def started_from(self, dictionary: str, policy: str, corpus: str) -> tuple[str, str, str] | None:
        """Policy, corpus and name of the dictionaries that those of a recipe go on from; None where they start anew."""
        entry = self.config.dictionaries[dictionary]
        if isinstance(entry, ExternalDictionary) or not entry.continues:
            return None
        return policy if entry.start == "from_own" else model_of(policy), entry.continues_on or corpus, entry.continues

    def dictionaries_of(self, policy: str, study: Study) -> list[str]:
        """The recipes of a study that are trained for a policy: of those that read the rows of both, one for the tuned."""
        return [name for name in study.dictionaries if policy == study.tuned or not self.is_joint(name)]

    def is_joint(self, dictionary: str) -> bool:
        """Whether a recipe reads the rows of base and tuned together."""
        entry = self.config.dictionaries[dictionary]
        return not isinstance(entry, ExternalDictionary) and entry.reads != "own"

    @staticmethod
    def _files(entry: Entry, label: str) -> dict[str, Path]:
        path = getattr(entry, "path", None)
        return {label: Path(path)} if path else {}

    @staticmethod
    def dictionary_folder(policy: str, study: Study, kind: str, layer: int, dictionary: str) -> Path:
        """Folder of the dictionaries of one policy × layer × recipe."""
        return RESULTS / "dictionaries" / f"{policy}.{study.corpus}" / study.activation / kind / f"layer{layer}" / dictionary


def check_layers(key: str, layers: Any, count: int) -> None:
    """Compare the `layers` of a study, as plain values, with a model of `count` layers.

    Raises:
        RlsaeError: it has fewer than are asked for.
    """
    if isinstance(layers, list) and max(layers) >= count:
        raise RlsaeError(f"{key}: layer {max(layers)} is asked for, the model has layers 0 to {count - 1}")
    if isinstance(layers, dict) and layers.get("count", 0) > count:
        raise RlsaeError(f"{key}.count: {layers['count']} layers are asked for, the model has {count}")


def positional_layers(choice: Choice, count: int) -> list[int]:
    """The first or last layers of a model with `count` layers."""
    return list(range(choice.count)) if choice.order == "first" else list(range(count - choice.count, count))


def folder_layer_count(folder: Path) -> int:
    """Number of layers of a transformers folder."""
    return folder_number(folder, LAYER_KEYS, "layers")


def folder_number(folder: Path, keys: Sequence[str], what: str) -> int:
    """A number that the config.json of a transformers folder states under one of several keys.

    Raises:
        RlsaeError: the folder has no readable config.json, or it lacks them all.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RlsaeError(f"{folder} is no transformers model: it has no readable config.json") from None
    for key in keys:
        if key in content:
            return int(content[key])
    raise RlsaeError(f"{folder / 'config.json'} does not say how many {what} the model has")
