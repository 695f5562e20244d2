"""The configuration: the single source of names, defaults, units and of `workflow/schemas/config.schema.yaml`.

A configuration has named entries in seven sections; `rlsae.expand` turns lists into families of entries before the
models below see them, so every field here holds one value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

SLUG = r"[a-z0-9]+(-[a-z0-9]+)*"
Slug = Annotated[str, Field(pattern=f"^{SLUG}$")]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
IS_PATH = Field(json_schema_extra={"file": True})
"""Metadata of a path on this machine: never part of a manifest; the file's digest is."""
FilePath = Annotated[str, IS_PATH]


def reference(section: str) -> Any:
    """Metadata of a field that names an entry of `section`."""
    return Field(json_schema_extra={"entry_of": section})


CorpusName = Annotated[Slug, reference("corpora")]
ModelName = Annotated[Slug, reference("models")]
RewardName = Annotated[Slug, reference("rewards")]
TuningOrCheckpoint = Annotated[str, Field(pattern=rf"^{SLUG}(@[1-9]\d*)?$"), reference("tunings")]
ActivationName = Annotated[Slug, reference("activations")]
DictionaryNames = Annotated[list[Slug], Field(min_length=1), reference("dictionaries")]

RESERVED = {"index", "paper"}


class Entry(BaseModel):
    """One named entry of a section. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def marked(cls, mark: str) -> dict[str, Any]:
        """Fields marked as `file` (a path on this machine) or `entry_of` (a reference), with the mark's value."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {name: extra[mark] for name, extra in extras.items() if isinstance(extra, dict) and mark in extra}

    def settings(self) -> dict[str, Any]:
        """What shapes the artifact, as plain JSON values: every field but the paths of this machine."""
        return self.model_dump(mode="json", exclude=set(self.marked("file")))


# --- corpora -----------------------------------------------------------------------------------------------------


class Corpus(Entry):
    seed: Seed = Field(0, description="Shuffles the documents and draws the held-out ones.")
    documents: Positive | None = Field(None, description="Use at most so many documents, drawn by the seed; null: all.")
    held_out: Share = Field(0.1, description="Share of documents that train nothing; scores are measured on them.")
    context_length: Positive = Field(64, description="Documents are cut after so many tokens.")
    drop_positions: Annotated[int, Field(ge=0)] = Field(
        0, description="First positions of each document that are not stored (attention sinks)."
    )


class GeneratedCorpus(Corpus):
    """Short movie reviews written by a grammar with polarity words of VADER: no file, no network."""

    source: Literal["generated"]
    documents: Positive = Field(12_000, description="Number of distinct reviews to write.")


class FileCorpus(Corpus):
    """A local file: .jsonl, .parquet or .txt (one document per line), each also as .gz."""

    source: Literal["file"]
    path: FilePath = Field(description="The file; `${VARIABLE}` is replaced from the environment.")
    text_field: str = Field("text", description="Column or key that holds the text; unused for .txt.")


class HubCorpus(Corpus):
    """A data set of the Hugging Face hub, or a local folder in its layout."""

    source: Literal["hub"]
    dataset: str = Field(description="Repository, for example stanfordnlp/imdb, or a local folder.")
    subset: str | None = Field(None, description="Configuration name of the data set.")
    split: str = Field("train", description="Split to read.")
    revision: str | None = Field(None, description="Commit or tag; pin it for a reproducible study.")
    text_field: str = Field("text", description="Column that holds the text.")


AnyCorpus = Annotated[GeneratedCorpus | FileCorpus | HubCorpus, Field(discriminator="source")]


# --- models ------------------------------------------------------------------------------------------------------


class PretrainedModel(Entry):
    """A small GPT-NeoX with its own byte-level BPE, trained here from scratch."""

    source: Literal["pretrain"]
    corpus: CorpusName = Field(description="Corpus whose not held-out documents train it.")
    seed: Seed = Field(0, description="Initial weights and order of the documents.")
    vocabulary: Annotated[int, Field(ge=260)] = Field(1024, description="Size of the BPE vocabulary.")
    layers: Positive = Field(4, description="Number of blocks.")
    width: Positive = Field(128, description="Model width (channels of the residual stream).")
    heads: Positive = Field(4, description="Attention heads per block.")
    mlp_width: Positive = Field(512, description="Hidden width of each MLP.")
    steps: Positive = Field(300, description="Optimizer steps.")
    batch_size: Positive = Field(32, description="Documents per step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-3, description="Peak learning rate (cosine to zero).")


class LocalModel(Entry):
    """A folder that transformers can load: config, safetensors weights, tokenizer."""

    source: Literal["path"]
    path: FilePath = Field(description="The folder; `${VARIABLE}` is replaced from the environment.")


class HubModel(Entry):
    """A causal language model of the Hugging Face hub."""

    source: Literal["hub"]
    repository: str = Field(description="Repository, for example EleutherAI/pythia-70m.")
    revision: str = Field("main", description="Commit or tag; pin it for a reproducible study.")


AnyModel = Annotated[PretrainedModel | LocalModel | HubModel, Field(discriminator="source")]


# --- rewards and tunings -----------------------------------------------------------------------------------------


class LexiconReward(Entry):
    """Sum of the polarity of a text's words, scaled and clipped (arXiv 2310.08164 section 3.1)."""

    kind: Literal["lexicon"]
    path: Annotated[str | None, IS_PATH] = Field(
        None, description="Tab-separated word and polarity per line; null: VADER's lexicon."
    )
    scale: float = Field(0.2, description="The sum of polarities is multiplied by this.")
    clip: Annotated[float, Field(gt=0)] = Field(10.0, description="Rewards are clipped to ± this.")
    scope: Literal["response", "full"] = Field("response", description="Score the response, or prompt and response.")


class PythonReward(Entry):
    """A function of your own: `(prompts: list[str], responses: list[str]) -> list[float]`."""

    kind: Literal["python"]
    path: FilePath = Field(description="The Python file that defines the function.")
    function: str = Field("reward", description="Name of the function in that file.")


AnyReward = Annotated[LexiconReward | PythonReward, Field(discriminator="kind")]

Range = tuple[Positive, Positive]


class PPOTuning(Entry):
    """Proximal policy optimisation (arXiv 1707.06347) with a KL penalty to the base (arXiv 1909.08593)."""

    method: Literal["ppo"]
    reward: RewardName = Field(description="Entry of `rewards` to maximise.")
    corpus: CorpusName = Field(description="Corpus whose documents are cut into prompts; held-out ones serve the evaluation.")
    seed: Seed = Field(0, description="Prompts, sampling and value head.")
    batches: Positive = Field(24, description="Rollout batches.")
    batch_size: Positive = Field(128, description="Responses per rollout batch.")
    minibatch_size: Positive = Field(32, description="Responses per optimizer step.")
    epochs: Positive = Field(2, description="Passes over each rollout batch.")
    learning_rate: Annotated[float, Field(ge=0)] = Field(5e-4, description="Peak learning rate of the policy.")
    value_learning_rate: Annotated[float, Field(ge=0)] = Field(1e-3, description="Peak learning rate of the value head.")
    warmup_batches: Annotated[int, Field(ge=0)] = Field(2, description="Rollout batches of linear warm-up.")
    kl_coefficient: Annotated[float, Field(ge=0)] = Field(0.2, description="Initial weight of the KL penalty.")
    kl_target: Annotated[float, Field(gt=0)] | None = Field(
        6.0, description="Nats per response that the adaptive coefficient aims at; null: fixed coefficient."
    )
    kl_horizon: Positive = Field(1000, description="Responses over which the coefficient adapts.")
    clip: Annotated[float, Field(gt=0)] = Field(0.2, description="Clip range of the policy ratio.")
    value_clip: Annotated[float, Field(gt=0)] = Field(0.2, description="Clip range of the value change.")
    value_coefficient: Annotated[float, Field(ge=0)] = Field(0.1, description="Weight of the value loss.")
    discount: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Discount γ per token.")
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = Field(0.95, description="λ of the advantage estimate.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient clipping.")
    query_tokens: Range = Field((2, 10), description="Shortest and longest prompt, in tokens.")
    response_tokens: Range = Field((8, 20), description="Shortest and longest response, in tokens.")
    checkpoints: Annotated[int, Field(ge=0)] = Field(0, description="Evenly spaced moments published on the way.")
    evaluation_prompts: Positive = Field(512, description="Held-out prompts of the evaluation.")

    @model_validator(mode="after")
    def _fits(self) -> PPOTuning:
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of minibatch_size {self.minibatch_size}")
        for key in ("query_tokens", "response_tokens"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}: shortest {low} exceeds longest {high}")
        if self.checkpoints >= self.batches:
            raise ValueError(f"checkpoints: {self.checkpoints} moments need more than {self.batches} batches")
        return self

    def checkpoint_steps(self) -> list[int]:
        """Rollout batches after which a checkpoint is published."""
        return [round(self.batches * k / (self.checkpoints + 1)) for k in range(1, self.checkpoints + 1)]


# --- activations, dictionaries, studies --------------------------------------------------------------------------


class Activation(Entry):
    hook: Literal["mlp", "attention", "block"] = Field("mlp", description="Output of each layer that is stored.")
    survey_rows: Positive = Field(16_384, description="At most so many rows (tokens) of every layer, to rank layers.")
    rows: Positive = Field(65_536, description="At most so many rows (tokens) of the chosen layers, to train on.")
    rows_per_part: Annotated[int, Field(gt=0, multiple_of=1024)] = Field(
        1_048_576, description="Rows that one job dumps; parts run side by side."
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="Number format of the stored rows.")
    keep: bool = Field(True, description="Keep the stores; false: delete each once everything made from it is done.")


class Dictionary(Entry):
    architecture: Literal["tied_relu"] = Field("tied_relu", description="File of rlsae/sae/ that defines it.")
    expansion: Annotated[float, Field(gt=0)] = Field(1.0, description="Latents per channel.")
    l1: Annotated[float, Field(ge=0)] = Field(
        1e-2, description="Weight of the L1 norm beside the mean-square error per channel."
    )
    normalize: bool = Field(True, description="Centre and scale rows by the store's statistics; folded on export.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-3, description="Peak learning rate of Adam.")
    epochs: Positive = Field(4, description="Passes over the training rows.")
    batch_rows: Positive = Field(1024, description="Rows per optimizer step.")
    warmup_share: Share = Field(0.05, description="Share of the run with rising learning rate.")
    decay_share: Share = Field(0.2, description="Share of the run, at its end, with falling learning rate.")
    seeds: list[Seed] = Field([0, 1], min_length=1, description="One sparse autoencoder each, from one read of the rows.")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("the same seed twice is no replication")
        return seeds


class Choice(Entry):
    """Layers chosen by rank or position."""

    by: Literal["weight_l2_sum", "weight_l2_relative", "activation_l2_relative"] = Field(
        "weight_l2_sum", description="Measure of divergence; weight_l2_sum is the paper's."
    )
    order: Literal["highest", "lowest", "first", "last"] = Field("highest", description="Which end of the ranking.")
    count: Positive = Field(2, description="Number of layers.")


class SameAs(Entry):
    """The layers of another study, so that both compare the same ones."""

    same_as: Slug = Field(description="Study whose layers are taken over.")


def _layers_variant(value: Any) -> str:
    """Which form of `layers` was written, so that a mistake is explained in terms of that form alone."""
    if isinstance(value, SameAs) or (isinstance(value, dict) and "same_as" in value):
        return "<same_as>"
    if isinstance(value, Choice | dict):
        return "<choice>"
    return "<list>" if isinstance(value, list) else "<all>"


Layers = Annotated[
    Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), Tag("<list>")]
    | Annotated[Literal["all"], Tag("<all>")]
    | Annotated[Choice, Tag("<choice>")]
    | Annotated[SameAs, Tag("<same_as>")],
    Discriminator(_layers_variant),
]


class Sizes(Entry):
    """The paper's small and big dictionary, between which it matches latents."""

    small: Slug = Field(description="One of the study's dictionaries.")
    big: Slug = Field(description="Another one, with more latents.")


class Interpretation(Entry):
    latents: Positive = Field(20, description="Latents explained per policy, layer and dictionary.")
    examples: Positive = Field(10, description="Top activating windows per latent.")
    window: Positive = Field(16, description="Tokens per window.")
    top_tokens: Positive = Field(8, description="Tokens that the explanation names.")


class Study(Entry):
    model: ModelName = Field(description="Base model.")
    tuning: TuningOrCheckpoint = Field(description="Tuning whose effect is studied; `name@step` for a published checkpoint.")
    corpus: CorpusName = Field(description="Documents whose activations are compared.")
    activation: ActivationName = Field(description="Dump recipe.")
    layers: Layers = Field(Choice(), description="Explicit layers, `all`, a choice, or `same_as` another study.")
    dictionaries: DictionaryNames = Field(description="Dictionary recipes to train on both policies.")
    sizes: Sizes | None = Field(None, description="Which two dictionaries are the paper's small and big.")
    interpretation: Interpretation = Field(Interpretation(), description="How many latents to explain, and how.")

    @property
    def base(self) -> str:
        """The base policy."""
        return self.model

    @property
    def tuned(self) -> str:
        """The tuned policy."""
        return f"{self.model}.{self.tuning}"


class Config(BaseModel):
    """A whole configuration, lists expanded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpora: dict[Slug, AnyCorpus] = Field(description="Named sets of documents.")
    models: dict[Slug, AnyModel] = Field(description="Named base language models.")
    rewards: dict[Slug, AnyReward] = Field({}, description="Named rewards.")
    tunings: dict[Slug, PPOTuning] = Field(description="Named recipes that turn a base model into a tuned one.")
    activations: dict[Slug, Activation] = Field(description="Named dump recipes.")
    dictionaries: dict[Slug, Dictionary] = Field(description="Named sparse-autoencoder recipes.")
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
        for name, study in self.studies.items():
            self._check_study(name, study)
        return self

    def _references(self) -> list[tuple[str, str, str]]:
        """(key, section it names an entry of, name) for every reference between entries."""
        found = []
        for section in SECTIONS:
            for name, entry in getattr(self, section).items():
                for key, target in entry.marked("entry_of").items():
                    value = getattr(entry, key)
                    names = value if isinstance(value, list) else [value.split("@")[0]]
                    found += [(f"{section}.{name}.{key}", target, n) for n in names]
                if isinstance(entry, Study) and isinstance(entry.layers, SameAs):
                    found.append((f"{section}.{name}.layers.same_as", "studies", entry.layers.same_as))
        return found

    def _check_study(self, name: str, study: Study) -> None:
        key = f"studies.{name}"
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


SECTIONS = ["corpora", "models", "rewards", "tunings", "activations", "dictionaries", "studies"]
