"""The configuration: the single source of names, defaults, units and of `workflow/schemas/config.schema.yaml`.

A configuration has named entries in seven sections; `rlsae.expand` turns lists into families of entries before the
models below see them, so every field here holds one value.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlsae.config.dictionaries import (
    AnyDictionary,
    BatchTopKDictionary,
    Dictionary,
    ExternalDictionary,
    GatedDictionary,
    JumpReluDictionary,
    MatryoshkaDictionary,
    ReluDictionary,
    TiedReluDictionary,
    TopKDictionary,
    TopKFamily,
)
from rlsae.config.entry import RESERVED, SLUG, Entry, Slug
from rlsae.config.llm import AnyLlm, LocalLlm, OpenAiLlm
from rlsae.config.sources import (
    AnyCorpus,
    AnyModel,
    Corpus,
    FileCorpus,
    GeneratedCorpus,
    HubCorpus,
    HubModel,
    LocalModel,
    PretrainedModel,
)
from rlsae.config.studies import Activation, Choice, Interpretation, InterpretationJob, SameAs, Sizes, Study
from rlsae.config.tunings import (
    AnyReward,
    AnyTuning,
    ClassifierReward,
    DPOTuning,
    ExternalTuning,
    GroupTuning,
    GRPOTuning,
    LexiconReward,
    Lora,
    OnPolicyTuning,
    PPOTuning,
    PythonReward,
    RLOOTuning,
    Training,
    Tuning,
)

__all__ = [
    "SECTIONS",
    "SLUG",
    "Activation",
    "AnyCorpus",
    "AnyDictionary",
    "AnyLlm",
    "AnyModel",
    "AnyReward",
    "AnyTuning",
    "BatchTopKDictionary",
    "Choice",
    "ClassifierReward",
    "Config",
    "Corpus",
    "DPOTuning",
    "Dictionary",
    "Entry",
    "ExternalDictionary",
    "ExternalTuning",
    "FileCorpus",
    "GRPOTuning",
    "GatedDictionary",
    "GeneratedCorpus",
    "GroupTuning",
    "HubCorpus",
    "HubModel",
    "Interpretation",
    "InterpretationJob",
    "JumpReluDictionary",
    "LexiconReward",
    "LocalLlm",
    "LocalModel",
    "Lora",
    "MatryoshkaDictionary",
    "OnPolicyTuning",
    "OpenAiLlm",
    "PPOTuning",
    "PretrainedModel",
    "PythonReward",
    "RLOOTuning",
    "ReluDictionary",
    "SameAs",
    "Sizes",
    "Study",
    "TiedReluDictionary",
    "TopKDictionary",
    "TopKFamily",
    "Training",
    "Tuning",
]


class Config(BaseModel):
    """A whole configuration, lists expanded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpora: dict[Slug, AnyCorpus] = Field(description="Named sets of documents.")
    models: dict[Slug, AnyModel] = Field(description="Named base language models.")
    rewards: dict[Slug, AnyReward] = Field({}, description="Named rewards.")
    tunings: dict[Slug, AnyTuning] = Field(description="Named recipes that turn a base model into a tuned one.")
    activations: dict[Slug, Activation] = Field(description="Named dump recipes.")
    dictionaries: dict[Slug, AnyDictionary] = Field(description="Named sparse-autoencoder recipes.")
    llms: dict[Slug, AnyLlm] = Field({}, description="Named language models that explain latents; none is needed.")
    studies: dict[Slug, Study] = Field(description="Named comparisons; one report each.")

    @model_validator(mode="after")
    def _references_exist(self) -> Config:
        for section in SECTIONS:
            for name in getattr(self, section):
                if name in RESERVED:
                    raise ValueError(f"{section}.{name}: the name is reserved; choose another")
        for key, section, name in self._references():
            known = getattr(self, section)
            if name not in known:
                raise ValueError(f"{key}: no entry {name!r} in {section}; there are: {', '.join(known) or 'none'}")
        for name, tuning in self.tunings.items():
            if isinstance(tuning, DPOTuning):
                self._check_corpus(f"tunings.{name}.corpus", tuning.corpus, "preferences")
        for name, model in self.models.items():
            if isinstance(model, PretrainedModel):
                self._check_corpus(f"models.{name}.corpus", model.corpus, "documents")
        for name, dictionary in self.dictionaries.items():
            self._check_start(name, dictionary)
        for name, study in self.studies.items():
            self._check_study(name, study)
        return self

    def _check_start(self, name: str, dictionary: Dictionary | ExternalDictionary) -> None:
        if not isinstance(dictionary, Dictionary) or dictionary.continues is None:
            return
        other = self.dictionaries[dictionary.continues]
        if not isinstance(other, Dictionary) or other.reads != "own":
            raise ValueError(f"dictionaries.{name}.continues: {dictionary.continues} is not trained on the rows of one model")
        if dictionary.continues_on:
            self._check_corpus(f"dictionaries.{name}.continues_on", dictionary.continues_on, "documents")
        chain: list[str] = [name]
        while following := getattr(self.dictionaries[chain[-1]], "continues", None):
            if following in chain:
                raise ValueError(f"dictionaries.{name}.continues: {' → '.join([*chain, following])} go on from each other")
            chain.append(following)
        for key in ("architecture", "expansion", "normalize"):
            mine, theirs = getattr(dictionary, key), getattr(other, key)
            if mine != theirs:
                raise ValueError(
                    f"dictionaries.{name}.{key}: {mine!r} here and {theirs!r} in {dictionary.continues}, which it continues"
                )
        if missing := set(dictionary.seeds) - set(other.seeds):
            raise ValueError(
                f"dictionaries.{name}.seeds: {dictionary.continues}, which it continues, has no seed {min(missing)}"
            )

    def _check_corpus(self, key: str, corpus: str, kind: str) -> None:
        found = self.corpora[corpus].kind
        if found != kind:
            raise ValueError(f"{key}: {corpus} holds {found}, {kind} are needed; set corpora.{corpus}.kind or name another")

    def _references(self) -> list[tuple[str, str, str]]:
        """(key, section it names an entry of, name) for every reference between entries."""
        found = []
        for section in SECTIONS:
            for name, entry in getattr(self, section).items():
                for key, target in entry.marked("entry_of").items():
                    value = getattr(entry, key) or []
                    names = value if isinstance(value, list) else [value.split("@")[0]]
                    found += [(f"{section}.{name}.{key}", target, n) for n in names]
                if isinstance(entry, Study) and isinstance(entry.layers, SameAs):
                    found.append((f"{section}.{name}.layers.same_as", "studies", entry.layers.same_as))
        return found

    def _check_study(self, name: str, study: Study) -> None:
        key = f"studies.{name}"
        self._check_corpus(f"{key}.corpus", study.corpus, "documents")
        tuning, _, step = study.tuning.partition("@")
        steps = self.tunings[tuning].checkpoint_steps()
        if step and int(step) not in steps:
            raise ValueError(f"{key}.tuning: {tuning} publishes no checkpoint {step}; it publishes: {steps or 'none'}")
        if study.sizes:
            for size in (study.sizes.small, study.sizes.big):
                if size not in study.dictionaries:
                    raise ValueError(f"{key}.sizes: {size!r} is not among its dictionaries {study.dictionaries}")
        seen = [name]
        while isinstance(study.layers, SameAs):
            if study.layers.same_as in seen:
                raise ValueError(f"{key}.layers.same_as: goes round in a circle: {' → '.join(seen)}")
            seen.append(study.layers.same_as)
            study = self.studies[study.layers.same_as]


SECTIONS = ["corpora", "models", "rewards", "tunings", "activations", "dictionaries", "llms", "studies"]
