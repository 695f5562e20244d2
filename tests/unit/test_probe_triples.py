"""Contrastive triples: one context, three words, drawn from a corpus or read from a file."""

from __future__ import annotations

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
from rlsae.interpretation.probes.wording import words_of
from rlsae.pretrain import train_tokenizer
from rlsae.rewards import vader_lexicon

LEXICON = vader_lexicon()
LIMIT = 64
GOOD = {"context": "I think it is", "positive": "great", "negative": "awful", "neutral": "long"}


@pytest.fixture(scope="module")
def documents(corpus):
    return pd.read_parquet(corpus / DOCUMENTS)


def built(documents, tokenizer, polarity=LEXICON, limit=LIMIT, **settings):
    return build_triples(Probes(**settings), documents, polarity, tokenizer, limit)


def read(tmp_path, tokenizer, *lines, limit=LIMIT, **settings):
    path = tmp_path / "triples.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_triples(Probes(**settings), path, LEXICON, tokenizer, limit)


def test_the_words_of_a_triple_have_the_polarities_that_they_stand_for(documents, tokenizer):
    table = built(documents, tokenizer).table
    outer = outer_quartiles(LEXICON)
    assert list(table) == COLUMNS
    assert len(table) > 20
    for row in table.itertuples():
        assert outer[row.positive.lower()] == row.polarity_positive > 0 > row.polarity_negative == outer[row.negative.lower()]
        assert row.neutral.lower() not in LEXICON


def test_every_word_occurs_in_the_corpus_and_every_context_in_a_held_out_document(documents, tokenizer):
    known = {word for text in documents.text for word in words_of(text)}
    by_number = documents.set_index("document")
    table = built(documents, tokenizer).table
    assert set(table[list(VARIANTS)].to_numpy().ravel()) <= known | {word.capitalize() for word in known}
    assert by_number.loc[table.document].held_out.all()
    for row in table.itertuples():
        text = by_number.text[row.document]
        assert any(f"{row.context} {word}" in text for word in (row.positive, row.negative))


def test_a_document_gives_one_triple_at_most_and_no_more_are_made_than_asked_for(documents, tokenizer):
    assert built(documents, tokenizer).table.document.is_unique
    assert len(built(documents, tokenizer, triples=7).table) == 7


def test_equal_seeds_give_equal_triples_and_other_seeds_others(documents, tokenizer):
    tables = [built(documents, tokenizer, seed=seed).table for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0].equals(tables[2])


def test_a_context_ends_before_the_first_word_of_polarity():
    outer = {"great": 3.0, "awful": -3.0}
    assert first_target(4, "It was so-so. I think it is great, not awful.", outer) == (4, "I think it is", "great")
    assert first_target(4, "Great film. It is (great). I saw a co-great one.", outer) is None


def test_words_keep_the_case_of_the_word_that_they_replace(tokenizer):
    texts = ["I think it is Great now", "I think it is AWFUL now", *["we hope it is odd now and it is even now"] * 30]
    documents = pd.DataFrame({"document": range(len(texts)), "text": texts, "held_out": True})
    filler = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
    common = pd.DataFrame(
        {"document": [99], "text": [" ".join(f"{a}{b}" for a in filler for b in filler[:5]) * 40], "held_out": False}
    )
    table = built(pd.concat([documents, common]), tokenizer, {"great": 3.0, "awful": -3.0}).table
    assert {tuple(row) for row in table[["positive", "negative"]].to_numpy()} == {("Great", "Awful"), ("GREAT", "AWFUL")}
    assert {word.istitle() or word.isupper() for word in table.neutral} == {True}


def test_a_lexicon_without_bad_words_or_a_corpus_without_any_gives_no_triples(documents, tokenizer):
    assert built(documents, tokenizer, {"great": 2.0, "good": 1.0}).table.empty
    assert built(documents.head(0), tokenizer).table.empty
    assert built(documents, tokenizer, limit=2).table.empty


def test_the_target_is_the_tokens_of_the_last_word_alone(tokenizer):
    span = target_span(tokenizer, "I think it is", "unbelievable")
    assert tokenizer.decode(span.ids) == "I think it is unbelievable"
    assert tokenizer.decode(span.ids[span.first : span.last]).strip() == "unbelievable"
    assert span.last - span.first > 1


def test_words_of_several_tokens_are_kept_and_counted_or_dropped_and_counted(tmp_path):
    tokenizer = train_tokenizer(["I think it is great or awful or long"] * 20, vocabulary=300)
    split = GOOD | {"neutral": "zzyzx"}
    kept = read(tmp_path, tokenizer, GOOD, split)
    dropped = read(tmp_path, tokenizer, GOOD, split, split_targets="drop")
    assert (len(kept.table), kept.split) == (2, 1)
    assert (len(dropped.table), dropped.split) == (1, 1)
    assert kept.table.tokens_neutral.tolist() == [1, len("zzyzx")]
    assert len(dropped.spans) == 3


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object"),
        ({"context": "a"}, "line 2: expected an object .* positive is none"),
        (GOOD | {"context": " "}, "line 2: context: expected a text"),
        (GOOD | {"positive": "very great"}, "line 2: positive: expected one word"),
        (GOOD | {"positive": "awful"}, "line 2: positive: expected a word of positive polarity, 'awful' has -2"),
        (GOOD | {"negative": "table"}, "line 2: negative: expected a word of negative polarity"),
        (GOOD | {"neutral": "good"}, "line 2: neutral: expected a word that is not in the lexicon"),
        (GOOD | {"context": "on and on " * 40}, "line 2: .* tokens, the model's context holds 64"),
    ],
)
def test_a_line_that_is_no_triple_is_named(tmp_path, tokenizer, line, complaint):
    with pytest.raises(RlsaeError, match=f"triples.jsonl, {complaint}"):
        read(tmp_path, tokenizer, GOOD, line)


def test_a_file_without_triples_or_that_is_not_there_is_an_error(tmp_path, tokenizer):
    with pytest.raises(RlsaeError, match="holds no triples"):
        read(tmp_path, tokenizer, "")
    with pytest.raises(RlsaeError, match="cannot read"):
        read_triples(Probes(), tmp_path / "none.jsonl", LEXICON, tokenizer, LIMIT)


def test_responses_begin_where_they_part_from_the_prompt_and_end_with_the_end_of_text(tokenizer):
    pairs = pd.DataFrame(
        {"prompt": ["I think", "long " * 80], "chosen": [" it is good", " x"], "rejected": [" it is bad", " y"]}
    )
    kept, spans = response_spans(tokenizer, pairs, LIMIT)
    assert len(kept) == 1
    texts = [tokenizer.decode(span.ids[span.first : span.last - 1]) for span in spans]
    assert texts == [" it is good", " it is bad"]
    assert {span.ids[-1] for span in spans} == {tokenizer.eos_token_id}
    assert np.array_equal([span.last for span in spans], [len(span.ids) for span in spans])
