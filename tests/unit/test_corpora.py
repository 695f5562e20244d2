"""Documents from every source, their split, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from rlsae import review_grammar
from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.config import FileCorpus, GeneratedCorpus, HubCorpus, LexiconReward
from rlsae.corpora import DOCUMENTS, build_corpus, read_documents
from rlsae.errors import RlsaeError
from rlsae.rewards import Lexicon, vader_lexicon

TEXTS = ["first review", "zweite – Ünïcode", "third\ttab", "fourth"]


def jsonl(field):
    return "".join(json.dumps({field: text, "stars": 3}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def file_corpus(**changes):
    return FileCorpus(**{"source": "file", "path": "unused", "held_out": 0} | changes)


def read_file(path, content=None, **changes):
    if content is not None:
        path.write_bytes(content)
    return read_documents(file_corpus(**changes), path)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Folder of a data set in the layout of the hub, with a split for training and one for tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl("text"))
    (folder / "test.jsonl").write_text('{"text": "a test", "stars": 1}\n')
    return folder


def hub(dataset, **changes):
    return read_documents(HubCorpus(**{"source": "hub", "dataset": str(dataset), "held_out": 0} | changes))


# --- sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [lambda raw: raw, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", jsonl("text")), ("a.txt", "\n".join(TEXTS).encode())], ids=["jsonl", "txt"]
)
def test_the_lines_of_a_file_are_documents_packed_or_not(tmp_path, name, content, pack):
    path = tmp_path / (name + (".gz" if pack is gzip.compress else ""))
    assert read_file(path, pack(content)).text.tolist() == TEXTS


def test_the_rows_of_a_parquet_file_are_documents(tmp_path):
    pd.DataFrame({"text": TEXTS, "stars": 3}).to_parquet(tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet").text.tolist() == TEXTS


def test_the_text_can_stand_under_another_name(tmp_path):
    pd.DataFrame({"review": TEXTS}).to_parquet(tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet", text_field="review").text.tolist() == TEXTS
    assert read_file(tmp_path / "a.jsonl", jsonl("review"), text_field="review").text.tolist() == TEXTS


def test_empty_lines_are_no_documents(tmp_path):
    assert read_file(tmp_path / "a.txt", b"one\n\n  \ntwo\n").text.tolist() == ["one", "two"]
    assert read_file(tmp_path / "a.jsonl", b'{"text": "one"}\n\n{"text": "two"}\n\n').text.tolist() == ["one", "two"]


def test_lines_may_end_as_windows_ends_them(tmp_path):
    assert read_file(tmp_path / "a.txt", b"one\r\ntwo\r\n").text.tolist() == ["one", "two"]


def test_a_line_separator_inside_a_json_text_does_not_cut_it(tmp_path):
    content = json.dumps({"text": "one\u2028two\nthree"}, ensure_ascii=False).encode()
    assert read_file(tmp_path / "a.jsonl", content).text.tolist() == ["one\u2028two\nthree"]


def test_a_local_folder_is_read_like_a_data_set_of_the_hub(dataset):
    assert hub(dataset).text.tolist() == TEXTS
    assert hub(dataset, split="test").text.tolist() == ["a test"]
    assert hub(dataset, split="train[1:3]").text.tolist() == TEXTS[1:3]


def test_generated_reviews_are_distinct_and_labelled():
    documents = read_documents(GeneratedCorpus(source="generated", documents=500))
    assert len(documents) == documents.text.nunique() == 500
    assert set(documents.label) == {-1, 0, 1}


def test_the_lexicon_sees_what_the_grammar_meant():
    documents = read_documents(GeneratedCorpus(source="generated", documents=500))
    rewards = np.array(Lexicon(LexiconReward(kind="lexicon"))([""] * 500, documents.text.tolist()))
    assert (rewards[documents.label == 1] > 0).all()
    assert (rewards[documents.label == -1] < 0).all()


def test_the_polar_words_of_the_grammar_have_their_sign_in_the_lexicon_and_no_other_word_has_one():
    polarity = vader_lexicon()
    assert all(polarity[word] > 0 for word in review_grammar.GOOD + review_grammar.LIKED)
    assert all(polarity[word] < 0 for word in review_grammar.BAD + review_grammar.HATED)
    templates = review_grammar.OPENINGS + review_grammar.MIDDLES + review_grammar.VERDICTS
    fixed = " ".join(word for template in templates for word in template.split() if "{" not in word)
    others = fixed.split() + " ".join(word for words in review_grammar.WORDS.values() for word in words).split()
    assert not set(others) & set(polarity)


def test_the_article_before_a_vowel_is_an():
    texts = " ".join(read_documents(GeneratedCorpus(source="generated", documents=300)).text)
    assert " an a" in texts
    assert not any(f" a {vowel}" in texts for vowel in "aeiou")


# --- number, order and split -------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_documents_and_other_seeds_others():
    def of(seed):
        return read_documents(GeneratedCorpus(source="generated", documents=50, seed=seed))

    assert of(0).equals(of(0))
    assert not of(0).text.equals(of(1).text)


def test_a_corpus_can_be_thinned_and_remembers_the_place_of_each_document_in_its_source(tmp_path):
    texts = [f"review {number}" for number in range(100)]
    documents = read_file(tmp_path / "a.txt", "\n".join(texts).encode(), documents=10)
    assert len(documents) == 10
    assert documents.text.tolist() == [texts[number] for number in documents.document]
    assert documents.document.is_monotonic_increasing
    assert documents.document.tolist() != list(range(10))


def test_the_seed_draws_the_documents_of_a_thinned_corpus(tmp_path):
    content = "\n".join(f"review {number}" for number in range(100)).encode()
    drawn = [read_file(tmp_path / "a.txt", content, documents=10, seed=seed).document.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_share_of_the_documents_is_held_out_wherever_they_stand(tmp_path):
    content = "\n".join(f"review {number}" for number in range(100)).encode()
    held_out = read_file(tmp_path / "a.txt", content, held_out=0.3).held_out
    assert held_out.sum() == 30
    assert 0 < held_out[:50].sum() < 30


def test_nothing_is_held_out_where_the_share_is_zero(tmp_path):
    assert not read_file(tmp_path / "a.txt", b"one\ntwo", held_out=0).held_out.any()


def test_the_artifact_tells_its_numbers_and_not_where_its_file_lay(tmp_path):
    source = tmp_path / "secret-place.txt"
    source.write_text("\n".join(f"review {number}" for number in range(10)))
    entry = FileCorpus(source="file", path=str(source), held_out=0.2)
    build_corpus(entry, entry.settings(), tmp_path / "corpora" / "a", None, source)
    manifest = Manifest.read(tmp_path / "corpora" / "a")
    assert manifest.metrics == {"documents": 10, "held_out": 2}
    assert manifest.inputs == {"file:source": digest(source)}
    assert "secret-place" not in (tmp_path / "corpora" / "a" / MANIFEST).read_text()
    assert len(pd.read_parquet(tmp_path / "corpora" / "a" / DOCUMENTS)) == 10


def test_equal_corpora_are_equal_bytes(tmp_path):
    entry = GeneratedCorpus(source="generated", documents=50)
    for name in ("x", "y"):
        build_corpus(entry, entry.settings(), tmp_path / name / "corpora" / "a", None, None)
    for name in (MANIFEST, DOCUMENTS):
        x, y = ((tmp_path / run / "corpora" / "a" / name).read_bytes() for run in ("x", "y"))
        assert x == y


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n", r"a\.csv: expected a name that ends in \.jsonl, \.parquet or \.txt"),
        ("a.txt", b"\n\n", r"a\.txt holds no documents"),
        ("a.jsonl", b"", r"a\.jsonl holds no documents"),
        ("a.txt", b"one\ntwo \xff", r"a\.txt, document 1 \(line 2\): not valid UTF-8; convert the file first"),
        ("a.jsonl", b'{"text": "one"}\n{', r"a\.jsonl, document 1 \(line 2\): not valid JSON"),
        ("a.jsonl", b'{"body": "one", "id": 3}', r"line 1\): no key 'text'; it has: body, id; set text_field"),
        ("a.jsonl", b'["one"]', r"line 1\): expected an object, found list"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, document 0: expected a text, found int 3"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl, document 0: expected a text, found NoneType"),
        ("a.jsonl", b'{"text": "one"}\n{"text": " "}', r"a\.jsonl, document 1: the text is empty; remove it"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a readable Parquet file"),
        ("a.txt.gz", b"one", r"cannot read .*a\.txt\.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"one", mtime=0)[:-9], r"cannot read .*a\.txt\.gz"),
    ],
)
def test_a_bad_file_is_refused_with_the_document_and_what_was_expected(tmp_path, name, content, message):
    with pytest.raises(RlsaeError, match=message):
        read_file(tmp_path / name, content)


def test_a_packed_file_with_flipped_bits_is_refused(tmp_path):
    packed = bytearray(gzip.compress(jsonl("text") * 100))
    packed[20] ^= 0xFF
    with pytest.raises(RlsaeError, match=r"cannot read .*a\.jsonl\.gz"):
        read_file(tmp_path / "a.jsonl.gz", bytes(packed))


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RlsaeError, match=r"cannot read .*none\.txt"):
        read_file(tmp_path / "none.txt")


def test_a_column_that_a_parquet_file_does_not_have_is_refused_with_those_it_has(tmp_path):
    pd.DataFrame({"body": ["one"], "stars": 3}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RlsaeError, match=r"has no column 'text'; it has: body, stars; set text_field"):
        read_file(tmp_path / "a.parquet")


def test_a_missing_value_in_a_parquet_file_is_named(tmp_path):
    pd.DataFrame({"text": ["one", None]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RlsaeError, match=r"a\.parquet, document 1: expected a text, found"):
        read_file(tmp_path / "a.parquet")


def test_more_documents_than_there_are_are_refused_with_both_numbers(tmp_path):
    with pytest.raises(RlsaeError, match="documents: 3 are asked for, the source has 2; ask for fewer"):
        read_file(tmp_path / "a.txt", b"one\ntwo", documents=3)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_one_side_empty_is_refused(tmp_path, share):
    with pytest.raises(RlsaeError, match=rf"held_out: a share of {share} of 2 documents leaves one side empty"):
        read_file(tmp_path / "a.txt", b"one\ntwo", held_out=share)


def test_more_reviews_than_the_grammar_holds_are_refused(monkeypatch):
    for templates in ("OPENINGS", "MIDDLES", "VERDICTS"):
        monkeypatch.setattr(review_grammar, templates, ("the same .",))
    with pytest.raises(RlsaeError, match="documents: the grammar could not write 4 distinct reviews; ask for fewer"):
        read_documents(GeneratedCorpus(source="generated", documents=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "validation"}, r"cannot load the data set .* \(split validation\): Unknown split"),
        ({"subset": "french"}, r"cannot load the data set .*'french' not found"),
        ({"text_field": "body"}, r"has no column 'body'; it has: text, stars"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_is_named(dataset, changes, message):
    with pytest.raises(RlsaeError, match=message):
        hub(dataset, **changes)


@pytest.mark.usefixtures("dataset")
def test_a_data_set_that_cannot_be_reached_comes_with_the_way_to_fetch_it():
    with pytest.raises(RlsaeError) as caught:
        hub("nobody/nothing")
    assert str(caught.value).startswith("cannot load the data set nobody/nothing (split train) at revision main from the hub")
    assert "rlsae prefetch CONFIG" in str(caught.value)


def test_a_data_set_with_a_broken_file_is_named(dataset):
    (dataset / "train.jsonl").write_text('{"text": "one"}\n{"text": ')
    with pytest.raises(RlsaeError, match="cannot load the data set"):
        hub(dataset)
