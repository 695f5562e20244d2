"""Where texts and base models come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlsae.config.entry import CorpusName, Entry, FilePath, Positive, Seed, Share


class Corpus(Entry):
    kind: Literal["documents", "preferences"] = Field(
        "documents", description="Texts, or preference pairs of a chosen and a rejected response to a prompt."
    )
    seed: Seed = Field(0, description="Shuffles the documents and draws the held-out ones.")
    documents: Positive | None = Field(None, description="Use at most so many documents, drawn by the seed; null: all.")
    held_out: Share = Field(0.1, description="Share of documents that train nothing; scores are measured on them.")
    context_length: Positive = Field(64, description="Documents are cut after so many tokens.")
    drop_positions: Annotated[int, Field(ge=0)] = Field(
        0, description="First positions of each document that are not stored (attention sinks)."
    )


class GeneratedCorpus(Corpus):
    """Short movie reviews written by a grammar with polarity words of VADER: no file, no network.

    As preferences: one opening with two continuations, of which the one with more good words is chosen.
    """

    source: Literal["generated"]
    documents: Positive = Field(12_000, description="Number of distinct reviews to write.")


class FileCorpus(Corpus):
    """A local file: .jsonl, .parquet or .txt (one document per line), the first and last also as .gz.

    Preferences have the keys prompt, chosen and rejected, or chosen and rejected alone as whole dialogues, which are
    split at the last assistant turn (`\\n\\nAssistant:`) before they part.
    """

    source: Literal["file"]
    path: FilePath = Field(description="The file; `${VARIABLE}` is replaced from the environment.")
    text_field: str = Field("text", description="Column or key that holds the text; unused for .txt.")


class HubCorpus(Corpus):
    """A data set of the Hugging Face hub, or a local folder in its layout; preferences as in a local file."""

    source: Literal["hub"]
    dataset: str = Field(description="Repository, for example stanfordnlp/imdb, or a local folder.")
    subset: str | None = Field(None, description="Configuration name of the data set.")
    split: str = Field("train", description="Split to read.")
    revision: str | None = Field(None, description="Commit or tag; pin it for a reproducible study.")
    text_field: str = Field("text", description="Column that holds the text.")


AnyCorpus = Annotated[GeneratedCorpus | FileCorpus | HubCorpus, Field(discriminator="source")]


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

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> PretrainedModel:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} channels cannot be shared among {self.heads} heads")
        return self


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
