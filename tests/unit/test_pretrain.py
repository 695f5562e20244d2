"""A small base model and its tokenizer, trained from scratch."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from rlsae import pretrain as module
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.config import PretrainedModel
from rlsae.corpora import DOCUMENTS
from rlsae.errors import RlsaeError
from rlsae.models import build_model, load
from rlsae.pretrain import next_token_loss, pretrain, train_tokenizer
from rlsae.resumable import Stage


def entry(**changes):
    sizes = {"vocabulary": 300, "layers": 1, "width": 16, "heads": 2, "mlp_width": 32, "batch_size": 8, "steps": 6}
    return PretrainedModel(**{"source": "pretrain", "corpus": "reviews"} | sizes | changes)


def run(corpus, out, **changes):
    """Weights and metrics of a whole training."""
    with Stage("models", out, {}, {}) as stage:
        model, _, metrics = pretrain(entry(**changes), 32, corpus, stage)
    return model.state_dict(), metrics


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_tokenizer_gives_every_text_back_and_has_one_special_token():
    tokenizer = train_tokenizer(["the film is good ."] * 9, vocabulary=270)
    for text in ("the film is good .", "Ünïcode – 漢字 🎬\n\ttabs", "<|endoftext|>x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("x<|endoftext|>")["input_ids"][-1] == tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.all_special_ids == [0]


def test_the_vocabulary_is_as_large_as_asked(corpus):
    texts = pd.read_parquet(corpus / DOCUMENTS).text.tolist()
    assert len(train_tokenizer(texts, vocabulary=333)) == 333


def test_the_loss_of_documents_of_different_lengths_is_their_mean_per_token(random_model):
    model = random_model("gpt_neox")
    documents = [[5, 6, 7, 0], [9, 10, 11, 12, 13, 14, 0], [8, 0]]
    with torch.no_grad():
        together = next_token_loss(model, documents)
        alone = [next_token_loss(model, [document]) * (len(document) - 1) for document in documents]
    assert together.item() == pytest.approx(sum(alone).item() / 10, abs=1e-5)


def test_the_loss_falls_also_on_documents_that_train_nothing(corpus, tmp_path):
    _, metrics = run(corpus, tmp_path / "tiny", steps=40)
    assert metrics["loss_end"] < metrics["loss_start"] - 0.5
    assert metrics["loss_held_out"] < metrics["loss_start"] - 0.5


def test_held_out_documents_train_neither_weights_nor_tokenizer(corpus, tmp_path):
    documents = pd.read_parquet(corpus / DOCUMENTS)
    documents.loc[documents.held_out, "text"] = "xyzzy xyzzy xyzzy"
    documents.to_parquet(tmp_path / DOCUMENTS)
    weights, metrics = run(corpus, tmp_path / "a")
    other_weights, other_metrics = run(tmp_path, tmp_path / "b")
    assert equal(weights, other_weights)
    assert metrics["loss_held_out"] != other_metrics["loss_held_out"]


def test_the_held_out_loss_is_the_mean_over_all_tokens_of_the_held_out_documents(corpus, tmp_path):
    with Stage("models", tmp_path / "tiny", {}, {}) as stage:
        model, tokenizer, metrics = pretrain(entry(steps=1), 32, corpus, stage)
    documents = pd.read_parquet(corpus / DOCUMENTS)
    held_out = [[*tokenizer(text)["input_ids"][:31], 0] for text in documents.text[documents.held_out]]
    with torch.no_grad():
        total = sum(next_token_loss(model, [ids]).item() * (len(ids) - 1) for ids in held_out)
    assert metrics["loss_held_out"] == pytest.approx(total / sum(len(ids) - 1 for ids in held_out), abs=1e-5)


def test_a_corpus_without_held_out_documents_has_no_held_out_loss(corpus, tmp_path):
    pd.read_parquet(corpus / DOCUMENTS).assign(held_out=False).to_parquet(tmp_path / DOCUMENTS)
    assert run(tmp_path, tmp_path / "tiny")[1]["loss_held_out"] is None


def test_equal_seeds_give_equal_weights_and_other_seeds_others(corpus, tmp_path):
    first, again, other = (run(corpus, tmp_path / name, seed=seed)[0] for name, seed in [("a", 0), ("b", 0), ("c", 1)])
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("killed", [2, 5])
def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_bits(corpus, tmp_path, monkeypatch, killed):
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")
    steps = []

    def loss(model, batch, limit=killed):
        if len(steps) == limit:
            raise KeyboardInterrupt
        steps.append(batch)
        return next_token_loss(model, batch)

    weights, metrics = run(corpus, tmp_path / "whole")
    monkeypatch.setattr(module, "next_token_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "killed")
    assert len(steps) == killed
    monkeypatch.setattr(module, "next_token_loss", lambda model, batch: loss(model, batch, limit=99))
    resumed_weights, resumed_metrics = run(corpus, tmp_path / "killed")
    assert len(steps) == 6 + 2  # each step once, and the held-out documents in two batches
    assert equal(weights, resumed_weights)
    assert metrics == resumed_metrics


def test_a_corpus_with_fewer_documents_than_a_batch_is_refused(corpus, tmp_path):
    with pytest.raises(RlsaeError, match="batch_size: 226 documents per step, the corpus trains on 225"):
        run(corpus, tmp_path / "tiny", batch_size=226)


def test_equal_trainings_are_published_as_equal_bytes(corpus, tmp_path):
    outs = [tmp_path / run / "models" / "tiny" for run in ("x", "y")]
    for out in outs:
        build_model(entry(), entry().settings() | {"context_length": 32}, out, None, None, corpus)
    assert (outs[0] / MANIFEST).read_bytes() == (outs[1] / MANIFEST).read_bytes()
    manifest = Manifest.read(outs[0])
    assert list(manifest.inputs) == ["corpora/reviews"]
    assert manifest.metrics.keys() == {"parameters", "layers", "channels", "loss_start", "loss_end", "loss_held_out"}
    model, tokenizer = load(outs[0] / "model")
    assert model.config.max_position_embeddings == 32
    assert tokenizer.eos_token_id == model.config.eos_token_id
