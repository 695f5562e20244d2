"""Preference pairs: written by the grammar, read from every source, split, and used as prompts."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pandas as pd
import pytest
from small_tunings import entry, runner

from rlsae import review_grammar
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.config import FileCorpus, GeneratedCorpus, HubCorpus
from rlsae.corpora import DOCUMENTS, PAIRS, build_corpus, read_documents
from rlsae.errors import RlsaeError
from rlsae.review_grammar import polarity
from rlsae.tuning.rollout import Prompts

ROWS = [
    {"prompt": "What is rain?", "chosen": " Water.", "rejected": " Stone.", "stars": 3},
    {"prompt": "Wie geht’s?", "chosen": " Gut!", "rejected": " Gut?", "stars": 4},
]
TRIPLES = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]


def dialogue(*turns):
    """Turns of human and assistant in the form of HH-RLHF."""
    return "".join(f"\n\n{('Human', 'Assistant')[number % 2]}:{turn}" for number, turn in enumerate(turns))


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_pairs(path, content=None, **changes):
    if content is not None:
        path.write_bytes(content)
    return read_documents(
        FileCorpus(**{"source": "file", "path": "unused", "kind": "preferences", "held_out": 0} | changes), path
    )


def triples(pairs):
    return list(zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True))


def generated(**changes):
    return read_documents(GeneratedCorpus(**{"source": "generated", "kind": "preferences", "documents": 500} | changes))


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [lambda raw: raw, gzip.compress], ids=["plain", "gz"])
def test_the_lines_of_a_file_are_pairs_packed_or_not(tmp_path, pack):
    path = tmp_path / ("a.jsonl" + (".gz" if pack is gzip.compress else ""))
    assert triples(read_pairs(path, pack(jsonl(ROWS)))) == TRIPLES


def test_the_rows_of_a_parquet_file_are_pairs(tmp_path):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    assert triples(read_pairs(tmp_path / "a.parquet")) == TRIPLES


def test_a_local_folder_is_read_like_a_data_set_of_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "train.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "pairs" / "test.jsonl").write_bytes(jsonl([{"chosen": dialogue("a", "b"), "rejected": dialogue("a", "c")}]))
    hub = {"source": "hub", "dataset": str(tmp_path / "pairs"), "kind": "preferences", "held_out": 0}
    assert triples(read_documents(HubCorpus(**hub))) == TRIPLES


def test_no_other_column_than_prompt_chosen_and_rejected_is_kept(tmp_path):
    columns = list(read_pairs(tmp_path / "a.jsonl", jsonl(ROWS)).columns)
    assert columns == ["document", "prompt", "chosen", "rejected", "held_out"]


def test_the_name_of_the_text_field_does_not_matter_to_pairs(tmp_path):
    assert triples(read_pairs(tmp_path / "a.jsonl", jsonl(ROWS), text_field="stars")) == TRIPLES


# --- dialogues ---------------------------------------------------------------------------------------------------


def read_dialogues(tmp_path, chosen, rejected):
    [triple] = triples(read_pairs(tmp_path / "a.jsonl", jsonl([{"chosen": chosen, "rejected": rejected}])))
    return triple


def test_dialogues_without_a_prompt_are_split_at_the_assistant_turn_that_both_share(tmp_path):
    found = read_dialogues(tmp_path, dialogue(" What is rain?", " Water."), dialogue(" What is rain?", " Stone."))
    assert found == ("\n\nHuman: What is rain?\n\nAssistant:", " Water.", " Stone.")


def test_the_prompt_of_a_long_dialogue_ends_at_its_last_shared_assistant_turn(tmp_path):
    shared = [" Hello.", " Hi!", " What is rain?"]
    found = read_dialogues(tmp_path, dialogue(*shared, " Water."), dialogue(*shared, " Stone."))
    assert found == (dialogue(*shared, ""), " Water.", " Stone.")


def test_words_that_both_responses_begin_with_belong_to_the_responses(tmp_path):
    found = read_dialogues(tmp_path, dialogue(" Why?", " Because it is."), dialogue(" Why?", " Because I said so."))
    assert found == (dialogue(" Why?", ""), " Because it is.", " Because I said so.")


def test_a_response_that_begins_the_other_one_belongs_to_the_responses_too(tmp_path):
    found = read_dialogues(tmp_path, dialogue(" Why?", " Because."), dialogue(" Why?", " Because. So."))
    assert found == (dialogue(" Why?", ""), " Because.", " Because. So.")


def test_dialogues_that_part_early_have_the_rest_of_the_dialogue_as_their_responses(tmp_path):
    chosen, rejected = dialogue(" a", " b", " c", " d"), dialogue(" a", " x", " c", " d")
    found = read_dialogues(tmp_path, chosen, rejected)
    assert found == (dialogue(" a", ""), " b\n\nHuman: c\n\nAssistant: d", " x\n\nHuman: c\n\nAssistant: d")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (dialogue(" a", " b"), dialogue(" x", " b")),
        ("Human: a Assistant: b", "Human: a Assistant: c"),
        ("\n\nAssistant: b", "Assistant: c"),
    ],
    ids=["other questions", "another form", "one without a turn"],
)
def test_dialogues_that_share_no_assistant_turn_are_refused_with_the_way_out(tmp_path, chosen, rejected):
    with pytest.raises(RlsaeError) as caught:
        read_dialogues(tmp_path, chosen, rejected)
    message = str(caught.value)
    assert "a.jsonl, document 0: no key 'prompt', and the dialogues share no beginning with an assistant turn" in message
    assert message.endswith("give prompt, chosen and rejected")


def test_a_dialogue_that_ends_where_the_other_one_goes_on_has_an_empty_response(tmp_path):
    found = read_dialogues(tmp_path, dialogue(" a", " b"), dialogue(" a", ""))
    assert found == (dialogue(" a", ""), " b", "")


# --- mistakes ----------------------------------------------------------------------------------------------------


def pair(**changes):
    return {"prompt": "What is rain?", "chosen": " Water.", "rejected": " Stone."} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": " Water."}, "chosen and rejected are the same; remove the pair, it prefers nothing"),
        ({"prompt": ""}, "prompt is empty; remove the pair"),
        ({"prompt": " \n"}, "prompt is empty; remove the pair"),
        ({"chosen": "", "rejected": ""}, "chosen and rejected are the same; remove the pair, it prefers nothing"),
        ({"chosen": None}, "chosen: expected a text, found None"),
        ({"rejected": 3}, "rejected: expected a text, found 3"),
        ({"prompt": ["What is rain?"]}, r"prompt: expected a text, found \['What is rain\?'\]"),
        ({"prompt": None}, "prompt: expected a text, found None"),
    ],
    ids=str,
)
def test_a_bad_pair_is_refused_with_its_document(tmp_path, changes, message):
    with pytest.raises(RlsaeError, match=rf"a\.jsonl, document 1: {message}"):
        read_pairs(tmp_path / "a.jsonl", jsonl([pair(), pair(**changes), pair(prompt="")]))


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_one_response_of_a_pair_may_be_empty_because_a_text_may_end_at_once(tmp_path, key):
    pairs = read_pairs(tmp_path / "a.jsonl", jsonl([pair(**{key: ""})]))
    assert pairs[key].tolist() == [""]


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_a_line_without_a_response_is_refused_with_its_document_and_the_keys_it_has(tmp_path, key):
    broken = pair()
    del broken[key]
    has = ", ".join(broken)
    message = rf"document 1 \(line 2\): no key '{key}'; it has: {has}; preferences need chosen and rejected"
    with pytest.raises(RlsaeError, match=message):
        read_pairs(tmp_path / "a.jsonl", jsonl([pair(), broken]))


def test_a_table_without_rejected_responses_is_refused_with_the_columns_it_has(tmp_path):
    pd.DataFrame({"prompt": ["a"], "chosen": ["b"]}).to_parquet(tmp_path / "a.parquet")
    message = r"a\.parquet has no column 'rejected'; it has: prompt, chosen; preferences need chosen and rejected"
    with pytest.raises(RlsaeError, match=message):
        read_pairs(tmp_path / "a.parquet")


def test_a_missing_response_in_a_table_is_named(tmp_path):
    pd.DataFrame([pair(), pair(rejected=None)]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RlsaeError, match=r"a\.parquet, document 1: rejected: expected a text, found"):
        read_pairs(tmp_path / "a.parquet")


def test_lines_of_plain_text_are_no_pairs(tmp_path):
    with pytest.raises(RlsaeError, match=r"a\.txt: expected a name that ends in \.jsonl, \.jsonl\.gz or \.parquet"):
        read_pairs(tmp_path / "a.txt", b"one\ntwo\n")


@pytest.mark.parametrize("held_out", [0, 0.1])
def test_a_file_without_pairs_is_refused(tmp_path, held_out):
    with pytest.raises(RlsaeError, match=r"a\.jsonl holds no documents"):
        read_pairs(tmp_path / "a.jsonl", b"", held_out=held_out)


def test_more_pairs_than_there_are_are_refused_with_both_numbers(tmp_path):
    with pytest.raises(RlsaeError, match="documents: 3 are asked for, the source has 2; ask for fewer"):
        read_pairs(tmp_path / "a.jsonl", jsonl(ROWS), documents=3)


# --- generated pairs ---------------------------------------------------------------------------------------------


def test_generated_pairs_have_distinct_prompts():
    pairs = generated()
    assert len(pairs) == pairs.prompt.nunique() == 500


def test_equal_seeds_give_equal_pairs_and_other_seeds_others():
    assert generated(documents=50, seed=0).equals(generated(documents=50, seed=0))
    assert not set(generated(documents=50, seed=0).prompt) & set(generated(documents=50, seed=1).prompt)


def test_the_chosen_response_has_more_good_words_than_the_rejected_one():
    pairs = generated()
    assert (pairs.chosen.map(polarity) > pairs.rejected.map(polarity)).all()


def test_polarity_counts_good_words_less_bad_ones():
    assert polarity("a great film with a great plot and an awful ending") == 1
    assert polarity("i hated it .") == -1
    assert polarity("the film was long .") == 0


def test_every_polar_word_occurs_in_chosen_and_in_rejected_responses():
    pairs = generated()
    words = [{word for text in texts for word in text.split()} for texts in (pairs.chosen, pairs.rejected)]
    assert all(side >= review_grammar.GOOD_WORDS | review_grammar.BAD_WORDS for side in words)


def test_both_responses_fill_the_same_templates():
    fillings = {text for texts in review_grammar.WORDS.values() for text in texts}
    fillings |= review_grammar.GOOD_WORDS | review_grammar.BAD_WORDS
    slot = "|".join(sorted(fillings, key=len, reverse=True))

    def template(text):
        return re.sub(r"\ban _", "a _", re.sub(rf"\b({slot})\b", "_", text))

    pairs = generated()
    assert pairs.chosen.map(template).tolist() == pairs.rejected.map(template).tolist()


def test_the_number_of_words_does_not_tell_which_response_is_chosen():
    pairs = generated(documents=2000)
    longer = pairs.chosen.str.split().str.len() - pairs.rejected.str.split().str.len()
    right = (np.sign(longer) + 1) / 2
    assert (longer == 0).mean() > 0.9
    assert abs(right.mean() - 0.5) < 4 * right.std() / 2000**0.5


def test_prompt_and_response_are_a_review_when_they_stand_side_by_side():
    for prompt, chosen, rejected in triples(generated(documents=50)):
        for response in (chosen, rejected):
            assert response[0] == " "
            assert response[1] != " "
        assert prompt == prompt.strip()


def test_more_pairs_than_the_grammar_holds_are_refused(monkeypatch):
    monkeypatch.setattr(review_grammar, "OPENINGS", ("the same .",))
    with pytest.raises(RlsaeError, match="documents: the grammar could not write 2 distinct pairs; ask for fewer"):
        generated(documents=2)


# --- split and artifact ------------------------------------------------------------------------------------------


def test_a_share_of_the_pairs_is_held_out_wherever_they_stand():
    held_out = generated(documents=100, held_out=0.3).held_out
    assert held_out.sum() == 30
    assert 0 < held_out[:50].sum() < 30


def test_pairs_can_be_thinned_and_remember_their_place(tmp_path):
    rows = [pair(prompt=f"question {number}") for number in range(20)]
    pairs = read_pairs(tmp_path / "a.jsonl", jsonl(rows), documents=5)
    assert pairs.prompt.tolist() == [f"question {number}" for number in pairs.document]
    assert pairs.document.tolist() != list(range(5))


def test_the_artifact_holds_pairs_and_no_documents(tmp_path):
    corpus = GeneratedCorpus(source="generated", kind="preferences", documents=50)
    for name in ("x", "y"):
        build_corpus(corpus, corpus.settings(), tmp_path / name / "corpora" / "a", None, None)
    x, y = (tmp_path / name / "corpora" / "a" for name in ("x", "y"))
    assert Manifest.read(x).metrics == {"documents": 50, "held_out": 5}
    assert not (x / DOCUMENTS).exists()
    assert triples(pd.read_parquet(x / PAIRS)) == triples(read_documents(corpus))
    assert all((x / name).read_bytes() == (y / name).read_bytes() for name in (MANIFEST, PAIRS))


# --- prompts of a tuning -----------------------------------------------------------------------------------------


@pytest.fixture
def pairs_folder(tmp_path):
    corpus = GeneratedCorpus(source="generated", kind="preferences", documents=100, held_out=0.25)
    folder = tmp_path / "corpora" / "pairs"
    build_corpus(corpus, corpus.settings(), folder, None, None)
    return folder


@pytest.mark.parametrize("held_out", [False, True])
def test_the_prompts_of_pairs_are_taken_whole_from_their_side_of_the_split(pairs_folder, tokenizer, random_model, held_out):
    prompts = Prompts(pairs_folder, tokenizer, random_model("gpt2"), entry(query_tokens=(2, 3)), held_out)
    pairs = pd.read_parquet(pairs_folder / PAIRS)
    expected = [tokenizer(text)["input_ids"] for text in pairs.prompt[pairs.held_out == held_out]]
    assert prompts.ids == expected
    drawn = prompts.sample(20, np.random.default_rng(0), distinct=True)
    assert all(ids in expected for ids in drawn)


def test_a_prompt_that_leaves_no_room_for_its_response_is_left_out(pairs_folder, tokenizer, random_model):
    lengths = sorted(len(ids) for ids in Prompts(pairs_folder, tokenizer, random_model("gpt2"), entry(), False).ids)
    room = lengths[len(lengths) // 2]
    settings = entry(response_tokens=(3, 64 - room))
    kept = Prompts(pairs_folder, tokenizer, random_model("gpt2"), settings, held_out=False).ids
    assert sorted(len(ids) for ids in kept) == [length for length in lengths if length <= room]


@pytest.mark.parametrize(("held_out", "side"), [(False, "training"), (True, "held-out")])
def test_prompts_that_all_leave_no_room_are_refused_with_the_context(pairs_folder, tokenizer, random_model, held_out, side):
    settings = entry(response_tokens=(3, 63))
    with pytest.raises(RlsaeError, match=f"response_tokens: no {side} prompt of .* leaves room for 63 tokens .* of 64"):
        Prompts(pairs_folder, tokenizer, random_model("gpt2"), settings, held_out)


def test_ppo_asks_the_reward_about_whole_prompts_of_training_pairs(pairs_folder, tokenizer, random_model, tmp_path):
    seen = []
    run = runner(random_model, tokenizer, pairs_folder, tmp_path)
    run("pairs", reward=lambda prompts, texts: seen.extend(prompts) or [0.0] * len(texts), batches=1)
    pairs = pd.read_parquet(pairs_folder / PAIRS)
    assert len(seen) == 8
    assert set(seen) <= set(pairs.prompt[~pairs.held_out])
