"""What is dumped and compared: activations, studies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from rlsae.config.entry import (
    ActivationName,
    CorpusName,
    DictionaryNames,
    Entry,
    LlmName,
    ModelName,
    Positive,
    Slug,
    TuningOrCheckpoint,
)
from rlsae.config.llm import AnyLlm
from rlsae.config.probes import Probes


class Activation(Entry):
    hook: Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")] = Field(
        "mlp",
        description="Output of each layer that is stored: mlp, attention, block (the residual stream), or the path of a "
        "module inside each block, for example mlp.act.",
    )
    survey_rows: Positive = Field(16_384, description="At most so many rows (tokens) of every layer, to rank layers.")
    rows: Positive = Field(65_536, description="At most so many rows (tokens) of the chosen layers, to train on.")
    rows_per_part: Annotated[int, Field(gt=0, multiple_of=1024)] = Field(
        1_048_576, description="Rows that one job dumps; parts run side by side."
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="Number format of the stored rows.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Number format of the forward pass; bfloat16 is faster and changes the third digit."
    )
    codec: Literal["blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"] | None = Field(
        None, description="Codec of numcodecs that compresses the rows; null: none, which is read fastest."
    )
    keep: bool = Field(True, description="Keep the stores; false: delete each once everything made from it is done.")


Measure = Literal[
    "weight_l2_sum",
    "weight_l2",
    "weight_l2_relative",
    "activation_l2_relative",
    "activation_cosine",
    "activation_cka",
    "activation_mean_shift",
    "activation_residual_shift",
    "activation_covariance_shift",
    "kl_swap_in",
    "kl_swap_out",
    "reward_swap_in",
    "reward_swap_out",
]
"""How far a layer moved; docs/divergence.md says what each can tell."""


class Choice(Entry):
    """Layers chosen by rank or position."""

    by: Measure = Field("weight_l2_sum", description="Measure of divergence; weight_l2_sum is the paper's.")
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


class Interventions(Entry):
    prompts: Positive = Field(128, description="Held-out prompts that every changed model answers.")
    latents: Positive = Field(10, description="Latents that go most with the reward, to intervene on beside the tagged ones.")
    random_sets: Annotated[int, Field(gt=0)] = Field(
        19, description="Random sets of equally dense latents that are ablated beside each set; 19 allow a test at 5 %."
    )
    gains: Annotated[list[float], Field(min_length=1)] = Field(
        [0.0, 0.5, 2.0, 4.0], description="What the activations of a set are multiplied by in the dose–response curve."
    )


class Interpretation(Entry):
    latents: Positive = Field(20, description="Latents explained per policy, layer and dictionary.")
    listed: dict[str, list[Annotated[int, Field(ge=0)]]] = Field(
        {}, description="Latents to explain besides, by layer/dictionary: {3/big: [17, 40]}."
    )
    examples: Positive = Field(10, description="Top activating windows per latent.")
    window: Positive = Field(16, description="Tokens per window.")
    judged_windows: Positive = Field(
        50, description="Held-out windows in which a latent fires, and as many others, on which explanations are judged."
    )
    interventions: Interventions | None = Field(
        Interventions(), description="Latents changed while the models generate; null: none."
    )
    probes: Probes | None = Field(Probes(), description="Linear probes of the latents for the reward of words; null: none.")
    task: str = Field("sentiment", description="What the feedback is about, for the question that a language model is asked.")


class InterpretationJob(Interpretation):
    """An interpretation with the language model that the study names."""

    llm: AnyLlm | None = None


class Study(Entry):
    model: ModelName = Field(description="Base model.")
    tuning: TuningOrCheckpoint = Field(description="Tuning whose effect is studied; `name@step` for a published checkpoint.")
    corpus: CorpusName = Field(description="Documents whose activations are compared.")
    activation: ActivationName = Field(description="Dump recipe.")
    layers: Layers = Field(Choice(), description="Explicit layers, `all`, a choice, or `same_as` another study.")
    dictionaries: DictionaryNames = Field(description="Dictionary recipes to train on both policies.")
    sizes: Sizes | None = Field(None, description="Which two dictionaries are the paper's small and big.")
    interpretation: Interpretation = Field(Interpretation(), description="How many latents to explain, and how.")
    llm: LlmName = Field(
        None, description="Language model that explains and judges latents besides; null: none, and nothing leaves the machine."
    )

    @field_validator("dictionaries")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is named twice")
        return names

    @property
    def base(self) -> str:
        """The base policy."""
        return self.model

    @property
    def tuned(self) -> str:
        """The tuned policy."""
        return f"{self.model}.{self.tuning}"
