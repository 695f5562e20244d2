"""The JSON schema of the configuration: generated, in step with the code, and right about what the code accepts."""

from __future__ import annotations

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml

from rlsae.config import SECTIONS, Config
from rlsae.errors import RlsaeError
from rlsae.expand import parse_config
from rlsae.schema import schema, schema_yaml

REPOSITORY = Path(__file__).parents[2]
CONFIGURATIONS = [REPOSITORY / "config.yaml", *sorted((REPOSITORY / "studies").glob("*.yaml"))]


@pytest.fixture(scope="module")
def validator():
    return jsonschema.Draft202012Validator(schema())


def refused(validator, raw):
    """Path and message of every mistake that the schema finds."""
    return {".".join(map(str, error.absolute_path)): error.message for error in validator.iter_errors(raw)}


def agree(validator, raw):
    """Whether schema and code both accept a configuration; they must not differ."""
    accepted = validator.is_valid(raw)
    try:
        parse_config(copy.deepcopy(raw))
    except RlsaeError:
        assert not accepted
        return False
    assert accepted
    return True


def test_the_schema_in_the_repository_is_the_one_that_the_code_gives():
    path = REPOSITORY / "workflow/schemas/config.schema.yaml"
    assert path.read_text(encoding="utf-8") == schema_yaml(), "run: rlsae schema > workflow/schemas/config.schema.yaml"


def test_the_schema_is_itself_valid_and_reads_back_as_it_was_written():
    jsonschema.Draft202012Validator.check_schema(schema())
    assert yaml.safe_load(schema_yaml()) == schema()


def test_the_written_schema_says_that_it_is_generated_and_how():
    assert "rlsae schema" in schema_yaml().splitlines()[0]
    assert "Do not edit" in schema_yaml().splitlines()[0]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_the_configurations_of_the_repository_are_valid(validator, path, monkeypatch):
    monkeypatch.setenv("RLSAE_DATA", "/data")
    monkeypatch.setenv("RLSAE_MODELS", "/models")
    assert agree(validator, yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_the_editor_of_a_configuration_finds_the_schema(path):
    first = path.read_text().splitlines()[0]
    if first.startswith("# yaml-language-server: $schema="):
        assert (path.parent / first.partition("$schema=")[2]).exists()
    else:
        assert path.parent.name == "studies"


@pytest.mark.parametrize(
    ("section", "name", "key", "values"),
    [
        ("corpora", "reviews", "seed", [0, 1]),
        ("corpora", "reviews", "documents", [10, 20]),
        ("models", "tiny", "width", [32, 64]),
        ("rewards", "lexicon", "scope", ["response", "full"]),
        ("tunings", "ppo", "kl_target", [3.0, None]),
        ("activations", "mlp", "dtype", ["float16", "float32"]),
        ("dictionaries", "small", "l1", [0.01, 0.02]),
        ("dictionaries", "small", "normalize", [True, False]),
    ],
)
def test_a_list_may_stand_for_any_scalar_and_its_values_are_checked(validator, raw, section, name, key, values):
    del raw["studies"]["main"]  # some of these lists expand what a study names once
    raw[section][name][key] = values
    if section in ("corpora", "rewards"):
        assert refused(validator, raw) == {}
    else:
        assert agree(validator, raw)
    raw[section][name][key] = [*values, {"no": "scalar"}]
    assert not validator.is_valid(raw)


def test_a_study_may_name_a_list_of_tunings(validator, raw):
    raw["tunings"]["ppo"]["seed"] = [0, 1]
    raw["studies"]["main"]["tuning"] = ["ppo-seed-0", "ppo-seed-1"]
    assert agree(validator, raw)


def test_a_setting_that_is_a_list_is_not_expanded_again(validator, raw):
    raw["dictionaries"]["small"]["seeds"] = [0, 1, 2]
    assert agree(validator, raw)
    raw["dictionaries"]["small"]["seeds"] = [[0, 1], [2]]
    assert not validator.is_valid(raw)


@pytest.mark.parametrize(
    "layers",
    [[0, 2], "all", {"count": 1}, {"by": "weight_l2_relative", "order": "last"}, {"order": "first", "count": 3}],
    ids=str,
)
def test_layers_may_be_written_in_every_form(validator, raw, layers):
    raw["studies"]["main"]["layers"] = layers
    assert agree(validator, raw)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(corpuses={}),
        lambda raw: raw.pop("dictionaries"),
        lambda raw: raw["dictionaries"]["small"].update(l2=1),
        lambda raw: raw["dictionaries"]["small"].update(l1="much"),
        lambda raw: raw["dictionaries"]["small"].update(l1=-1),
        lambda raw: raw["dictionaries"]["small"].update(seeds=[]),
        lambda raw: raw["dictionaries"].update({"Small one": {}}),
        lambda raw: raw["activations"]["mlp"].update(rows_per_part=1000),
        lambda raw: raw["activations"]["mlp"].update(hook="mlp."),
        lambda raw: raw["corpora"]["reviews"].update(source="web"),
        lambda raw: raw["corpora"]["reviews"].pop("source"),
        lambda raw: raw["corpora"]["reviews"].update(held_out=1.0),
        lambda raw: raw["studies"]["main"].update(layers="none"),
        lambda raw: raw["studies"]["main"].update(layers=[]),
        lambda raw: raw["studies"]["main"].update(layers={"order": "middle"}),
        lambda raw: raw["studies"]["main"].update(dictionaries=[]),
        lambda raw: raw["studies"]["main"].update(sizes={"small": "small"}),
        lambda raw: raw["studies"]["main"].pop("corpus"),
    ],
    ids=[
        "unknown section",
        "missing section",
        "unknown key",
        "text for a number",
        "negative",
        "no seeds",
        "name that is no slug",
        "rows per part",
        "hook",
        "source",
        "no source",
        "held out",
        "layers by word",
        "no layers",
        "order",
        "no dictionaries",
        "one size",
        "no corpus",
    ],
)
def test_what_the_code_refuses_the_schema_refuses(validator, raw, change):
    change(raw)
    assert not agree(validator, raw)


def test_the_schema_accepts_the_shared_example(validator, raw):
    assert agree(validator, raw)


def properties(content):
    """(definition, key, field) of every setting."""
    for name, definition in {"Config": content, **content["$defs"]}.items():
        for key, field in definition.get("properties", {}).items():
            yield name, key, field


def test_every_setting_but_a_discriminator_is_described():
    undescribed = {
        f"{name}.{key}" for name, key, field in properties(schema()) if "description" not in field and "const" not in field
    }
    assert undescribed == set()


def test_every_section_is_described_and_nothing_of_the_code_shows():
    content = schema()
    assert set(content["properties"]) == set(SECTIONS) == set(Config.model_fields)
    assert all(section["description"] for section in content["properties"].values())
    assert "entry_of" not in schema_yaml()
    assert not any("file" in field for _, _, field in properties(content))
