"""A configuration file: what it may hold, what its lists expand to, and how its mistakes are explained."""

from __future__ import annotations

import json

import pytest

from rlsae.config import AnyCorpus, AnyDictionary, FileCorpus, GeneratedCorpus, PPOTuning, PythonReward
from rlsae.errors import RlsaeError
from rlsae.expand import load, parse_config, parse_settings


def mistake(raw):
    """The message that a configuration is refused with."""
    with pytest.raises(RlsaeError) as caught:
        parse_config(raw)
    return str(caught.value)


def tuning(**changes):
    return PPOTuning(method="ppo", reward="lexicon", corpus="reviews", **changes)


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_file_and_its_plain_values_give_the_same_configuration(raw, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw))  # JSON is YAML
    assert load(path) == parse_config(raw)


def test_settings_left_out_take_their_defaults(raw):
    config = parse_config(raw)
    assert config.corpora["reviews"].context_length == 64
    assert config.studies["main"].layers.count == 2
    assert config.dictionaries["small"].seeds == [0, 1]


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RlsaeError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [b"corpora: [", b"corpora: \xff\xfe"])
def test_a_file_that_is_no_yaml_is_named(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(RlsaeError, match=r"broken\.yaml is not valid YAML"):
        load(path)


def test_a_name_that_is_written_twice_in_a_file_is_refused(raw, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw).replace('"small": {}', '"small": {}, "small": {"l1": 0.2}'))
    with pytest.raises(RlsaeError, match="small"):
        load(path)


@pytest.mark.parametrize("content", [None, [], "corpora"])
def test_a_configuration_that_is_no_mapping_is_told_its_sections(content):
    assert "must be a mapping with the sections corpora, models, rewards, tunings" in mistake(content)


def test_an_entry_cannot_be_changed_after_it_was_read(raw):
    with pytest.raises(ValueError, match="frozen"):
        parse_config(raw).dictionaries["small"].l1 = 1.0


def test_a_path_of_this_machine_is_no_setting_of_an_artifact():
    assert "path" not in FileCorpus(source="file", path="/data/reviews.txt").settings()
    assert "path" not in PythonReward(kind="python", path="/data/reward.py").settings()


def test_every_setting_but_a_path_shapes_the_artifact():
    assert set(tuning().settings()) == set(PPOTuning.model_fields)


# --- lists become families ---------------------------------------------------------------------------------------


def test_a_list_expands_to_one_entry_per_value_named_by_key_and_value(raw):
    raw["dictionaries"]["small"]["l1"] = [0.001, 0.0005]
    config = parse_config(raw)
    assert list(config.dictionaries) == ["small-l1-0p001", "small-l1-0p0005", "big"]
    assert config.dictionaries["small-l1-0p0005"].l1 == 0.0005


def test_several_lists_expand_to_their_product(raw):
    raw["dictionaries"]["small"] |= {"l1": [0.1, 0.2], "batch_rows": [512, 1024]}
    members = {name: (d.l1, d.batch_rows) for name, d in parse_config(raw).dictionaries.items() if name != "big"}
    assert members == {
        "small-l1-0p1-batch-rows-512": (0.1, 512),
        "small-l1-0p1-batch-rows-1024": (0.1, 1024),
        "small-l1-0p2-batch-rows-512": (0.2, 512),
        "small-l1-0p2-batch-rows-1024": (0.2, 1024),
    }


def test_a_list_of_one_value_is_a_family_too(raw):
    raw["dictionaries"]["small"]["l1"] = [0.5]
    assert parse_config(raw).studies["main"].dictionaries == ["small-l1-0p5", "big"]


@pytest.mark.parametrize(
    ("section", "entry", "key", "values", "names"),
    [
        ("dictionaries", "big", "normalize", [True, False], ["big-normalize-true", "big-normalize-false"]),
        ("tunings", "ppo", "kl_target", [None, 6.0], ["ppo-kl-target-null", "ppo-kl-target-6p0"]),
        ("dictionaries", "big", "l1", [0.00001], ["big-l1-1e-05"]),
        ("rewards", "lexicon", "scope", ["full"], ["lexicon-scope-full"]),
    ],
)
def test_every_scalar_has_a_name_that_is_a_slug(raw, section, entry, key, values, names):
    raw[section][entry][key] = values
    assert [name for name in getattr(parse_config(raw), section) if name.startswith(entry)] == names


def test_a_field_that_takes_a_list_is_not_expanded(raw):
    raw["dictionaries"]["small"]["seeds"] = [3, 4, 5]
    raw["tunings"]["ppo"]["query_tokens"] = [3, 4]
    raw["studies"]["main"]["layers"] = [0, 3]
    config = parse_config(raw)
    assert config.dictionaries["small"].seeds == [3, 4, 5]
    assert config.tunings["ppo"].query_tokens == (3, 4)
    assert config.studies["main"].layers == [0, 3]


def test_a_family_named_where_one_entry_is_expected_expands_in_turn(raw):
    raw["tunings"]["ppo"]["seed"] = [0, 1]
    studies = parse_config(raw).studies
    assert {name: study.tuning for name, study in studies.items()} == {
        "main-tuning-ppo-seed-0": "ppo-seed-0",
        "main-tuning-ppo-seed-1": "ppo-seed-1",
    }


def test_a_family_with_one_member_named_where_one_entry_is_expected_keeps_the_name_of_the_study(raw):
    raw["tunings"]["ppo"]["seed"] = [7]
    assert parse_config(raw).studies["main"].tuning == "ppo-seed-7"


def test_a_family_named_where_a_list_is_expected_stands_for_all_its_members(raw):
    raw["dictionaries"]["small"]["l1"] = [0.1, 0.2]
    assert parse_config(raw).studies["main"].dictionaries == ["small-l1-0p1", "small-l1-0p2", "big"]


def test_a_family_is_followed_through_several_sections(raw):
    raw["rewards"]["lexicon"]["scale"] = [0.1, 0.2]
    config = parse_config(raw)
    assert [t.reward for t in config.tunings.values()] == ["lexicon-scale-0p1", "lexicon-scale-0p2"]
    assert [s.tuning for s in config.studies.values()] == list(config.tunings)


def test_the_checkpoint_of_a_family_is_that_of_each_member(raw):
    raw["tunings"]["ppo"] |= {"seed": [0, 1], "checkpoints": 2}
    raw["studies"]["main"]["tuning"] = "ppo@8"
    assert {name: study.tuned for name, study in parse_config(raw).studies.items()} == {
        "main-tuning-ppo-seed-0-8": "tiny.ppo-seed-0@8",
        "main-tuning-ppo-seed-1-8": "tiny.ppo-seed-1@8",
    }


def test_one_name_can_pick_a_single_member_of_a_family(raw):
    raw["tunings"]["ppo"]["seed"] = [0, 1]
    raw["studies"]["main"]["tuning"] = "ppo-seed-1"
    assert list(parse_config(raw).studies) == ["main"]


def test_a_member_that_has_the_name_of_another_entry_is_refused(raw):
    raw["dictionaries"] |= {"small": {"l1": [0.1, 0.2]}, "small-l1-0p1": {}}
    assert mistake(raw) == "dictionaries.small-l1-0p1: two entries expand to this name; rename one of them"


def test_two_equal_values_in_a_list_are_refused(raw):
    raw["dictionaries"]["small"]["l1"] = [0.1, 0.1]
    assert mistake(raw) == "dictionaries.small: its lists expand to the name 'small-l1-0p1' twice"


def test_a_value_that_gives_no_slug_is_refused_with_the_way_out(raw):
    raw["rewards"]["lexicon"]["scale"] = [0.2, -0.2]
    message = mistake(raw)
    assert message.startswith("rewards.lexicon: its lists expand to the name 'lexicon-scale--0p2', which is no slug")
    assert "write these members as entries of their own" in message


def test_an_empty_list_is_refused_and_drops_no_entry_silently(raw):
    raw["dictionaries"]["small"]["l1"] = []
    assert "dictionaries.small" in mistake(raw)


# --- ${VARIABLE} -------------------------------------------------------------------------------------------------


def test_a_variable_is_filled_from_the_environment(raw, monkeypatch):
    monkeypatch.setenv("REVIEWS", "/data/reviews")
    raw["corpora"]["reviews"] = {"source": "file", "path": "${REVIEWS}/train.jsonl"}
    assert parse_config(raw).corpora["reviews"].path == "/data/reviews/train.jsonl"


def test_a_variable_that_is_not_set_is_named_with_its_key(raw, monkeypatch):
    monkeypatch.delenv("REVIEWS", raising=False)
    raw["corpora"]["reviews"] = {"source": "file", "path": "${REVIEWS}/train.jsonl"}
    expected = "the environment variable REVIEWS is not set; set it, or write the path out"
    assert mistake(raw) == f"corpora.reviews.path: {expected}"


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "key", "nearest"),
    [
        ("", "modles", "models"),
        ("tunings.ppo", "batchsize", "batch_size"),
        ("models.tiny", "layer", "layers"),
        ("corpora.reviews", "contextlength", "context_length"),
        ("studies.main", "dictionary", "dictionaries"),
        ("studies.main.layers", "cuont", "count"),
        ("studies.main.interpretation", "latent", "latents"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(raw, place, key, nearest):
    target = raw
    for part in place.split(".") if place else []:
        target = target.setdefault(part, {})
    target[key] = 1
    where = f"{place}.{key}" if place else key
    assert mistake(raw) == f"{where}: unknown key; did you mean {nearest}?"


def test_an_unknown_key_without_a_near_one_is_told_those_of_its_own_kind(raw):
    raw["corpora"]["reviews"]["zzz"] = 1
    known = "kind, seed, documents, held_out, context_length, drop_positions, source"  # not those of file and hub corpora
    assert mistake(raw) == f"corpora.reviews.zzz: unknown key; known here: {known}"


def test_a_key_that_belongs_to_another_form_of_layers_is_unknown(raw):
    raw["studies"]["main"]["layers"] = {"same_as": "main", "count": 2}
    assert mistake(raw) == "studies.main.layers.count: unknown key; known here: same_as"


@pytest.mark.parametrize("value", ["many", 1.5, None])
def test_a_value_of_the_wrong_type_is_named_with_what_was_found(raw, value):
    raw["tunings"]["ppo"]["batches"] = value
    message = mistake(raw)
    assert message.startswith("tunings.ppo.batches: input should be a valid integer")
    assert message.endswith(f"found {value!r}")


@pytest.mark.parametrize(
    ("section", "entry", "key", "value", "expected"),
    [
        ("tunings", "ppo", "discount", 1.5, "input should be less than or equal to 1, found 1.5"),
        ("corpora", "reviews", "held_out", 1, "input should be less than 1, found 1"),
        ("corpora", "reviews", "documents", 0, "input should be greater than 0, found 0"),
        ("models", "tiny", "vocabulary", 256, "input should be greater than or equal to 260, found 256"),
        ("activations", "mlp", "rows_per_part", 1000, "input should be a multiple of 1024, found 1000"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(raw, section, entry, key, value, expected):
    raw[section][entry][key] = value
    assert mistake(raw) == f"{section}.{entry}.{key}: {expected}"


@pytest.mark.parametrize("key", ["steps", "learning_rate"])
def test_true_is_no_number(raw, key):
    raw["models"]["tiny"][key] = True
    assert mistake(raw) == f"models.tiny: {key}: expected no truth value, found true"


def test_a_width_that_its_heads_cannot_share_is_refused(raw):
    raw["models"]["tiny"] |= {"width": 100, "heads": 3}
    assert mistake(raw) == "models.tiny: width: 100 channels cannot be shared among 3 heads"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused_because_no_manifest_can_hold_it(raw, value):
    raw["rewards"]["lexicon"]["scale"] = value
    assert "rewards.lexicon.scale" in mistake(raw)


@pytest.mark.parametrize(("section", "entry"), [("corpora", "reviews"), ("models", "tiny"), ("tunings", "ppo")])
def test_a_negative_seed_is_refused_because_no_generator_takes_it(raw, section, entry):
    raw[section][entry]["seed"] = -1
    assert f"{section}.{entry}.seed" in mistake(raw)


def test_a_seed_that_is_given_twice_is_refused_because_it_is_no_replication(raw):
    raw["dictionaries"]["small"]["seeds"] = [0, 0]
    assert "dictionaries.small.seeds" in mistake(raw)


def test_a_choice_among_words_is_refused_with_the_words(raw):
    raw["activations"]["mlp"]["dtype"] = "int8"
    assert mistake(raw) == "activations.mlp.dtype: expected one of 'float16' or 'float32', found 'int8'"


def test_an_unknown_source_is_refused_with_the_known_ones_and_its_key(raw):
    raw["corpora"]["reviews"]["source"] = "web"
    message = mistake(raw)
    assert message.startswith("corpora.reviews.source: ")
    assert "expected one of 'generated', 'file', 'hub', found " in message


def test_an_entry_without_its_source_is_told_so(raw):
    raw["corpora"]["reviews"] = {"documents": 10}
    assert mistake(raw) == "corpora.reviews: the key 'source' is missing"


def test_a_missing_key_is_named(raw):
    del raw["studies"]["main"]["model"]
    del raw["models"]["tiny"]["corpus"]
    assert mistake(raw) == "models.tiny.corpus: the key is missing\nstudies.main.model: the key is missing"


def test_a_missing_section_is_named(raw):
    del raw["studies"]
    assert mistake(raw) == "studies: the key is missing"


def test_the_path_of_a_file_corpus_is_missed_under_its_own_key(raw):
    raw["corpora"]["reviews"] = {"source": "file"}
    assert mistake(raw) == "corpora.reviews.path: the key is missing"


def test_a_key_that_has_the_name_of_its_source_is_still_named(raw):
    raw["models"]["tiny"] = {"source": "path", "path": 3}
    assert mistake(raw) == "models.tiny.path: input should be a valid string, found 3"


def test_an_entry_that_has_the_name_of_its_source_is_still_named(raw):
    raw["corpora"]["file"] = {"source": "file", "path": 3}
    assert mistake(raw) == "corpora.file.path: input should be a valid string, found 3"


def test_layers_of_the_wrong_form_are_told_all_forms(raw):
    raw["studies"]["main"]["layers"] = 3
    message = mistake(raw)
    assert message.startswith("studies.main.layers: ")
    assert all(form in message for form in ("all", "list", "same_as"))


@pytest.mark.parametrize("name", ["Big", "two--hyphens", "a.b", "a@1", "-a", "under_score", ""])
def test_a_name_that_is_no_slug_is_refused(raw, name):
    raw["dictionaries"][name] = {}
    assert f"{name!r} is no slug (lower-case letters, digits and single hyphens)" in mistake(raw)


@pytest.mark.parametrize("name", ["index", "paper"])
@pytest.mark.parametrize("section", ["dictionaries", "activations"])
def test_a_reserved_name_is_refused(raw, section, name):
    raw[section][name] = {}
    assert mistake(raw) == f"{section}.{name}: the name is reserved; choose another"


@pytest.mark.parametrize(
    ("section", "entry", "key", "value", "target", "known"),
    [
        ("models", "tiny", "corpus", "revews", "corpora", "reviews"),
        ("tunings", "ppo", "reward", "nice", "rewards", "lexicon"),
        ("studies", "main", "tuning", "dpo", "tunings", "ppo"),
        ("studies", "main", "activation", "attention", "activations", "mlp"),
    ],
)
def test_a_reference_to_no_entry_is_refused_with_the_known_ones(raw, section, entry, key, value, target, known):
    raw[section][entry][key] = value
    assert mistake(raw) == f"{section}.{entry}.{key}: no entry {value!r} in {target}; there are: {known}"


def test_a_reference_in_a_list_is_checked_too(raw):
    raw["studies"]["main"]["dictionaries"] = ["small", "huge"]
    assert mistake(raw) == "studies.main.dictionaries: no entry 'huge' in dictionaries; there are: small, big"


def test_a_reference_into_an_empty_section_says_that_it_is_empty(raw):
    raw["rewards"] = {}
    assert mistake(raw) == "tunings.ppo.reward: no entry 'lexicon' in rewards; there are: none"


def test_every_mistake_is_told_on_a_line_of_its_own(raw):
    raw["corpora"]["reviews"]["documents"] = 0
    raw["tunings"]["ppo"]["batchs"] = 3
    assert [line.split(":")[0] for line in mistake(raw).splitlines()] == [
        "corpora.reviews.documents",
        "tunings.ppo.batchs",
    ]


# --- what must fit together --------------------------------------------------------------------------------------


def test_the_layers_of_another_study_can_be_taken(raw):
    raw["studies"]["other"] = raw["studies"]["main"] | {"layers": {"same_as": "main"}}
    assert parse_config(raw).studies["other"].layers.same_as == "main"


def test_the_layers_of_a_study_that_does_not_exist_are_refused(raw):
    raw["studies"]["main"]["layers"] = {"same_as": "other"}
    assert mistake(raw) == "studies.main.layers.same_as: no entry 'other' in studies; there are: main"


@pytest.mark.parametrize(
    "same_as",
    [{"main": "main"}, {"main": "b", "b": "main"}, {"main": "b", "b": "c", "c": "b"}],
    ids=["a study and itself", "two studies", "a way into a circle"],
)
def test_studies_that_take_their_layers_from_each_other_are_refused(raw, same_as):
    raw["studies"] = {name: raw["studies"]["main"] | {"layers": {"same_as": other}} for name, other in same_as.items()}
    assert "layers.same_as: goes round in a circle: main" in mistake(raw)


@pytest.mark.parametrize(
    ("l1", "names", "twice"),
    [(0.1, ["small", "big", "small"], "small"), ([0.1, 0.2], ["small", "small-l1-0p2"], "small-l1-0p2")],
)
def test_a_dictionary_that_a_study_names_twice_is_refused(raw, l1, names, twice):
    raw["dictionaries"]["small"]["l1"] = l1
    raw["studies"]["main"]["dictionaries"] = names
    assert mistake(raw).startswith(f"studies.main.dictionaries: {twice!r} is named twice, found ['small")


def test_the_sizes_of_a_study_are_among_its_dictionaries(raw):
    raw["studies"]["main"] |= {"dictionaries": ["small"], "sizes": {"small": "small", "big": "big"}}
    assert mistake(raw) == "studies.main.sizes: 'big' is not among its dictionaries ['small']"


# --- settings on the command line --------------------------------------------------------------------------------


def test_settings_given_as_json_give_the_entry_back():
    entry = GeneratedCorpus(source="generated", documents=10)
    assert parse_settings(AnyCorpus, json.dumps(entry.settings())) == entry


def test_a_mistake_in_settings_given_as_json_is_explained_like_one_in_a_file():
    with pytest.raises(RlsaeError, match=r"--settings: epoch: unknown key; did you mean epochs\?"):
        parse_settings(AnyDictionary, '{"epoch": 3}')


def test_settings_that_are_no_json_are_refused():
    with pytest.raises(RlsaeError, match="--settings: invalid JSON"):
        parse_settings(AnyDictionary, "{")
