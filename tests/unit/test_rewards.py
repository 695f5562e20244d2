"""Rewards: VADER's or another lexicon, and a function of one's own."""

from __future__ import annotations

import pytest

from rlsae.config import LexiconReward, PythonReward
from rlsae.errors import RlsaeError
from rlsae.rewards import Lexicon, load_reward, read_lexicon, vader_lexicon, word_rewards


@pytest.fixture
def words(tmp_path):
    """A lexicon of three words."""
    path = tmp_path / "words.tsv"
    path.write_text("good\t2.0\tignored\tcolumns\nBad\t-1.5\n\ndon't\t-1\n")
    return path


def lexicon(words=None, **changes):
    return load_reward(LexiconReward(**{"kind": "lexicon", "scale": 1.0} | changes), words)


@pytest.fixture
def python(tmp_path):
    """Function of a source text: the reward that it defines."""

    def load(source, function="reward", name="mine.py"):
        path = tmp_path / name
        path.write_text(source)
        return load_reward(PythonReward(kind="python", path=str(path), function=function), path)

    return load


# --- lexicon -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("a good film", 2.0),
        ("good, good; BAD!", 2.5),
        ("goodness badly", 0.0),
        ("don't", -1.0),
        ("", 0.0),
        ("42 ... ?", 0.0),
    ],
)
def test_the_reward_of_a_text_is_the_sum_of_the_polarities_of_its_words(words, text, score):
    assert lexicon(words)([""], [text]) == [score]


def test_each_word_tells_what_it_adds_to_the_reward_of_the_text_up_to_it(words):
    said, added = word_rewards(lexicon(words, clip=3.0), "a prompt", " good film, good  good bad\n")
    assert (said, added) == ([" good", " film,", " good", "  good", " bad", "\n"], [2.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    assert "".join(said) == " good film, good  good bad\n"


def test_an_empty_response_has_no_words(words):
    assert word_rewards(lexicon(words), "a prompt", "") == ([], [])


def test_each_response_has_a_reward_of_its_own(words):
    assert lexicon(words)(["", "", ""], ["good", "bad", "film"]) == [2.0, -1.5, 0.0]


def test_the_sum_is_scaled_before_it_is_clipped(words):
    reward = lexicon(words, scale=0.5, clip=2.0)
    assert reward([""] * 3, ["good", "good " * 9, "bad " * 9]) == [1.0, 2.0, -2.0]


def test_the_prompt_counts_only_where_the_whole_text_is_scored(words):
    assert lexicon(words, scope="response")(["good "], ["bad"]) == [-1.5]
    assert lexicon(words, scope="full")(["good "], ["bad"]) == [0.5]


def test_a_word_that_begins_in_the_prompt_and_ends_in_the_response_is_one_word(words):
    assert lexicon(words, scope="full")(["a go"], ["od film"]) == [2.0]


def test_without_a_file_the_lexicon_is_that_of_vader():
    assert lexicon()([""], ["good"]) == [vader_lexicon()["good"]] == [1.9]
    assert len(vader_lexicon()) > 7000


def test_the_columns_of_a_lexicon_after_the_second_are_ignored(words):
    assert read_lexicon(words) == {"good": 2.0, "bad": -1.5, "don't": -1.0}


@pytest.mark.parametrize("line", ["good", "good 2", "good\tvery", "\t"])
def test_a_line_of_a_lexicon_that_is_no_word_and_number_is_named(tmp_path, line):
    path = tmp_path / "words.tsv"
    path.write_text(f"fine\t1\n{line}x\n")
    with pytest.raises(RlsaeError, match=r"words\.tsv, line 2: expected word<TAB>polarity, found"):
        read_lexicon(path)


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_polarity_that_is_not_finite_is_refused(tmp_path, number):
    path = tmp_path / "words.tsv"
    path.write_text(f"fine\t{number}\n")
    with pytest.raises(RlsaeError, match=r"words\.tsv, line 1"):
        read_lexicon(path)


def test_a_lexicon_without_words_is_refused(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("\n\n")
    with pytest.raises(RlsaeError, match=r"words\.tsv holds no words"):
        read_lexicon(path)


def test_a_lexicon_is_scored_by_the_entry_it_was_made_from():
    assert Lexicon(LexiconReward(kind="lexicon", scale=0.2)).score("good") == pytest.approx(0.38)


# --- a function of one's own -------------------------------------------------------------------------------------


def test_a_function_scores_prompts_and_responses(python):
    source = "def reward(prompts, responses):\n    return [len(p) - len(r) for p, r in zip(prompts, responses)]\n"
    assert python(source)(("abc", "a"), ("a", "abc")) == [2.0, -2.0]


def test_the_function_may_have_another_name(python):
    reward = python("def length(prompts, responses):\n    return [len(r) for r in responses]\n", function="length")
    assert reward(["p"], ["four"]) == [4.0]


def test_the_function_gets_lists_and_may_change_them(python):
    reward = python("def reward(prompts, responses):\n    return [len(responses.pop()) for _ in list(responses)]\n")
    responses = ["one", "three"]
    assert reward(["", ""], responses) == [5.0, 3.0]
    assert responses == ["one", "three"]


def test_numpy_numbers_are_numbers(python):
    source = "import numpy as np\ndef reward(prompts, responses):\n    return np.ones(len(responses), np.float32)\n"
    assert python(source)(["", ""], ["a", "b"]) == [1.0, 1.0]


def test_a_function_that_fails_is_named_with_its_error_and_a_sample(python):
    reward = python("def reward(prompts, responses):\n    return [1 / 0]\n")
    with pytest.raises(RlsaeError, match=r"mine\.py:reward failed: ZeroDivisionError: .*; first sample: 'the resp"):
        reward(["p"], ["the response"])


def test_a_function_that_returns_too_few_numbers_is_named_with_both_counts(python):
    reward = python("def reward(prompts, responses):\n    return [1.0]\n")
    with pytest.raises(RlsaeError, match=r"mine\.py:reward returned 1 numbers for 2 responses"):
        reward(["p", "q"], ["r", "s"])


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'high'", "[1.0]"])
def test_a_value_that_is_no_finite_number_is_named_with_prompt_and_response(python, value):
    reward = python(f"def reward(prompts, responses):\n    return [1.0, {value}]\n")
    with pytest.raises(RlsaeError, match=r"returned .* for prompt 'q', response 's'"):
        reward(["p", "q"], ["r", "s"])


def test_a_function_that_does_not_exist_is_named(python):
    with pytest.raises(RlsaeError, match=r"mine\.py defines no function 'score'; set rewards\.\*\.function"):
        python("def reward(prompts, responses): ...\nscores = 3\n", function="score")


def test_a_name_that_is_no_function_is_refused(python):
    with pytest.raises(RlsaeError, match="defines no function 'scores'"):
        python("scores = 3\n", function="scores")


@pytest.mark.parametrize("source", ["import nothing_of_this_name", "def reward(", "raise ValueError('no')"])
def test_a_file_that_cannot_be_imported_is_named(python, source):
    with pytest.raises(RlsaeError, match=r"the reward file .*mine\.py cannot be imported: \w+Error"):
        python(source)


def test_a_file_that_is_no_python_file_is_refused(python):
    with pytest.raises(RlsaeError, match=r"mine\.txt: expected a Python file"):
        python("def reward(prompts, responses): ...", name="mine.txt")
