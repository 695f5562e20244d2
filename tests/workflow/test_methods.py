"""Tunings that need other inputs than documents and a reward: preference pairs, a model from elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.workflow.conftest import TINY, Run

EVALUATED = {"evaluation_prompts": 8, "query_tokens": [2, 4], "response_tokens": [2, 6]}
METHODS = TINY | {
    "corpora": TINY["corpora"]
    | {"pairs": {"source": "file", "kind": "preferences", "path": "inputs/pairs.jsonl", "held_out": 0.5}},
    "tunings": {
        "dpo": {"method": "dpo", "reward": "words", "corpus": "pairs", "batches": 2, "batch_size": 4, **EVALUATED},
        "theirs": {"method": "external", "reward": "words", "corpus": "reviews", "path": "inputs/theirs", **EVALUATED},
    },
    "studies": {
        name: {
            "model": "tiny",
            "tuning": name,
            "corpus": "texts",
            "activation": "mlp",
            "layers": [0],
            "dictionaries": ["small"],
        }
        for name in ("dpo", "theirs")
    },
}


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory) -> Run:
    """A copy of the finished run, with the policies of both methods."""
    copied = Run(tmp_path_factory.mktemp("methods") / "copy")
    shutil.copytree(finished.folder, copied.folder)
    inputs = copied.workdir / "inputs"
    pairs = [{"prompt": f"film {n} was", "chosen": " good .", "rejected": " bad ."} for n in range(40)]
    (inputs / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shutil.copytree(copied.workdir / "results/models/tiny/model", inputs / "theirs")
    weights = load_file(inputs / "theirs/model.safetensors")
    torch.manual_seed(0)
    moved = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(moved, inputs / "theirs/model.safetensors", metadata={"format": "pt"})
    (copied.workdir / "methods.yaml").write_text(yaml.safe_dump(METHODS, sort_keys=False))
    done = copied.snakemake("--show-failed-logs", "--", "policies", config="methods.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return copied


def metrics(run: Run, policy: str) -> dict:
    return json.loads((run.workdir / f"results/policies/{policy}/manifest.json").read_text())["metrics"]


def test_preference_pairs_train_and_score_a_tuning(run):
    assert (run.workdir / "results/corpora/pairs/pairs.parquet").exists()
    found = metrics(run, "tiny.dpo")
    assert found["preference_pairs"] == 20
    assert 0 <= found["preference_accuracy"] <= 1
    assert found["evaluation_prompts"] == 8


def test_a_model_from_elsewhere_is_published_unchanged_with_its_evaluation(run):
    theirs, published = (
        load_file(folder / "model.safetensors")
        for folder in (run.workdir / "inputs/theirs", run.workdir / "results/policies/tiny.theirs/model")
    )
    assert all(torch.equal(theirs[name], published[name]) for name in theirs)
    assert metrics(run, "tiny.theirs")["kl"] > 0


def test_status_follows_the_files_of_these_tunings(run):
    (run.workdir / "inputs/theirs/config.json").write_text(
        (run.workdir / "inputs/theirs/config.json").read_text().replace("{", "{ ", 1)
    )
    states = run.rlsae("status", "methods.yaml").stdout
    assert "stale    results/policies/tiny.theirs" in states
    assert "current  results/policies/tiny.dpo" in states
