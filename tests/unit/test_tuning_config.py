"""Tunings, rewards and kinds of corpora in a configuration: what each method takes, and what it is refused for."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from rlsae.config import AnyTuning, ClassifierReward, Tuning
from rlsae.errors import RlsaeError
from rlsae.expand import parse_config

METHODS = ["ppo", "rloo", "grpo", "dpo", "external"]
TRAINED = METHODS[:-1]
SAMPLED = METHODS[:3]


def mistake(raw):
    """The message that a configuration is refused with."""
    with pytest.raises(RlsaeError) as caught:
        parse_config(raw)
    return str(caught.value)


def tuning(method="ppo", **changes):
    given = {"method": method, "reward": "lexicon", "corpus": "reviews"}
    if method == "external":
        given["repository"] = "somebody/tuned"
    return TypeAdapter(AnyTuning).validate_python(given | changes)


@pytest.fixture
def with_method(raw):
    """Function of a method and settings: the configuration with a tuning `t` of that method, and preference pairs."""
    raw["corpora"]["pairs"] = {"source": "generated", "kind": "preferences"}

    def change(method, **changes):
        given = {"method": method, "reward": "lexicon", "corpus": "pairs" if method == "dpo" else "reviews"}
        if method == "external":
            given["repository"] = "somebody/tuned"
        raw["tunings"]["t"] = given | changes
        return raw

    return change


# --- methods -----------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_refused_with_the_known_ones(with_method):
    message = mistake(with_method("sft"))
    assert message == "tunings.t.method: expected one of 'ppo', 'rloo', 'grpo', 'dpo', 'external', found sft"


def test_a_tuning_without_a_method_is_told_so(with_method):
    raw = with_method("ppo")
    del raw["tunings"]["t"]["method"]
    assert mistake(raw) == "tunings.t: the key 'method' is missing"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_judged_by_a_reward_on_prompts_of_a_corpus(with_method, method):
    found = parse_config(with_method(method)).tunings["t"]
    assert isinstance(found, Tuning)
    assert found.method == method
    assert found.reward == "lexicon"
    assert found.evaluation_prompts == 512


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", ["reward", "corpus"])
def test_a_reward_and_a_corpus_are_needed_by_every_method(with_method, method, key):
    raw = with_method(method)
    del raw["tunings"]["t"][key]
    assert mistake(raw) == f"tunings.t.{key}: the key is missing"


@pytest.mark.parametrize(
    ("method", "key", "nearest"),
    [("dpo", "betta", "beta"), ("rloo", "groupsize", "group_size"), ("external", "repositry", "repository")],
)
def test_an_unknown_key_is_refused_with_the_nearest_of_its_method(with_method, method, key, nearest):
    assert mistake(with_method(method, **{key: 1})) == f"tunings.t.{key}: unknown key; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("method", "key"),
    [("dpo", "kl_target"), ("rloo", "gae_lambda"), ("ppo", "group_size"), ("grpo", "beta"), ("external", "batches")],
)
def test_a_key_of_another_method_is_unknown(with_method, method, key):
    assert mistake(with_method(method, **{key: 1})).startswith(f"tunings.t.{key}: unknown key; ")


def test_a_tuning_that_has_the_name_of_its_method_is_still_named(with_method):
    raw = with_method("ppo")
    raw["tunings"]["grpo"] = raw["tunings"]["t"] | {"method": "grpo", "batches": 0}
    assert mistake(raw) == "tunings.grpo.batches: input should be greater than 0, found 0"


@pytest.mark.parametrize("method", METHODS)
def test_a_list_of_seeds_expands_to_one_tuning_and_one_study_each(with_method, method):
    raw = with_method(method, seed=[0, 1])
    raw["studies"]["main"]["tuning"] = "t"
    config = parse_config(raw)
    assert {name: t.seed for name, t in config.tunings.items() if name != "ppo"} == {"t-seed-0": 0, "t-seed-1": 1}
    assert [study.tuned for study in config.studies.values()] == ["tiny.t-seed-0", "tiny.t-seed-1"]


# --- adapters and number formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_all_weights_are_trained_in_float32_unless_it_is_asked_otherwise(with_method, method):
    found = parse_config(with_method(method)).tunings["t"]
    assert (found.lora, found.precision, found.gradient_accumulation) == (None, "float32", 1)


@pytest.mark.parametrize("method", TRAINED)
def test_adapters_have_defaults_of_their_own(with_method, method):
    found = parse_config(with_method(method, lora={})).tunings["t"]
    assert (found.lora.rank, found.lora.alpha) == (8, 16)


def test_an_unknown_key_of_the_adapters_is_refused_with_the_nearest_one(with_method):
    assert mistake(with_method("ppo", lora={"rnak": 4})) == "tunings.t.lora.rnak: unknown key; did you mean rank?"


def test_adapters_without_a_rank_are_refused(with_method):
    assert mistake(with_method("dpo", lora={"rank": 0})) == "tunings.t.lora.rank: input should be greater than 0, found 0"


def test_an_unknown_number_format_is_refused_with_the_known_ones(with_method):
    assert mistake(with_method("ppo", precision="float16")) == (
        "tunings.t.precision: expected one of 'float32' or 'bfloat16', found 'float16'"
    )


@pytest.mark.parametrize(("method", "key"), [("ppo", "gradient_accumulation"), ("dpo", "precision"), ("rloo", "lora")])
def test_what_a_tuning_is_trained_with_shapes_its_artifact(method, key):
    assert key in tuning(method).settings()


# --- numbers that must fit together ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SAMPLED)
def test_a_batch_of_responses_is_cut_into_whole_minibatches(with_method, method):
    raw = with_method(method, batch_size=12, minibatch_size=8)
    assert mistake(raw) == "tunings.t: batch_size 12 is no multiple of minibatch_size 8"


@pytest.mark.parametrize(("method", "key"), [("ppo", "minibatch_size"), ("grpo", "minibatch_size"), ("dpo", "batch_size")])
def test_a_step_is_cut_into_whole_parts(with_method, method, key):
    sizes = {"batch_size": 24, key: 8}
    assert parse_config(with_method(method, **sizes, gradient_accumulation=4)).tunings["t"].rows_at_once == 2
    assert mistake(with_method(method, **sizes, gradient_accumulation=3)) == (
        "tunings.t: gradient_accumulation 3 does not divide 8 rows"
    )


def test_a_step_is_cut_into_no_more_parts_than_it_has_rows(with_method):
    raw = with_method("ppo", batch_size=8, minibatch_size=4, gradient_accumulation=8)
    assert mistake(raw) == "tunings.t: gradient_accumulation 8 does not divide 4 rows"


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_batch_holds_whole_groups(with_method, method):
    raw = with_method(method, batch_size=16, minibatch_size=8, group_size=3)
    assert mistake(raw) == "tunings.t: batch_size 16 is no multiple of group_size 3"


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_response_alone_is_no_group(with_method, method):
    message = mistake(with_method(method, group_size=1))
    assert message == "tunings.t.group_size: input should be greater than or equal to 2, found 1"


# --- an external model -------------------------------------------------------------------------------------------


def test_an_external_model_is_a_folder_or_a_repository_and_not_both(with_method):
    assert mistake(with_method("external", repository=None)) == "tunings.t: give either a path or a repository"
    assert mistake(with_method("external", path="/models/tuned")) == "tunings.t: give either a path or a repository"
    found = parse_config(with_method("external", repository=None, path="/models/tuned")).tunings["t"]
    assert found.path == "/models/tuned"


def test_the_folder_of_an_external_model_is_no_setting_of_an_artifact():
    settings = tuning("external", repository=None, path="/models/tuned").settings()
    assert "path" not in settings
    assert "/models" not in str(settings)


def test_the_repository_and_the_commit_of_an_external_model_shape_the_artifact():
    settings = tuning("external", revision="v1").settings()
    assert (settings["repository"], settings["revision"]) == ("somebody/tuned", "v1")


def test_an_external_model_publishes_no_checkpoint(with_method):
    raw = with_method("external")
    raw["studies"]["main"]["tuning"] = "t@3"
    assert mistake(raw) == "studies.main.tuning: t publishes no checkpoint 3; it publishes: none"


# --- rewards -----------------------------------------------------------------------------------------------------


def test_an_unknown_kind_of_reward_is_refused_with_the_known_ones(raw):
    raw["rewards"]["lexicon"] = {"kind": "human"}
    assert mistake(raw) == "rewards.lexicon.kind: expected one of 'lexicon', 'python', 'classifier', found human"


@pytest.mark.parametrize("source", [{}, {"path": "/models/judge", "repository": "somebody/judge"}])
def test_a_classifier_is_a_folder_or_a_repository_and_not_both(raw, source):
    raw["rewards"]["lexicon"] = {"kind": "classifier", "label": "POSITIVE"} | source
    assert mistake(raw) == "rewards.lexicon: give either a path or a repository"


def test_a_classifier_needs_the_label_that_is_rewarded(raw):
    raw["rewards"]["lexicon"] = {"kind": "classifier", "repository": "somebody/judge"}
    assert mistake(raw) == "rewards.lexicon.label: the key is missing"


def test_a_classifier_scores_prompt_and_response_by_the_logit_of_its_label():
    found = ClassifierReward(kind="classifier", repository="somebody/judge", label="POSITIVE")
    assert (found.output, found.scope, found.scale) == ("logit", "full", 1.0)
    assert "path" not in found.settings()


# --- kinds of corpora --------------------------------------------------------------------------------------------


def needs(key, corpus, found, needed):
    return f"{key}: {corpus} holds {found}, {needed} are needed; set corpora.{corpus}.kind or name another"


def test_dpo_needs_preferences(with_method):
    raw = with_method("dpo", corpus="reviews")
    assert mistake(raw) == needs("tunings.t.corpus", "reviews", "documents", "preferences")


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo", "external"])
@pytest.mark.parametrize("corpus", ["reviews", "pairs"])
def test_every_other_method_takes_its_prompts_from_documents_or_preferences(with_method, method, corpus):
    assert parse_config(with_method(method, corpus=corpus)).tunings["t"].corpus == corpus


def test_a_study_compares_activations_on_documents(with_method):
    raw = with_method("ppo")
    raw["studies"]["main"]["corpus"] = "pairs"
    assert mistake(raw) == needs("studies.main.corpus", "pairs", "preferences", "documents")


def test_a_model_is_pretrained_on_documents(with_method):
    raw = with_method("ppo")
    raw["models"]["tiny"]["corpus"] = "pairs"
    assert mistake(raw) == needs("models.tiny.corpus", "pairs", "preferences", "documents")


def test_a_study_of_a_model_tuned_on_preferences_compares_documents(with_method):
    raw = with_method("dpo")
    raw["studies"]["main"]["tuning"] = "t"
    assert parse_config(raw).studies["main"].tuned == "tiny.t"


def test_an_unknown_kind_of_corpus_is_refused_with_the_known_ones(raw):
    raw["corpora"]["reviews"]["kind"] = "prompts"
    assert mistake(raw) == "corpora.reviews.kind: expected one of 'documents' or 'preferences', found 'prompts'"


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_checkpoints_are_evenly_spaced_over_the_batches():
    assert tuning(batches=24, checkpoints=2).checkpoint_steps() == [8, 16]
    assert tuning(batches=24, checkpoints=0).checkpoint_steps() == []


def test_checkpoints_are_distinct_and_before_the_end_for_any_numbers():
    for batches in range(1, 40):
        for checkpoints in range(batches):
            steps = tuning(batches=batches, checkpoints=checkpoints).checkpoint_steps()
            assert len(steps) == checkpoints
            assert steps == sorted(set(steps) & set(range(1, batches)))


def test_a_study_of_a_published_checkpoint_is_accepted(raw):
    raw["tunings"]["ppo"]["checkpoints"] = 2
    raw["studies"]["main"]["tuning"] = "ppo@16"
    assert parse_config(raw).studies["main"].tuned == "tiny.ppo@16"


def test_a_study_of_a_checkpoint_that_is_not_published_is_told_those_that_are(raw):
    raw["studies"]["main"]["tuning"] = "ppo@12"
    assert mistake(raw) == "studies.main.tuning: ppo publishes no checkpoint 12; it publishes: none"
    raw["tunings"]["ppo"]["checkpoints"] = 2
    assert mistake(raw) == "studies.main.tuning: ppo publishes no checkpoint 12; it publishes: [8, 16]"


def test_a_checkpoint_with_a_leading_zero_is_refused_because_no_folder_has_that_name(raw):
    raw["tunings"]["ppo"]["checkpoints"] = 2
    raw["studies"]["main"]["tuning"] = "ppo@08"
    assert "studies.main.tuning" in mistake(raw)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"minibatch_size": 50}, "batch_size 128 is no multiple of minibatch_size 50"),
        ({"query_tokens": [10, 2]}, "query_tokens: shortest 10 exceeds longest 2"),
        ({"response_tokens": [9, 8]}, "response_tokens: shortest 9 exceeds longest 8"),
        ({"batches": 3, "checkpoints": 3}, "checkpoints: 3 moments need more than 3 batches"),
    ],
)
def test_settings_of_a_tuning_that_contradict_each_other_are_refused(raw, changes, expected):
    raw["tunings"]["ppo"] |= changes
    assert mistake(raw) == f"tunings.ppo: {expected}"
