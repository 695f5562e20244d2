"""The command line: help with examples, mistakes explained without a traceback, and a chain typed by hand."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
import torch
import typer
from small_artifacts import finish, write_policy
from small_tunings import entry
from typer.testing import CliRunner

from rlsae import cli
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.errors import RlsaeError

VERBS = typer.main.get_command(cli.app).commands
CONFIGURED = sorted(name for name, verb in VERBS.items() if any(p.name == "settings" for p in verb.params))


@pytest.fixture(autouse=True)
def settings_as_before(monkeypatch):
    """What a command changes for its whole process is put back."""
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def rlsae(monkeypatch):
    """Function of arguments: run a command in this process; raises SystemExit as the command line does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlsae", *map(str, arguments)])
        cli.main()

    return run


@pytest.fixture
def mistake(rlsae):
    """Function of arguments: the message that a command ends with."""

    def message(*arguments):
        with pytest.raises(SystemExit) as caught:
            rlsae(*arguments)
        assert isinstance(caught.value.code, str), "the command did not end with a message"
        return caught.value.code

    return message


def succeed(rlsae, *arguments):
    with pytest.raises(SystemExit) as caught:
        rlsae(*arguments)
    assert caught.value.code == 0


def process(*arguments, cwd):
    command = [sys.executable, "-m", "rlsae", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ)


@pytest.fixture
def config_file(raw, tmp_path):
    raw["studies"]["main"]["layers"] = [0]
    (tmp_path / "config.yaml").write_text(json.dumps(raw))
    return tmp_path / "config.yaml"


# --- help --------------------------------------------------------------------------------------------------------


def example(verb):
    """The words of a verb's example."""
    text = " ".join(VERBS[verb].help.split())
    return shlex.split(text.partition("Example: ")[2])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    result = CliRunner().invoke(cli.app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_uses_options_that_it_has_and_all_that_it_needs(verb):
    words = example(verb)
    assert words[:2] == ["rlsae", verb]
    used = {word for word in words if word.startswith("--")}
    options = [p for p in VERBS[verb].params if p.param_type_name == "option"]
    assert used <= {name for p in options for name in p.opts}
    assert {p.opts[0] for p in options if p.required} <= used


@pytest.mark.parametrize("verb", CONFIGURED)
def test_the_settings_of_an_example_are_json(verb):
    words = example(verb)
    text = words[words.index("--settings") + 1]
    if text != "...":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_is_described(verb):
    undescribed = [p.name for p in VERBS[verb].params if p.param_type_name == "option" and not p.help and p.name != "help"]
    assert undescribed == []


def test_without_a_verb_all_of_them_are_listed(tmp_path):
    output = CliRunner().invoke(cli.app, ["--help"]).output
    assert set(VERBS) <= set(re.findall(r"[\w-]+", output))


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_a_mistake_ends_a_command_with_status_1_its_message_and_no_traceback(tmp_path):
    result = process("studies", "none.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: cannot read the configuration none.yaml: No such file or directory\n"
    assert result.stdout == ""


def test_a_traceback_is_shown_to_those_who_ask_for_it(tmp_path):
    result = process("--debug", "studies", "none.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RlsaeError: cannot read the configuration none.yaml" in result.stderr


def test_debug_may_stand_behind_the_verb_too(rlsae):
    with pytest.raises(RlsaeError):
        rlsae("studies", "none.yaml", "--debug")


def test_an_unknown_verb_or_option_is_a_mistake_of_usage(tmp_path):
    for arguments in (["explode"], ["schema", "--fast"]):
        result = process(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def filled(verb, settings, folder):
    """Arguments of a verb with a value for everything that it needs."""
    arguments = [verb]
    for parameter in VERBS[verb].params:
        if parameter.name == "settings":
            arguments += ["--settings", settings]
        elif parameter.required:
            value = {"dictionary": f"base/0/a={folder}", "store": f"base={folder}", "part": 0, "layer": 0}.get(parameter.name)
            arguments += [parameter.opts[0], folder / parameter.name if value is None else value]
    return arguments


@pytest.mark.parametrize("verb", CONFIGURED)
def test_settings_that_are_no_json_are_refused_and_nothing_is_written(mistake, tmp_path, verb):
    message = mistake(*filled(verb, "{'seed': 0}", tmp_path))
    assert message.startswith("error: --settings")
    assert "JSON" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", CONFIGURED)
def test_settings_that_are_json_but_no_object_are_refused(mistake, tmp_path, verb):
    assert mistake(*filled(verb, "[]", tmp_path)).startswith("error: --settings")


@pytest.mark.parametrize(
    ("verb", "settings", "key"),
    [
        ("tokens", {"seed": 0, "drop_positions": 0}, "context_length"),
        ("tune", {"reward": {"kind": "lexicon"}}, "tuning"),
        ("tune", {"tuning": {"method": "ppo", "reward": "a", "corpus": "b"}}, "reward"),
        ("dictionary", {"l2": 3}, "l2"),
        ("interpret", {"latents": -1}, "latents"),
        ("corpus", {"documents": 10}, "source"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named(mistake, tmp_path, verb, settings, key):
    message = mistake(*filled(verb, json.dumps(settings), tmp_path))
    assert message.startswith("error: --settings")
    assert key in message


@pytest.mark.parametrize("key", ["small", "base/small", "base/x/small", "both/0/small", "base/0/", "/0/small"])
def test_a_dictionary_option_that_names_no_role_layer_and_name_is_refused_with_the_form(mistake, tmp_path, key):
    arguments = filled("compare", '{"dictionaries": ["small"], "sizes": null}', tmp_path)
    arguments[arguments.index("--dictionary") + 1] = f"{key}={tmp_path}"
    message = mistake(*arguments)
    assert message.startswith("error: --dictionary: expected base/LAYER/NAME=FOLDER or tuned/LAYER/NAME=FOLDER")
    assert repr(key) in message


@pytest.mark.parametrize("option", ["--dictionary", "--store"])
def test_an_option_without_its_folder_is_refused(mistake, tmp_path, option):
    arguments = filled("compare", '{"dictionaries": ["small"], "sizes": null}', tmp_path)
    arguments[arguments.index(option) + 1] = "base/0/small"
    assert mistake(*arguments) == "error: expected KEY=FOLDER, found 'base/0/small'"


def test_an_input_that_does_not_exist_is_named(mistake, tmp_path):
    settings = '{"seed": 0, "context_length": 8, "drop_positions": 0}'
    message = mistake(*filled("tokens", settings, tmp_path))
    assert message == f"error: model: {tmp_path / 'model'} does not exist"


def test_a_model_to_pretrain_needs_its_corpus_and_context(mistake, tmp_path):
    message = mistake("model", "--settings", '{"source": "pretrain", "corpus": "a"}', "--out", tmp_path / "out")
    assert message == "error: --corpus and a context_length in --settings are needed to pretrain a model"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_no_more_is_a_mistake_that_people_can_mend(mistake, monkeypatch, number):
    def fail():
        raise OSError(number, os.strerror(number), "results/a")

    monkeypatch.setattr(cli, "app", fail)
    message = mistake("schema")
    assert message.startswith(f"error: cannot write results/a: {os.strerror(number)}")
    assert "make room or choose another folder" in message


def test_a_mistake_of_ours_keeps_its_traceback(rlsae, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        rlsae("schema")


# --- looking -----------------------------------------------------------------------------------------------------


def test_the_studies_of_a_configuration_are_listed_with_lists_expanded(rlsae, raw, config_file, capsys):
    raw["tunings"]["ppo"]["seed"] = [0, 1]
    config_file.write_text(json.dumps(raw))
    succeed(rlsae, "studies", config_file)
    assert capsys.readouterr().out.splitlines() == [
        f"main-tuning-ppo-seed-{seed}: tiny against tiny.ppo-seed-{seed} on reviews, mlp, small, big" for seed in (0, 1)
    ]


def test_the_schema_that_is_printed_is_the_one_in_the_repository(rlsae, capsys):
    from rlsae.schema import schema_yaml

    succeed(rlsae, "schema")
    assert capsys.readouterr().out == schema_yaml()


def test_status_lists_what_is_missing_and_ends_with_status_1(rlsae, config_file, monkeypatch, capsys):
    monkeypatch.chdir(config_file.parent)
    with pytest.raises(SystemExit) as caught:
        rlsae("status", "config.yaml")
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "missing  results/corpora/reviews"
    assert lines[-1] == "missing  results/reports/main"


def test_status_tells_why_something_is_stale_and_is_satisfied_only_when_nothing_is(
    rlsae, raw, config_file, monkeypatch, capsys
):
    from rlsae.artifacts import digest
    from rlsae.expand import parse_config
    from rlsae.layout import Layout

    monkeypatch.chdir(config_file.parent)
    for artifact in Layout(parse_config(raw)).artifacts("main"):
        inputs = {"/".join(folder.parts[1:]): digest(folder / "manifest.json") for folder in artifact.inputs}
        finish(artifact.folder, artifact.stage, parameters=artifact.settings, inputs=inputs)
    succeed(rlsae, "status", "config.yaml")
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"current"}
    finish(config_file.parent / "results/comparison/main", "comparison", parameters={"dictionaries": ["small"], "sizes": None})
    with pytest.raises(SystemExit) as caught:
        rlsae("status", "config.yaml")
    assert caught.value.code == 1
    assert "stale    results/comparison/main: made with other settings: dictionaries" in capsys.readouterr().out


def test_orphans_are_listed_and_deleted_only_on_demand(rlsae, config_file, monkeypatch, capsys):
    monkeypatch.chdir(config_file.parent)
    orphan = finish(config_file.parent / "results/models/old", "models")
    named = finish(config_file.parent / "results/models/tiny", "models")
    succeed(rlsae, "orphans", "config.yaml")
    assert capsys.readouterr().out == "results/models/old\n"
    assert orphan.exists()
    succeed(rlsae, "orphans", "config.yaml", "--delete")
    assert not orphan.exists()
    assert named.exists()


# --- a chain typed by hand ---------------------------------------------------------------------------------------


def test_a_corpus_is_written_by_hand(rlsae, tmp_path):
    out = tmp_path / "results/corpora/mine"
    succeed(rlsae, "corpus", "--settings", '{"source": "generated", "documents": 20}', "--out", out)
    assert Manifest.read(out).metrics["documents"] == 20


def test_a_corpus_from_a_file_takes_its_path_beside_the_settings(rlsae, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    out = tmp_path / "results/corpora/mine"
    settings = '{"source": "file", "held_out": 0.25}'
    succeed(rlsae, "corpus", "--settings", settings, "--source", tmp_path / "a.txt", "--out", out)
    assert list(pd.read_parquet(out / "documents.parquet").text) == ["one", "two", "three", "four"]
    assert str(tmp_path) not in (out / MANIFEST).read_text()


@pytest.fixture
def results(random_model, tokenizer, tmp_path):
    """Results folder with a base model and one that was changed in its second layer."""
    base, tuned = random_model("gpt_neox"), random_model("gpt_neox")
    with torch.no_grad():
        tuned.get_submodule("gpt_neox.layers.1.mlp.dense_4h_to_h").weight.mul_(1.5)
    write_policy(tmp_path / "results/models/tiny", base, tokenizer)
    write_policy(tmp_path / "results/policies/tiny.ppo", tuned, tokenizer)
    recipe = {"tuning": entry().settings(), "reward": {"kind": "lexicon"}}
    finish(tmp_path / "results/policies/tiny.ppo", "policies", parameters=recipe)
    return tmp_path / "results"


def test_the_stages_behind_a_tuning_run_one_by_one_from_the_command_line(rlsae, results, corpus, monkeypatch):
    monkeypatch.setattr("rlsae.sae.evaluate.CE_DOCUMENTS", 8)
    tokens = results / "tokens/tiny.reviews"
    settings = '{"seed": 0, "context_length": 32, "drop_positions": 1}'
    succeed(rlsae, "tokens", "--settings", settings, "--model", results / "models/tiny", "--corpus", corpus, "--out", tokens)

    policies = {"base": results / "models/tiny", "tuned": results / "policies/tiny.ppo"}
    stores, dictionaries = {}, {}
    recipe = '{"batch_rows": 64, "epochs": 2, "seeds": [0, 1]}'
    for role, policy in policies.items():
        stores[role] = results / f"activations/{policy.name}.reviews/mlp/layers-0-1"
        settings = {"hook": "mlp", "layers": None, "rows": 1500, "rows_per_part": 1024, "dtype": "float16", "checkpoint": None}
        settings |= {"precision": "float32", "codec": None}
        shared = ["--settings", json.dumps(settings), "--policy", policy, "--tokens", tokens]
        shared += ["--work", results / f".work/{role}"]
        stamps = [results / f".work/{role}-part-{part}.json" for part in (0, 1)]
        for part, stamp in enumerate(stamps):
            options = ["--part", part, "--stamp", stamp, "--weights", policy / "model", "--threads", 1]
            succeed(rlsae, "extract", *shared, *options)
        options = [f"--stamp={stamp}" for stamp in stamps]
        succeed(rlsae, "consolidate", *shared, *options, "--out", stores[role])
        dictionaries[role] = results / f"dictionaries/{policy.name}.reviews/layer1/small"
        options = ["--activations", stores[role], "--weights", policy / "model", "--tokens", tokens]
        options += ["--out", dictionaries[role], "--threads", 1]
        succeed(rlsae, "dictionary", "--settings", recipe, "--layer", 1, *options)
    assert Manifest.read(stores["tuned"]).metrics["rows"] == 1500

    options = [f"--{role}={folder}" for role, folder in policies.items()]
    options += [f"--{role}-weights={folder / 'model'}" for role, folder in policies.items()]
    options += [f"--survey-{role}={folder}" for role, folder in stores.items()]
    settings = '{"layers": {"by": "weight_l2_sum", "order": "highest", "count": 1}}'
    options += ["--tokens", tokens, "--corpus", corpus, "--threads", 1]
    succeed(rlsae, "divergence", "--settings", settings, *options, "--out", results / "divergence/main")
    assert Manifest.read(results / "divergence/main").metrics["chosen_layers"] == [1]

    named = [f"--dictionary={role}/1/small={folder}" for role, folder in dictionaries.items()]
    named += [f"--store={role}={folder}" for role, folder in stores.items()]
    comparison = results / "comparison/main"
    settings = '{"dictionaries": ["small"], "sizes": null}'
    options = [f"--weights={role}={folder / 'model'}" for role, folder in policies.items()] + ["--tokens", tokens]
    succeed(rlsae, "compare", "--settings", settings, *named, *options, "--out", comparison, "--threads", 1)
    assert Manifest.read(comparison).metrics["layers"].keys() == {"1"}

    options = ["--comparison", comparison, "--out", results / "interpretation/main", "--corpus", corpus]
    options += [f"--{role}={folder}" for role, folder in policies.items()]
    options += [f"--tuned-weights={policies['tuned'] / 'model'}"]
    succeed(rlsae, "interpret", "--settings", '{"latents": 4}', *named, *options, "--threads", 1)
    explained = pd.read_parquet(results / "interpretation/main/latents.parquet")
    assert set(explained.role) == {"base", "tuned"}
    assert (explained.explanation != "").any()


def test_a_manifest_records_the_settings_with_the_defaults_that_were_not_typed(rlsae, tmp_path):
    out = tmp_path / "results/corpora/mine"
    succeed(rlsae, "corpus", "--settings", '{"source": "generated", "documents": 20}', "--out", out)
    recorded = Manifest.read(out).parameters
    assert recorded["documents"] == 20
    assert recorded["held_out"] == 0.1
    assert recorded["seed"] == 0
