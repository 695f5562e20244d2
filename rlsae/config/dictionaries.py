"""Recipes of sparse autoencoders: what all share, and what each architecture adds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlsae.config.entry import IS_PATH, Entry, Positive, Seed, Share, Slug, reference, without_braces

CROSSCODERS = ("relu", "topk", "batchtopk")
"""Architectures that can read the rows of two models side by side."""
Weight = Annotated[float, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0)]


class Dictionary(Entry):
    """What every trained dictionary has; docs/dictionaries.md says how losses are scaled."""

    architecture: str = Field(description="File of rlsae/sae/ that defines it.")
    expansion: PositiveNumber = Field(1.0, description="Latents per channel.")
    normalize: bool = Field(True, description="Centre and scale rows by the store's statistics; folded on export.")
    learning_rate: PositiveNumber = Field(1e-3, description="Peak learning rate of Adam.")
    epochs: Positive = Field(4, description="Passes over the training rows.")
    batch_rows: Positive = Field(1024, description="Rows per optimizer step.")
    warmup_share: Share = Field(0.05, description="Share of the run with rising learning rate.")
    decay_share: Share = Field(0.2, description="Share of the run, at its end, with falling learning rate.")
    sparsity_warmup_share: Share = Field(
        0.0,
        description="Share of the run over which the weight of the sparsity rises, or k falls from the channels to its value.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of the factors of matrix products; weights, sums and the optimizer are float32. bfloat16 is faster on "
        "GPUs, and on CPUs with instructions for it.",
    )
    max_grad_norm: PositiveNumber | None = Field(
        0.01,
        description="Gradient clipping; null: none. Most steps exceed the default, so that early ones weigh no more in Adam's "
        "moments than late ones.",
    )
    start: Literal["shared", "independent", "from_base", "from_own"] = Field(
        "shared",
        description="What base and tuned of one seed start from: the same random weights, random weights of their own, or "
        "autoencoders of another dictionary, named by `continues`: the base's for both, or each its own.",
    )
    continues: Annotated[Slug | None, reference("dictionaries")] = Field(
        None, description="Dictionary whose autoencoders are trained on, with start: from_base or from_own."
    )
    continues_on: Annotated[Slug | None, reference("corpora")] = Field(
        None, description="Corpus on which that dictionary is trained; null: the study's."
    )
    reads: Literal["own", "both", "difference"] = Field(
        "own",
        description="Rows that it learns from: those of one policy, so that base and tuned have a dictionary each; both side "
        "by side, which makes one crosscoder of both; or the difference tuned - base.",
    )
    seeds: list[Seed] = Field([0, 1], min_length=1, description="One sparse autoencoder each, from one read of the rows.")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("the same seed twice is no replication")
        return seeds

    @model_validator(mode="after")
    def _start_is_named(self) -> Self:
        goes_on = self.start in ("from_base", "from_own")
        if goes_on != (self.continues is not None):
            raise ValueError("start: from_base or from_own and continues: NAME OF A DICTIONARY belong together")
        if self.continues_on and not goes_on:
            raise ValueError("continues_on: names the corpus of the dictionary that is continued; continues is missing")
        if self.reads != "own" and goes_on:
            raise ValueError(
                f"start: {self.start} goes on from a dictionary of the base's rows; with reads: {self.reads} there is none"
            )
        if self.reads == "both" and self.architecture not in CROSSCODERS:
            raise ValueError(f"reads: both needs one of the architectures {', '.join(CROSSCODERS)}, found {self.architecture}")
        return self


class TiedReluDictionary(Dictionary):
    """The paper's autoencoder (arXiv 2310.08164): tied weights, ReLU, L1."""

    architecture: Literal["tied_relu"] = Field("tied_relu", description="Tied weights, ReLU, L1; where the key is missing.")
    l1: Weight = Field(1e-2, description="Weight of the L1 norm beside the mean-square error per channel.")
    learning_rate: PositiveNumber = Field(5e-3, description="Peak learning rate of Adam.")
    max_grad_norm: PositiveNumber | None = Field(None, description="Gradient clipping; null: none.")


class ReluDictionary(Dictionary):
    """ReLU and L1 weighted by the norm of the decoder."""

    architecture: Literal["relu"] = Field(description="ReLU and an L1 norm weighted by that of the decoder.")
    l1: Weight = Field(0.1, description="Weight of the L1 norm beside the squared error.")
    shared_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of a crosscoder's latents that are designated as shared: their decoders are held equal."
    )
    shared_penalty: Annotated[float, Field(ge=0, le=1)] = Field(0.15, description="Their l1, as a share of that of the others.")
    sparsity_warmup_share: Share = Field(0.1, description="Share of the run over which l1 rises to its value.")

    @model_validator(mode="after")
    def _shared_by_two(self) -> Self:
        if self.shared_share and self.reads != "both":
            raise ValueError("shared_share: only a crosscoder (reads: both) has latents that two models share")
        return self


class TopKFamily(Dictionary):
    """What the architectures have that keep a fixed number of latents."""

    k: Positive = Field(32, description="Active latents per row; of batchtopk and matryoshka on average.")
    auxk_weight: Weight = Field(1 / 32, description="Weight of the loss by which dead latents learn the residual.")
    dead_rows: Positive = Field(100_000, description="Rows without firing after which a latent counts as dead.")


class TopKDictionary(TopKFamily):
    """The k largest latents of each row (arXiv 2406.04093)."""

    architecture: Literal["topk"] = Field(description="The k largest latents of each row.")


class BatchTopKDictionary(TopKFamily):
    """The k × rows largest latents of a batch (arXiv 2412.06410)."""

    architecture: Literal["batchtopk"] = Field(description="The k × rows largest latents of each batch.")


class MatryoshkaDictionary(TopKFamily):
    """BatchTopK whose first latents must do without the later ones (arXiv 2503.17547)."""

    architecture: Literal["matryoshka"] = Field(description="As batchtopk, with a loss for each prefix of the dictionary.")
    prefixes: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.0625, 0.125, 0.25, 0.5, 1.0],
        description="Rising shares of the latents that reconstruct without the rest; ends with 1.",
    )

    @field_validator("prefixes")
    @classmethod
    def _rise_to_one(cls, prefixes: list[float]) -> list[float]:
        if sorted(set(prefixes)) != prefixes or prefixes[-1:] != [1.0]:
            raise ValueError("shares must rise and end with 1")
        return prefixes


class JumpReluDictionary(Dictionary):
    """A threshold for each latent, trained towards a number of active latents (arXiv 2407.14435)."""

    architecture: Literal["jumprelu"] = Field(description="A learned threshold for each latent.")
    l0: PositiveNumber = Field(32.0, description="Active latents per row that the thresholds aim at.")
    l0_weight: Weight = Field(1.0, description="Weight of the squared relative distance from that number.")
    bandwidth: PositiveNumber = Field(0.1, description="Width around a threshold in which values give it a gradient.")
    sparsity_warmup_share: Share = Field(0.5, description="Share of the run over which l0_weight rises to its value.")


class GatedDictionary(Dictionary):
    """Which latents are active, and how much, decided apart (arXiv 2404.16014)."""

    architecture: Literal["gated"] = Field(description="A gate and a magnitude for each latent.")
    l1: Weight = Field(0.1, description="Weight of the gates' L1 norm beside the squared error.")
    sparsity_warmup_share: Share = Field(0.1, description="Share of the run over which l1 rises to its value.")


class ExternalDictionary(Entry):
    """An autoencoder from elsewhere: scored and compared, not trained."""

    architecture: Literal["external"] = Field(description="An autoencoder from elsewhere; it is not trained.")
    path: Annotated[str, IS_PATH] = Field(
        description="Folder of SAELens, dictionary_learning or sparsify; {layer} and {policy} in it stand for theirs."
    )

    @field_validator("path")
    @classmethod
    def _placeholders_are_known(cls, path: str) -> str:
        try:
            without_braces(path.format(layer=0, policy=""))
        except (KeyError, IndexError, ValueError):
            raise ValueError("only {layer} and {policy} may stand in braces") from None
        return path

    def folder(self, layer: int | str, policy: str) -> Path:
        """The folder of one layer and policy."""
        return Path(self.path.format(layer=layer, policy=policy))


def _default_architecture(value: Any) -> Any:
    return {"architecture": "tied_relu", **value} if isinstance(value, dict) else value


AnyDictionary = Annotated[
    TiedReluDictionary
    | ReluDictionary
    | TopKDictionary
    | BatchTopKDictionary
    | JumpReluDictionary
    | GatedDictionary
    | MatryoshkaDictionary
    | ExternalDictionary,
    Field(discriminator="architecture"),
    BeforeValidator(_default_architecture),
]
