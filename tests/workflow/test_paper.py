"""The paper's studies: each is valid and can be planned without a network; its model families run through at toy size."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from rlsae.config import SameAs
from rlsae.expand import load
from rlsae.paper.published import published
from tests.workflow.conftest import REPOSITORY, clean_environment
from tests.workflow.small_families import FAMILIES, write_family

STUDIES = REPOSITORY / "studies" / "paper"
FILES = ["sentiment", "hh", "toxic", "sweeps", "local"]
MODELS = {"pythia-70m", "pythia-160m", "pythia-410m", "gpt-neo-125m", "gemma-2b-it"}
DATA = ("imdb-test.jsonl.gz", "hh-harmless.jsonl.gz")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder with the files that studies/paper/local.yaml names, empty but for the shape of its model."""
    for name in DATA:
        (tmp_path / name).touch()
    (tmp_path / "neox-imdb").mkdir()
    (tmp_path / "neox-imdb" / "config.json").write_text(json.dumps({"num_hidden_layers": 6, "hidden_size": 256}))
    for variable in ("RLSAE_DATA", "RLSAE_MODELS"):
        monkeypatch.setenv(variable, str(tmp_path))
    return tmp_path


def snakemake(folder, config, *arguments):
    command = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder)]
    command += ["--configfile", str(config), "--cores", "2", "--set-threads", "dictionary=1", "tune=1", "activation_part=1"]
    command += ["compare=1", "interpret=1"]
    environment = clean_environment() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=folder, env=environment)


def planned(folder, config):
    """Jobs of a dry run by rule."""
    done = snakemake(folder, config, "--dry-run", "--quiet", "host")
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.search(r"job +count\n[- ]+\n(.*?)\ntotal", done.stdout + done.stderr, re.DOTALL)[1]
    return {rule: int(count) for rule, count in (line.split() for line in table.splitlines())}


# --- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sentiment", "hh", "toxic"])
def test_every_model_has_a_study_as_in_the_paper_and_a_corrected_one(task):
    config = load(STUDIES / f"{task}.yaml")
    assert set(config.studies) == {f"{task}-{variant}-model-{model}" for variant in ("paper", "corrected") for model in MODELS}
    for name, study in config.studies.items():
        assert name.endswith(study.model)
        small, big = (config.dictionaries[size].expansion for size in (study.sizes.small, study.sizes.big))
        assert (study.layers.count, small, big) == (5, 1, 2)
        recipe, corrected = config.dictionaries[study.dictionaries[0]], "-corrected-" in name
        assert recipe.l1 == (2e-3 if corrected else 1.5e-3 if study.model == "gpt-neo-125m" else 1e-3)
        assert recipe.normalize == corrected
        assert len(recipe.seeds) == (2 if corrected else 1)


def test_every_repository_is_pinned_but_the_one_that_the_documentation_names(nowhere):
    unpinned = set()
    for file in FILES:
        config = load(STUDIES / f"{file}.yaml")
        for entry in (*config.corpora.values(), *config.models.values()):
            if entry.source == "hub" and not re.fullmatch("[0-9a-f]{40}", entry.revision):
                unpinned.add(entry.dataset)
    assert unpinned == {"unalignment/toxic-dpo-v0.2"}
    assert "unalignment/toxic-dpo-v0.2` is not pinned" in " ".join((REPOSITORY / "docs/paper.md").read_text().split())


def test_the_sweeps_vary_one_setting_each():
    config = load(STUDIES / "sweeps.yaml")
    recipes = {name: [config.dictionaries[d] for d in study.dictionaries] for name, study in config.studies.items()}
    l1 = [recipe.l1 for recipe in recipes["sweep-l1"]]
    assert (len(l1), l1[0], l1[-1]) == (11, 0.0005, 0.01)
    assert [recipe.expansion for recipe in recipes["sweep-width"]] == [0.5, 1, 2, 4, 8]
    assert [recipe.architecture for recipe in recipes["sweep-tied"]] == ["tied_relu", "relu"]
    assert [config.studies[f"sweep-layers-{order}"].layers.order for order in ("highest", "first")] == ["highest", "first"]


def test_what_is_published_names_models_and_tasks_of_the_studies():
    tasks = {"imdb-train", "hh-rlhf", "toxic-dpo"}
    assert set(published().model) <= MODELS | {"all", "untrained baseline"}
    assert set(published().tuned_on) <= tasks | {"all"}
    assert {load(STUDIES / f"{t}.yaml").tunings[n].corpus for t, n in (("sentiment", "ppo-paper"), ("hh", "dpo"))} <= tasks
    assert published().notna().all(axis=None)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_study_is_planned_up_to_the_choice_of_layers_and_in_full_with_explicit_ones(nowhere, file):
    config = load(STUDIES / f"{file}.yaml")
    jobs = planned(nowhere, STUDIES / f"{file}.yaml")
    assert jobs["rank_layers"] == sum(not isinstance(study.layers, SameAs) for study in config.studies.values())
    assert "dictionary" not in jobs
    raw = yaml.safe_load((STUDIES / f"{file}.yaml").read_text())
    for study in raw["studies"].values():
        study["layers"] = [0, 1]
    (nowhere / "explicit.yaml").write_text(yaml.safe_dump(raw))
    jobs = planned(nowhere, nowhere / "explicit.yaml")
    trained = {
        (policy, study.corpus, dictionary)
        for study in config.studies.values()
        for policy in (study.base, study.tuned)
        for dictionary in study.dictionaries
    }
    assert jobs["dictionary"] == 2 * len(trained)
    assert {jobs[rule] for rule in ("rank_layers", "compare", "interpret", "report_study")} == {len(config.studies)}
    assert not (nowhere / "results").exists()


# --- families --------------------------------------------------------------------------------------------------------


def toy(name):
    """The studies of the paper's families in small: PPO for the first two, DPO for the third."""
    tuning = "dpo" if name == "gemma" else "ppo"
    return {"model": name, "tuning": tuning, "corpus": "reviews", "activation": "mlp", "layers": {"count": 2}} | {
        "dictionaries": ["small", "big"],
        "sizes": {"small": "small", "big": "big"},
        "interpretation": {"latents": 4, "examples": 3, "interventions": {"prompts": 8, "random_sets": 2}}
        | {"probes": {"triples": 40}},
    }


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Results of the whole chain for one model of each family."""
    from rlsae.config import GeneratedCorpus
    from rlsae.corpora import read_documents

    folder = tmp_path_factory.mktemp("families")
    texts = read_documents(GeneratedCorpus(source="generated", documents=400)).text.tolist()
    for name in FAMILIES:
        write_family(name, texts, folder / "models" / name)
    ppo = {"method": "ppo", "reward": "vader", "corpus": "reviews", "batches": 2, "batch_size": 8, "minibatch_size": 8}
    dpo = {"method": "dpo", "reward": "vader", "corpus": "pairs", "batches": 2, "batch_size": 4}
    one = {"l1": 0.001, "epochs": 1, "batch_rows": 256, "seeds": [0]}
    config = {
        "corpora": {
            "reviews": {"source": "generated", "documents": 400, "context_length": 32, "drop_positions": 1},
            "pairs": {"source": "generated", "kind": "preferences", "documents": 120, "held_out": 0.25},
        },
        "models": {name: {"source": "path", "path": f"models/{name}"} for name in FAMILIES},
        "rewards": {"vader": {"kind": "lexicon"}},
        "tunings": {name: entry | {"evaluation_prompts": 16} for name, entry in (("ppo", ppo), ("dpo", dpo))},
        "activations": {"mlp": {"survey_rows": 1024, "rows": 3072}},
        "dictionaries": {"small": one, "big": one | {"expansion": 2}},
        "studies": {name: toy(name) for name in FAMILIES},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for target in ("all", "paper_tables"):
        done = snakemake(folder, folder / "study.yaml", "--show-failed-logs", "--", target)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "results"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_of_the_paper_runs_from_its_own_files_to_a_report(families, name):
    page = (families / "reports" / name / "index.html").read_text(encoding="utf-8")
    assert f"{name}.{'dpo' if name == 'gemma' else 'ppo'}" in page
    latents = pd.read_parquet(families / "comparison" / name / "latents.parquet")
    assert latents.layer.nunique() == 2
    assert latents.density.max() > 0


@pytest.mark.slow
def test_the_tables_hold_every_finished_study_beside_what_is_published(families):
    tables = {path.stem: pd.read_csv(path) for path in (families / "paper").glob("*.csv")}
    expected = {f"table{n}" for n in range(2, 13)} | {f"figure{n}" for n in (4, 5, 7, 8)}
    assert set(tables) == expected
    assert set(tables["table12"].study) == set(tables["figure7"].study.dropna()) == set(FAMILIES)
    assert tables["table3"].study.dropna().tolist() == ["gemma"]
    theirs = tables["table4"].set_index("model").published_p
    assert theirs[["pythia-70m", "pythia-160m", "gpt-neo-125m"]].tolist() == [0.26, 0.014, 0.48]
    assert (families / "paper" / "figure5.svg").read_text().count("gemma") == 1
    assert "## Table 12" in (families / "paper" / "tables.md").read_text()
