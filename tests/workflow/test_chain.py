"""The whole chain on a tiny study, run from a folder that is not the repository."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import zarr

from tests.workflow.conftest import REPOSITORY


@pytest.fixture(scope="module")
def results(finished):
    return finished.workdir / "results"


def metrics(folder):
    return json.loads((folder / "manifest.json").read_text())["metrics"]


def layer(results):
    return json.loads((results / "divergence/main/chosen.json").read_text())["layers"][0]


def test_a_finished_run_has_nothing_left_to_do(finished):
    done = finished.snakemake("--", "all")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr


def test_every_stage_left_a_manifest_a_provenance_a_log_and_a_benchmark(finished, results):
    for stage in ("corpora", "models", "policies", "tokens", "activations", "divergence", "dictionaries", "comparison",
                  "interpretation", "reports"):  # fmt: skip
        manifests = list((results / stage).rglob("manifest.json"))
        assert manifests, stage
        assert all(path.with_name("provenance.json").exists() for path in manifests)
        assert list((finished.workdir / "logs" / stage).rglob("*.log")) or stage == "tokens"
        assert list((finished.workdir / "benchmarks" / stage).rglob("*.tsv"))


def test_no_work_folder_is_left_behind(results):
    assert [path for path in (results / ".work").rglob("*") if path.is_file()] == []


def test_the_policy_says_what_it_gained_and_what_it_cost(results):
    found = metrics(results / "policies/tiny.ppo")
    assert {"reward_base", "reward_tuned", "reward_gain", "reward_gain_ci95", "kl", "response_length_base"} <= set(found)
    assert found["evaluation_prompts"] == 16
    assert found["checkpoints"] == [2]
    assert (results / "policies/tiny.ppo/checkpoints/2/model.safetensors").exists()
    low, high = found["reward_gain_ci95"]
    assert low <= found["reward_gain"] <= high


def test_base_and_tuned_stores_hold_the_same_tokens_in_the_same_rows(results):
    kind = f"layers-{layer(results)}"
    stores = [
        zarr.open_group(results / f"activations/{policy}.texts/mlp/{kind}/store/activations.zarr", mode="r")
        for policy in ("tiny", "tiny.ppo")
    ]
    for name in ("token", "document", "position", "start", "held_out"):
        assert np.array_equal(stores[0][name][:], stores[1][name][:])
    acts = [store[f"layer/{layer(results)}/acts"][:] for store in stores]
    assert acts[0].shape == acts[1].shape == (3072, 16)
    assert not np.array_equal(acts[0], acts[1])


def test_the_dictionaries_lie_in_the_saelens_format_with_held_out_scores(results):
    folder = results / f"dictionaries/tiny.ppo.texts/mlp/layers-{layer(results)}/layer{layer(results)}/big"
    config = json.loads((folder / "saes/seed1/cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("standard", 16, 32)
    quality = metrics(folder)["seed1"]
    documented = re.search(r"\| dictionaries \| per `seed\{s\}`: (.*?) \(\[", (REPOSITORY / "docs/artifacts.md").read_text())[1]
    assert set(quality) == set(re.findall(r"`(\w+)`", documented))
    assert quality["rows_held_out"] > 0


def test_the_comparison_stands_beside_its_floor(results):
    entry = metrics(results / "comparison/main")["layers"][str(layer(results))]
    assert {"mmcs_small_big_base", "mmcs_small_big_tuned"} <= set(entry["sizes"])
    assert {"mmcs_base_tuned", "mmcs_floor", "mmcs_floor_ci95"} <= set(entry["dictionaries"]["small"])
    latents = pd.read_parquet(results / "comparison/main/latents.parquet")
    assert len(latents) == 2 * 2 * (16 + 32)  # roles × seeds × latents of small and big


def test_the_report_opens_from_disk_without_the_network(results):
    page = (results / "reports/main/index.html").read_text()
    assert "main" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_targets_of_single_stages_exist(finished):
    listed = finished.snakemake("--list-target-rules").stdout.split()
    assert {"all", "corpora", "models", "policies", "activations", "divergence", "dictionaries"} <= set(listed)
    assert {"comparison", "interpretation", "reports"} <= set(listed)
