"""Exactly the right stages rerun: the table of docs/caching.md, one dry run per row on a copy of a finished run."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

REPORTS = {"report_study", "report_studies"}
AFTER_DICTIONARY = {"compare", "interpret"} | REPORTS
AFTER_STORE = {"dictionary"} | AFTER_DICTIONARY
AFTER_POLICY = {"activation_part", "activation_store", "rank_layers"} | AFTER_STORE
AFTER_CORPUS = {"tokens"} | AFTER_POLICY
AFTER_MODEL = AFTER_CORPUS | {"tune"}


def behind_the_checkpoint(rules):
    """What a dry run can show: when the choice of layers is redone, nothing behind it is planned yet."""
    return rules - AFTER_STORE if "rank_layers" in rules else rules


def touch(path, text):
    path.write_text(text)
    os.utime(path)


def test_nothing_changed_nothing_runs(run):
    assert run.planned() == {}


def test_other_cores_and_jobs_rerun_nothing(run):
    assert run.planned("--cores", "1", "--jobs", "3") == {}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dictionaries.big.l1", 0.02, AFTER_STORE),
        ("dictionaries.small.seeds", [0, 1, 2], AFTER_STORE),
        ("corpora.texts.context_length", 30, behind_the_checkpoint(AFTER_CORPUS)),
        ("corpora.texts.held_out", 0.3, behind_the_checkpoint({"corpus"} | AFTER_CORPUS)),
        ("models.tiny.steps", 5, behind_the_checkpoint({"model"} | AFTER_MODEL)),
        ("tunings.ppo.kl_coefficient", 0.3, behind_the_checkpoint({"tune"} | AFTER_POLICY)),
        ("rewards.words.scale", 0.3, behind_the_checkpoint({"tune"} | AFTER_POLICY)),
        ("activations.mlp.rows", 2048, {"activation_part", "activation_store"} | AFTER_STORE),
        ("activations.mlp.survey_rows", 2048, behind_the_checkpoint(AFTER_POLICY)),
        ("studies.main.layers.count", 2, {"rank_layers"}),
        ("studies.main.interpretation.examples", 4, {"interpret"} | REPORTS),
    ],
)  # fmt: skip
def test_a_changed_setting_reruns_what_it_shapes_and_what_follows(run, key, value, expected):
    run.set(key, value)
    assert set(run.planned()) == expected


def test_only_the_dictionaries_of_the_changed_recipe_rerun(run):
    run.set("dictionaries.big.l1", 0.02)
    assert run.planned()["dictionary"] == 2  # base and tuned, one layer, of `big` alone


def test_the_order_of_keys_and_an_equal_number_rerun_nothing(run):
    content = run.config()
    content["dictionaries"] = {
        "big": {"batch_rows": 256, "epochs": 1, "expansion": 2.0},
        "small": {"batch_rows": 256, "epochs": 1, "expansion": 1.0},
    }
    run.write_config(content)
    assert run.planned() == {}


def test_an_added_study_runs_alone_and_shares_what_it_can(run):
    content = run.config()
    chosen = json.loads((run.workdir / "results/divergence/main/chosen.json").read_text())["layers"]
    other = {"layers": [(chosen[0] + 1) % 3], "sizes": None, "dictionaries": ["small"]}
    content["studies"]["more"] = content["studies"]["main"] | other
    run.write_config(content)
    planned = run.planned()
    shared = {"corpus", "model", "tune", "tokens"}
    assert not shared & set(planned)
    assert planned["dictionary"] == 2
    assert planned["activation_store"] == 2  # the survey is shared


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("texts.jsonl", json.dumps({"text": "a good film"}) + "\n", {"corpus"} | AFTER_CORPUS),
        ("words.tsv", "good\t1.0\n", {"tune"} | AFTER_POLICY),
    ],
)
def test_a_changed_file_reruns_what_was_made_from_it(run, name, text, expected):
    touch(run.workdir / "inputs" / name, text)
    assert set(run.planned()) == behind_the_checkpoint(expected)


def test_the_source_file_of_a_python_reward_is_an_input(run):
    assert run.planned(target="policies", config="other.yaml") == {}
    touch(run.workdir / "inputs/own_reward.py", "def reward(prompts, responses):\n    return [0.0 for _ in responses]\n")
    assert set(run.planned(target="policies", config="other.yaml")) == {"tune"}


def test_every_file_of_a_local_model_folder_is_an_input(run):
    touch(run.workdir / "inputs/model/generation_config.json", "{}")
    assert set(run.planned(target="policies", config="other.yaml")) == {"model", "tune"}


def test_a_file_that_was_only_touched_reruns_nothing(run):
    (run.workdir / "inputs/texts.jsonl").touch()
    assert run.planned() == {}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("sae/tied_relu.py", AFTER_STORE),
        ("models.py", behind_the_checkpoint({"model"} | AFTER_MODEL)),
        ("tuning/ppo.py", behind_the_checkpoint({"tune"} | AFTER_POLICY)),
        ("interpretation/examples.py", {"interpret"} | REPORTS),
        ("report/build.py", REPORTS),
        ("config/__init__.py", set()),
    ],
)
def test_changed_code_reruns_the_stages_that_import_it(run, module, expected):
    path = run.repository / "rlsae" / module
    path.write_text(path.read_text() + "\n\ndef added() -> int:\n    return 1\n")
    assert set(run.planned()) == expected


def test_a_comment_or_docstring_reruns_nothing(run):
    path = run.repository / "rlsae/sae/train.py"
    text = re.sub(r'^"""', '"""Said better. ', path.read_text(), count=1)
    path.write_text(text + "\n# a comment\n")
    assert run.planned() == {}


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ("tokens/tiny.texts/store", AFTER_CORPUS),
        ("activations/tiny.texts/mlp/survey/store", {"activation_part", "activation_store", "rank_layers"} | REPORTS),
        ("policies/tiny.ppo/manifest.json", {"tune"} | AFTER_POLICY),
        ("comparison/main/manifest.json", AFTER_DICTIONARY),
    ],
)
def test_what_is_deleted_is_made_again(run, lost, expected):
    path = run.workdir / "results" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert set(run.planned()) == expected


def test_a_deleted_training_store_brings_all_its_parts_back(run):
    (store,) = run.workdir.glob("results/activations/tiny.texts/mlp/layers-*/store")
    shutil.rmtree(store)
    planned = run.planned()
    assert planned["activation_part"] == 2
    assert set(planned) == {"activation_part", "activation_store"} | AFTER_STORE


def test_after_a_lost_snakemake_folder_nothing_runs_and_status_still_sees_a_change(run):
    shutil.rmtree(run.workdir / ".snakemake")
    assert run.planned() == {}
    run.set("dictionaries.big.l1", 0.02)
    assert run.planned() == {}  # Snakemake kept what it knew of parameters in there
    states = run.rlsae("status", "study.yaml").stdout
    assert re.search(r"stale +results/dictionaries/tiny.texts\S+/big: made with other settings: l1", states)
    assert re.search(r"stale +results/reports/main: made from \S+, which is not current", states)


def test_touch_accepts_a_code_change_without_running_anything(run):
    path = run.repository / "rlsae/sae/tied_relu.py"
    path.write_text(path.read_text() + "\n\ndef added() -> int:\n    return 1\n")
    before = (run.workdir / "results/reports/main/manifest.json").read_bytes()
    done = run.snakemake("--touch", "--", "all")
    assert done.returncode == 0
    assert run.planned() == {}
    assert (run.workdir / "results/reports/main/manifest.json").read_bytes() == before


def test_a_failed_upstream_rerun_leaves_no_report_that_passes_as_current(run):
    run.set("tunings.ppo.evaluation_prompts", 100_000)  # more than there are held-out documents
    failed = run.snakemake("--", "all")
    assert failed.returncode != 0
    assert "tune" in run.planned()  # not "nothing to be done"
    states = run.rlsae("status", "study.yaml")
    assert states.returncode == 1
    assert "missing  results/policies/tiny.ppo" in states.stdout
    banner = (run.workdir / "results/reports/main/status.js").read_text()
    assert "which is not current" in banner or "made from another" in banner


def test_orphans_are_what_no_configuration_names(run):
    listed = [Path(line) for line in run.rlsae("orphans", "study.yaml").stdout.split()]
    assert listed == [Path("results/models/local"), Path("results/policies/local.own-ppo")]
    run.rlsae("orphans", "study.yaml", "--delete")
    assert not (run.workdir / "results/policies/local.own-ppo").exists()
    assert run.planned() == {}


def test_stores_that_are_not_kept_go_once_they_are_used_and_nothing_reruns(run):
    run.set("activations.mlp.rows", 2048)
    run.set("activations.mlp.keep", False)
    done = run.snakemake("--show-failed-logs", "--", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(run.workdir.glob("results/activations/*/mlp/layers-*/store"))
    assert len(list(run.workdir.glob("results/activations/*/mlp/layers-*/manifest.json"))) == 2
    assert run.planned() == {}
    assert run.rlsae("status", "study.yaml").stdout.count("stale") == 0
