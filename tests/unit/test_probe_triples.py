"""Contrastive triples: one context, and a good, a bad and a neutral word in its last place."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from rlsae.config.probes import Probes
from rlsae.corpora import DOCUMENTS
from rlsae.errors import RlsaeError
from rlsae.interpretation.probes.spans import response_spans, target_span
from rlsae.interpretation.probes.triple_file import read_triples
from rlsae.interpretation.probes.triples import COLUMNS, VARIANTS, build_triples, first_target, outer_quartiles
from rlsae.interpretation.probes.wording import Wording, words_of
from rlsae.rewards import WORD, vader_lexicon

POLARITY = {"lovely": 3.0, "superb": 2.8, "fine": 0.5, "dull": -0.5, "awful": -2.9, "dreadful": -3.0}
OUTER = outer_quartiles(POLARITY)
NOUNS = [f"{a}{b}" for a in ("film", "song", "play", "book", "tale") for b in ("man", "men", "let", "ster", "ling", "ing")]
LIMIT = 64


def documents(texts, held_out=True):
    return pd.DataFrame({"document": range(len(texts)), "text": texts, "held_out": held_out})


def reviews(number=200, seed=0):
    """Sentences of one pattern, whose adjectives are good, bad or neither."""
    rng = np.random.default_rng(seed)
    adjectives = ["lovely", "superb", "awful", "dreadful", "purple", "modern", "short", "spoken"]
    return [
        f"We said that the {rng.choice(NOUNS)} was a {rng.choice(adjectives)} one. The rest was {rng.choice(adjectives)} too."
        for _ in range(number)
    ]


def build(texts, tokenizer, polarity=POLARITY, limit=LIMIT, **settings):
    table = texts if isinstance(texts, pd.DataFrame) else documents(texts)
    return build_triples(Probes(**settings), table, polarity, tokenizer, limit)


@pytest.fixture
def real(corpus, tokenizer):
    """Triples of the generated reviews and the VADER lexicon."""
    return build(pd.read_parquet(corpus / DOCUMENTS), tokenizer, vader_lexicon())


# --- the words of a triple ---------------------------------------------------------------------------------------


def test_outer_words_are_those_of_the_outer_quarters_that_have_the_sign_of_their_side():
    assert outer_quartiles({"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.5, "e": 0.1}) == {"a": 3.0, "b": 2.0}
    assert set(OUTER) == {"lovely", "superb", "awful", "dreadful"}


def test_signs_of_a_lexicon_that_are_no_words_are_left_out():
    assert outer_quartiles({":)": 3.0, "good": 3.0, "bad": -3.0, "x(": -3.0}) == {"good": 3.0, "bad": -3.0}


def test_every_triple_has_a_good_a_bad_and_a_neutral_word(real):
    lexicon = vader_lexicon()
    outer = outer_quartiles(lexicon)
    assert len(real.table) > 30
    for row in real.table.itertuples():
        assert outer[row.positive.lower()] == row.polarity_positive > 0
        assert outer[row.negative.lower()] == row.polarity_negative < 0
        assert row.neutral.lower() not in lexicon


def test_one_of_the_words_is_that_of_the_document_and_the_others_occur_in_the_corpus(corpus, real):
    texts = pd.read_parquet(corpus / DOCUMENTS).set_index("document").text
    seen = {word for text in texts for word in WORD.findall(text.lower())}
    for row in real.table.itertuples():
        assert any(f"{row.context} {getattr(row, name)}" in " ".join(texts[row.document].split()) for name in VARIANTS[:2])
        assert {row.positive.lower(), row.negative.lower(), row.neutral.lower()} <= seen


def test_the_context_ends_before_the_first_word_of_the_lexicons_outer_quarters(real):
    outer = outer_quartiles(vader_lexicon())
    assert all(not outer.keys() & set(WORD.findall(context.lower())) for context in real.table.context)


def test_only_held_out_documents_give_contexts_at_most_one_each(corpus, real):
    held_out = set(pd.read_parquet(corpus / DOCUMENTS).query("held_out").document)
    assert set(real.table.document) <= held_out
    assert real.table.document.is_unique


def test_the_words_of_a_triple_are_used_alike(tokenizer):
    """Adjectives stand for adjectives, although nouns are of nearer frequency."""
    table = build(reviews(), tokenizer).table
    assert set(table.neutral) <= {"purple", "modern", "short", "spoken", "said", "rest", "too", "one", *NOUNS}
    assert table.neutral.isin(["purple", "modern", "short", "spoken"]).mean() > 0.3


def test_likeness_is_that_of_the_words_before_and_after():
    wording = Wording.of(["a lovely day. a dreadful day. the noun, it runs"] * 3, set(OUTER), set(POLARITY))
    assert wording.alike("lovely", "nothing", ["lovely", "dreadful"], 2) == ["lovely", "dreadful"]
    likeness = wording.use_WN @ wording.use_WN[wording.row["lovely"]]
    assert likeness[wording.row["dreadful"]] > 0.5
    assert likeness[wording.row["runs"]] == 0


def test_a_word_that_is_seen_once_is_less_like_any_than_one_that_is_often_used_so():
    wording = Wording.of([*["a lovely day"] * 9, *["a awful day"] * 9, "a superb day"], set(OUTER), set(POLARITY))
    assert wording.alike("lovely", "the", ["superb", "awful"], 1) == ["awful"]


def test_words_that_the_corpus_has_after_the_word_before_go_first():
    wording = Wording.of(["very superb day", "a lovely day", "a dreadful day", "a awful day"], set(OUTER), set(POLARITY))
    assert wording.alike("lovely", "very", ["dreadful", "superb"], 1) == ["superb"]
    assert wording.alike("lovely", "the", ["dreadful", "superb"], 1) == ["dreadful"]


def test_a_mark_between_words_ends_what_they_say_of_each_other():
    assert words_of('Well, he said: "go"') == ["", "well", "", "he", "said", "", "go"]


@pytest.mark.parametrize(("word", "cased"), [("lovely", str.lower), ("Lovely", str.capitalize), ("LOVELY", str.upper)])
def test_the_words_have_the_case_of_the_original(tokenizer, word, cased):
    texts = [f"We said it was a {word} day for us", *reviews()]
    row = build(documents(texts, [True] + [False] * 200), tokenizer).table.iloc[0]
    assert [row[name] for name in VARIANTS] == [cased(row[name]) for name in VARIANTS]


# --- where a context is found ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "context", "word"),
    [
        ("We saw that the day was lovely and superb.", "We saw that the day was", "lovely"),
        ("Lovely. We thought  the day\nwas awful.", "We thought the day was", "awful"),
        ("A dull film, but what a superb cast.", "A dull film, but what a", "superb"),
    ],
)
def test_a_context_is_a_sentence_up_to_its_first_outer_word(text, context, word):
    assert first_target(0, text, OUTER) == (0, context, word)


@pytest.mark.parametrize(
    "text",
    [
        "We saw that the day was fine.",
        "So lovely to see you here",
        "We saw that the day was not-lovely",
        "We saw that the day was, lovely to say",
        "and on " * 21 + "lovely",
    ],
)
def test_a_sentence_without_an_outer_word_after_some_words_of_the_same_clause_is_no_context(text):
    assert first_target(0, text, OUTER) is None


def test_markup_ends_a_sentence_and_is_no_part_of_a_context(tokenizer):
    texts = ["We said hello<br /><br />Then we saw a lovely day", *reviews()]
    assert build(documents(texts, [True] + [False] * 200), tokenizer).table.context.tolist() == ["Then we saw a"]


# --- which triples -----------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_triples_and_other_seeds_others(tokenizer):
    first, second, other = (build(reviews(), tokenizer, seed=seed).table for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(other)


def test_rare_words_come_as_early_as_frequent_ones(tokenizer):
    """A word is taken a second time when every word has been taken once."""
    texts = [f"We said that this was {word} to us" for word in ["lovely"] * 60 + ["awful", "superb", "dreadful"]]
    table = build([*texts, *reviews(20)], tokenizer, triples=8).table
    original = [row.positive if row.context.endswith("was") else "" for row in table.itertuples()]
    assert original.count("lovely") <= 4


def test_there_are_at_most_so_many_triples_numbered_from_zero(tokenizer):
    table = build(reviews(), tokenizer, triples=7).table
    assert table.triple.tolist() == list(range(7))
    assert table.columns.tolist() == COLUMNS


@pytest.mark.parametrize("word", ["lovely", "awful"])
def test_a_lexicon_of_one_side_gives_no_triples(tokenizer, word):
    assert build(reviews(), tokenizer, {word: POLARITY[word]}).table.empty


def test_a_context_longer_than_the_models_is_left_out(tokenizer):
    long = build(reviews(), tokenizer, limit=LIMIT)
    longest = max(len(span.ids) for span in long.spans)
    shorter = build(reviews(), tokenizer, limit=longest - 1)
    assert 0 < len(shorter.table) < len(long.table)
    assert max(len(span.ids) for span in shorter.spans) < longest


@pytest.mark.parametrize("texts", [["Nothing is said of it here"], ["We saw that it was lovely"]])
def test_a_corpus_without_good_bad_and_other_words_gives_no_triples(tokenizer, texts):
    found = build(texts, tokenizer)
    assert found.table.columns.tolist() == COLUMNS
    assert (len(found.table), found.spans, found.split) == (0, [], 0)


# --- tokens ------------------------------------------------------------------------------------------------------


def test_the_target_is_the_tokens_of_the_word(tokenizer):
    for word in ("day", "dreadful"):
        span = target_span(tokenizer, "We saw a", word)
        assert tokenizer.decode(span.ids) == f"We saw a {word}"
        assert tokenizer.decode(span.ids[: span.first]).strip() == "We saw a"
        assert tokenizer.decode(span.ids[span.first : span.last]).strip() == word


def test_words_of_several_tokens_are_averaged_or_their_triples_dropped_and_counted_either_way(tokenizer):
    averaged = build(reviews(), tokenizer)
    dropped = build(reviews(), tokenizer, split_targets="drop")
    several = averaged.table.filter(like="tokens_").max(axis=1) > 1
    assert averaged.split == dropped.split == several.sum() > 0
    assert len(dropped.table) == (~several).sum()
    assert (dropped.table.filter(like="tokens_") == 1).all(axis=None)


def test_the_spans_are_those_of_the_table(tokenizer):
    found = build(reviews(), tokenizer, triples=5)
    texts = [f"{row.context} {getattr(row, name)}" for row in found.table.itertuples() for name in VARIANTS]
    assert [tokenizer.decode(span.ids) for span in found.spans] == texts
    lengths = found.table[[f"tokens_{name}" for name in VARIANTS]].to_numpy().ravel().tolist()
    assert [span.last - span.first for span in found.spans] == lengths


def test_a_response_is_averaged_from_its_first_token_to_the_end_of_text(tokenizer):
    pairs = pd.DataFrame({"prompt": ["We saw"], "chosen": [" a day"], "rejected": [" two plays"]})
    kept, (chosen, rejected) = response_spans(tokenizer, pairs, LIMIT)
    assert len(kept) == 1
    for span, text in ((chosen, " a day"), (rejected, " two plays")):
        assert tokenizer.decode(span.ids[span.first : span.last]) == text + tokenizer.eos_token


def test_responses_end_at_the_models_context_and_prompts_that_fill_it_are_left_out(tokenizer):
    prompts = ["We saw", "We saw " * LIMIT]
    pairs = pd.DataFrame({"prompt": prompts, "chosen": [" a day" * LIMIT] * 2, "rejected": [" x"] * 2})
    kept, spans = response_spans(tokenizer, pairs, LIMIT)
    assert kept.prompt.tolist() == ["We saw"]
    assert [span.last == len(span.ids) <= LIMIT for span in spans] == [True, True]


# --- triples of one's own ----------------------------------------------------------------------------------------

GOOD = {"context": "We saw that it was", "positive": "lovely", "negative": "awful", "neutral": "purple"}


def read(path, tokenizer, limit=LIMIT, **settings):
    return read_triples(Probes(**settings), path, POLARITY, tokenizer, limit)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_file_has_one_triple_per_line(tmp_path, tokenizer):
    other = GOOD | {"positive": "Superb", "document": 3}
    found = read(write(tmp_path / "t.jsonl", GOOD, "", other), tokenizer)
    assert found.table.positive.tolist() == ["lovely", "Superb"]
    assert found.table.polarity_positive.tolist() == [3.0, 2.8]
    assert found.table.document.tolist() == [-1, -1]
    assert len(found.spans) == 6


def test_a_file_may_be_compressed_and_hold_separators_that_end_no_line(tmp_path, tokenizer):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD | {"context": "We\u2028saw"}, ensure_ascii=False).encode()))
    assert read(path, tokenizer).table.context.tolist() == ["We\u2028saw"]


def test_the_first_triples_of_a_file_are_taken_and_split_words_dropped_where_asked(tmp_path, tokenizer):
    path = write(tmp_path / "t.jsonl", *[GOOD] * 5)
    assert len(read(path, tokenizer, triples=2).table) == 2
    dropped = read(path, tokenizer, split_targets="drop")
    assert (len(dropped.table), dropped.split) == (0, 5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object with the texts context, positive, negative and neutral"),
        ({"context": "We saw"}, "positive is none"),
        (GOOD | {"neutral": 3}, "neutral is none"),
        (GOOD | {"context": " "}, "context: expected a text, found ' '"),
        (GOOD | {"negative": "so awful"}, "negative: expected one word, found 'so awful'"),
        (GOOD | {"positive": "awful"}, "positive: expected a word of positive polarity, 'awful' has -2.9"),
        (GOOD | {"negative": "purple"}, "negative: expected a word of negative polarity, 'purple' has 0"),
        (GOOD | {"neutral": "fine"}, "neutral: expected a word that is not in the lexicon, 'fine' has 0.5"),
        (GOOD | {"context": "We saw " * LIMIT}, f"the model's context holds {LIMIT}; shorten the context"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, tokenizer, line, message):
    path = write(tmp_path / "t.jsonl", GOOD, "", line)
    with pytest.raises(RlsaeError) as error:
        read(path, tokenizer)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)


def test_an_empty_file_an_absent_one_and_one_that_is_no_text_are_named(tmp_path, tokenizer):
    with pytest.raises(RlsaeError, match=r"t\.jsonl holds no triples"):
        read(write(tmp_path / "t.jsonl"), tokenizer)
    with pytest.raises(RlsaeError, match=r"cannot read .*absent\.jsonl"):
        read(tmp_path / "absent.jsonl", tokenizer)
    (tmp_path / "t.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(RlsaeError, match=r"cannot read .*t\.jsonl\.gz"):
        read(tmp_path / "t.jsonl.gz", tokenizer)
