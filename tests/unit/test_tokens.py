"""A corpus through a tokenizer: order, length, held-out documents and dropped positions."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from small_artifacts import write_policy

from rlsae.activations.tokens import STORE, Tokens, build_tokens
from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.config import FileCorpus
from rlsae.corpora import DOCUMENTS, build_corpus
from rlsae.errors import RlsaeError


@pytest.fixture(scope="module")
def base(random_model, tokenizer, tmp_path_factory):
    """Artifact of a model whose context holds 64 tokens."""
    return write_policy(tmp_path_factory.mktemp("base") / "models" / "tiny", random_model("gpt2"), tokenizer)


@pytest.fixture
def build(base, corpus, tmp_path):
    """Function of settings: folder of the tokens artifact made with them."""
    count = iter(range(100))

    def tokens(**settings):
        out = tmp_path / str(next(count)) / "tokens" / "tiny.reviews"
        build_tokens({"seed": 0, "context_length": 64, "drop_positions": 0} | settings, out, None, base, corpus)
        return out

    return tokens


@pytest.fixture
def documents(corpus):
    return pd.read_parquet(corpus / DOCUMENTS).set_index("document")


def numbers(folder):
    """Number in the corpus of each document, in the order of the tokens."""
    import zarr

    return zarr.open_group(folder / STORE, mode="r")["document"][:]


def test_the_ids_of_a_document_are_those_of_its_text(build, documents, tokenizer):
    folder = build()
    tokens = Tokens.open(folder)
    for place, number in enumerate(numbers(folder)):
        assert tokens.ids(place).tolist() == tokenizer(documents.text[number])["input_ids"][:64]


def test_every_document_is_there_once_in_a_shuffled_order(build, documents):
    order = numbers(build())
    assert sorted(order) == sorted(documents.index)
    assert np.abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3


def test_the_order_depends_on_the_seed_of_the_corpus_alone(build):
    assert np.array_equal(numbers(build()), numbers(build(context_length=8, drop_positions=2)))
    assert not np.array_equal(numbers(build()), numbers(build(seed=1)))


def test_a_document_is_cut_after_the_context_length(build):
    whole, cut = Tokens.open(build()), Tokens.open(build(context_length=8))
    assert max(np.diff(whole.start)) > 8
    for document in range(len(whole.held_out)):
        assert cut.ids(document).tolist() == whole.ids(document)[:8].tolist()


def test_a_held_out_document_stays_held_out_wherever_the_shuffle_puts_it(build, documents):
    folder = build()
    held_out = Tokens.open(folder).held_out
    assert held_out.sum() == 75
    assert np.array_equal(held_out, documents.held_out[numbers(folder)])


def test_held_out_documents_are_spread_over_the_shuffled_order(base, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"the film number {number} was good\n" for number in range(400)))
    entry = FileCorpus(source="file", path=str(texts), held_out=0.25, seed=0)
    build_corpus(entry, entry.settings(), tmp_path / "corpora" / "texts", None, texts)
    out = tmp_path / "tokens" / "tiny.texts"
    settings = {"seed": 0, "context_length": 64, "drop_positions": 0}  # the corpus's own seed, as in a study
    build_tokens(settings, out, None, base, tmp_path / "corpora" / "texts")
    for quarter in np.split(Tokens.open(out).held_out, 4):
        assert 0.1 < quarter.mean() < 0.4


def test_dropped_positions_give_no_rows_and_are_counted(build):
    folder = build(drop_positions=7)
    tokens, metrics = Tokens.open(folder), Manifest.read(folder).metrics
    lengths = np.diff(tokens.start)
    assert np.array_equal(np.diff(tokens.row_start()), [max(0, length - 7) for length in lengths])
    assert metrics["rows"] == tokens.row_start()[-1]
    assert metrics["dropped_rows"] == sum(min(7, length) for length in lengths)
    assert metrics["rows"] + metrics["dropped_rows"] == len(tokens.token[:])
    assert metrics["documents"] == 300


def test_without_dropped_positions_every_token_has_a_row(build):
    folder = build()
    tokens = Tokens.open(folder)
    assert np.array_equal(tokens.row_start(), tokens.start)
    assert Manifest.read(folder).metrics["dropped_rows"] == 0


def test_dropping_all_positions_is_refused_with_the_key(build):
    with pytest.raises(RlsaeError, match="drop_positions: no document has more than 8 tokens; lower it"):
        build(context_length=8, drop_positions=8)


def test_a_context_longer_than_the_models_is_refused_with_both_lengths(build, tmp_path):
    with pytest.raises(RlsaeError, match="context_length: 65 tokens, the model's context holds 64"):
        build(context_length=65)
    assert not list(tmp_path.rglob(MANIFEST))


def test_two_builds_give_equal_bytes(build):
    first, second = build(), build()
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()
    assert digest(first / "store") == digest(second / "store")


def test_the_manifest_names_the_model_and_the_corpus_and_counts_the_bytes(build):
    folder = build()
    manifest = Manifest.read(folder)
    assert set(manifest.inputs) == {"models/tiny", "corpora/reviews"}
    assert manifest.parameters == {"seed": 0, "context_length": 64, "drop_positions": 0}
    assert manifest.metrics["bytes"] == sum(p.stat().st_size for p in (folder / "store").rglob("*") if p.is_file())


def test_plain_zarr_reads_the_documented_arrays_without_this_package(build):
    folder = build()
    code = """if True:
        import json, sys, zarr
        group = zarr.open_group(sys.argv[1], mode="r")
        arrays = {n: [str(a.dtype), list(a.metadata.dimension_names)] for n, a in group.arrays()}
        print(json.dumps([arrays, "rlsae" in sys.modules, int(group["start"][-1]), group["token"].shape[0]]))
    """
    command = [sys.executable, "-c", code, str(folder / STORE)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ, cwd="/")
    arrays, uses_this_package, end, length = json.loads(result.stdout)
    assert arrays == {
        "token": ["int32", ["token"]],
        "start": ["int64", ["document_edge"]],
        "document": ["int32", ["document"]],
        "held_out": ["bool", ["document"]],
    }
    assert not uses_this_package
    assert end == length


def test_a_folder_without_tokens_is_named_with_its_stage(tmp_path):
    with pytest.raises(RlsaeError, match="holds no tokens; run the tokens stage"):
        Tokens.open(tmp_path)
