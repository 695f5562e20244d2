"""Crosscoders, dictionaries of the difference and stage-wise dictionaries go through the whole workflow, to the report."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import yaml

from rlsae.sae.dictionary import SparseAutoencoder
from tests.workflow.conftest import TINY, Run

RECIPE = {"architecture": "topk", "k": 4, "expansion": 2, "epochs": 1, "batch_rows": 256}
DICTIONARIES = {
    "pair": RECIPE,
    "cross": RECIPE | {"architecture": "batchtopk", "reads": "both"},
    "difference": RECIPE | {"reads": "difference"},
    "new-data": RECIPE | {"start": "from_base", "continues": "pair", "continues_on": "reviews"},
    "new-model": RECIPE | {"start": "from_base", "continues": "pair"},
    "data-first": RECIPE | {"start": "from_base", "continues": "new-data"},
    "model-first": RECIPE | {"start": "from_own", "continues": "new-model", "continues_on": "reviews"},
}
STUDY = {"model": "tiny", "tuning": "ppo", "corpus": "texts", "activation": "mlp", "layers": [1]}
EXPLAINED = {"latents": 4, "examples": 3, "probes": None}
INTERVENED = EXPLAINED | {"interventions": {"prompts": 8, "random_sets": 1, "latents": 3, "gains": [2]}}
ALONE = EXPLAINED | {"interventions": None}
CONFIG = TINY | {
    "dictionaries": DICTIONARIES,
    "studies": {
        "joint": STUDY | {"interpretation": INTERVENED} | {"dictionaries": ["pair", "cross", "difference"]},
        "stages": STUDY | {"interpretation": ALONE} | {"dictionaries": ["data-first", "model-first"]},
        "alone": STUDY | {"interpretation": ALONE} | {"dictionaries": ["cross"]},
    },
}
FOLDER = "results/dictionaries/{policy}.{corpus}/mlp/layers-1/layer1/{name}"


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory) -> Run:
    """A copy of the finished run, and three studies in it."""
    copied = Run(tmp_path_factory.mktemp("beyond") / "copy")
    shutil.copytree(finished.folder, copied.folder)
    (copied.workdir / "beyond.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    done = copied.snakemake("--show-failed-logs", "--rerun-triggers", "input", "--", "all", config="beyond.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return copied


def table(run: Run, study: str, name: str, stage: str = "comparison") -> pd.DataFrame:
    return pd.read_parquet(run.workdir / f"results/{stage}/{study}/{name}.parquet")


def test_a_dictionary_of_both_models_belongs_to_the_tuned_policy_and_knows_what_it_reads(run):
    for name, channels in (("cross", 32), ("difference", 16)):
        assert not (run.workdir / FOLDER.format(policy="tiny", corpus="texts", name=name)).exists()
        folder = run.workdir / FOLDER.format(policy="tiny.ppo", corpus="texts", name=name)
        sae = SparseAutoencoder.load(folder / "saes/seed0")
        assert (sae.reads, sae.channels, sae.latents) == ("both" if name == "cross" else name, channels, 32)
        scores = json.loads((folder / "manifest.json").read_text())["metrics"]["seed0"]
        assert {"fvu", "l0", "ce_recovered", "kl_recovered"} <= scores.keys()
        assert ({"fvu_base", "fvu_tuned"} <= scores.keys()) == (name == "cross")


def test_its_latents_are_tested_once_and_tell_the_model_in_which_they_write_more(run):
    latents = table(run, "joint", "latents")
    assert latents.groupby("dictionary").role.unique().map(list).to_dict() == {
        "pair": ["base", "tuned"], "cross": ["tuned"], "difference": ["tuned"],
    }  # fmt: skip
    live = latents[latents.firings > 0].set_index("dictionary")
    assert (live.loc["pair"].own == live.loc["pair"].role).all()
    assert set(live.loc["cross"].own) <= {"base", "tuned"}
    assert live.loc["cross"].norm_ratio.between(0, 1).all()
    assert live.loc[["pair", "difference"]].norm_ratio.isna().all()
    assert live.loc["cross"].scale_error.notna().all()
    assert (live.loc["cross"].match_latent == -1).all()


def test_every_kind_stands_in_the_table_of_what_latents_carry(run):
    carried = table(run, "joint", "carried", "interpretation")
    assert set(carried.reads) <= {"own", "both", "difference"}
    assert carried.columns.tolist()[:6] == ["layer", "dictionary", "seed", "reads", "set", "latents"]


def test_stage_wise_dictionaries_tell_how_far_each_latent_turned_when_the_model_changed(run):
    latents = table(run, "stages", "latents").set_index(["dictionary", "role", "seed", "latent"])
    assert latents.model_step_cosine.between(-1, 1 + 1e-5).all()
    step = SparseAutoencoder.load(
        run.workdir / FOLDER.format(policy="tiny.ppo", corpus="reviews", name="new-model") / "saes/seed0"
    ).model_step_F
    model_first = latents.loc["model-first", "tuned", 0].model_step_cosine
    assert model_first.tolist() == pytest.approx(step.tolist())


@pytest.mark.parametrize("study", CONFIG["studies"])
def test_each_study_has_its_report(run, study):
    assert (run.workdir / f"results/reports/{study}/index.html").exists()


def test_nothing_that_the_studies_need_is_an_orphan_and_status_knows_all_of_it(run):
    status = run.rlsae("status", "beyond.yaml")
    assert status.returncode == 0, status.stderr
    assert "stale" not in status.stdout
    kept = run.rlsae("orphans", "beyond.yaml").stdout
    for name in DICTIONARIES:
        assert f"layer1/{name}" not in kept
    assert run.planned(target="all", config="beyond.yaml") == {}
