"""The demo study as a newcomer runs it: config.yaml as it stands, in a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from tests.workflow.conftest import REPOSITORY, clean_environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = snakemake(folder, "--set-threads", "dictionary=1", "activation_part=1", "compare=1", "--show-failed-logs")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder)]
    return subprocess.run(
        [*command, "--cores", "2", *arguments], capture_output=True, text=True, env=clean_environment(), cwd=folder
    )


def test_the_tuning_gains_at_least_one_at_a_kl_of_at_most_eight(demo):
    metrics = json.loads((demo / "results/policies/tiny.ppo/manifest.json").read_text())["metrics"]
    assert metrics["reward_gain"] >= 1.0
    assert metrics["reward_gain_ci95"][0] > 0
    assert metrics["kl"] <= 8


def test_the_dictionaries_reconstruct_held_out_rows(demo):
    manifests = list((demo / "results/dictionaries").rglob("manifest.json"))
    assert len(manifests) == 8  # base and tuned, two layers, small and big
    for path in manifests:
        for seed in json.loads(path.read_text())["metrics"].values():
            assert seed["fvu"] < 0.1
            assert seed["dead_share"] < 0.6  # the generated language has some ninety directions


def test_explanations_tell_firing_rows_from_others_on_held_out_documents(demo):
    latents = pd.read_parquet(demo / "results/interpretation/demo/latents.parquet")
    assert latents.detection_auc.notna().sum() >= 100
    assert latents.detection_auc.mean() > 0.7


def test_the_latents_that_raise_the_reward_carry_it(demo):
    ablations = pd.read_parquet(demo / "results/interpretation/demo/ablations.parquet")
    reward = ablations[(ablations.policy == "tuned") & (ablations.set == "reward")]
    assert len(reward) == 4
    assert (reward.reward_change < 0).all()
    assert (reward.random_quantile >= 0.95).sum() >= 3


def test_everything_is_current_and_a_second_run_does_nothing(demo):
    again = snakemake(demo)
    assert "Nothing to be done" in again.stdout + again.stderr
    command = [sys.executable, "-m", "rlsae", "status", str(REPOSITORY / "config.yaml")]
    status = subprocess.run(command, capture_output=True, text=True, cwd=demo, env=clean_environment())
    assert status.returncode == 0, status.stdout


def test_the_tutorial_runs_on_its_results(demo):
    nbclient = pytest.importorskip("nbclient", reason="nothing executes notebooks here (make notebook)")
    notebook = nbformat.read(REPOSITORY / "docs/tutorial.ipynb", as_version=4)
    environment = {"RLSAE_RESULTS": str(demo / "results"), "PYTHONPATH": str(REPOSITORY)}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(env=clean_environment() | environment)


def test_snakemake_packs_its_own_report(demo):
    done = snakemake(demo, "--report", "report.zip")
    assert done.returncode == 0, done.stderr
    assert (demo / "report.zip").stat().st_size > 100_000
