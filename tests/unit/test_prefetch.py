"""What a configuration wants from the hub is fetched ahead, recorded, and read without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_artifacts import write_policy
from small_hub import COMMIT, serving

from rlsae.expand import load
from rlsae.hub import wanted

ROOT = Path(__file__).parents[2]
CONFIG = {
    "corpora": {"reviews": {"source": "hub", "dataset": "small/reviews"}},
    "models": {"tiny": {"source": "hub", "repository": "small/model"}},
    "rewards": {"words": {"kind": "lexicon"}, "judge": {"kind": "classifier", "repository": "small/model", "label": "good"}},
    "tunings": {"theirs": {"method": "external", "repository": "small/other", "revision": "v2", "reward": "words"}},
    "activations": {"mlp": {}},
    "dictionaries": {"small": {"expansion": 1}},
    "studies": {
        "main": {"model": "tiny", "tuning": "theirs", "corpus": "reviews", "activation": "mlp"}
        | {"layers": [0], "dictionaries": ["small"]},
    },
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "study.yaml"
    CONFIG["tunings"]["theirs"]["corpus"] = "reviews"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def repositories(tmp_path, random_model, tokenizer):
    """Folders that a hub serves: two models, and a data set."""
    folders = {}
    for name in ("small/model", "small/other"):
        policy = write_policy(tmp_path / "hub" / name.replace("/", "-"), random_model("gpt_neox"), tokenizer)
        folders["models", name] = policy / "model"
        (policy / "model" / "pytorch_model.bin").write_bytes(b"what has to be unpickled is left alone")
    data = tmp_path / "hub" / "reviews"
    data.mkdir()
    rows = "".join(json.dumps({"text": f"review {i}"}) + "\n" for i in range(20))
    (data / "train.jsonl").write_text(rows)
    return folders | {("datasets", "small/reviews"): data}


@pytest.fixture
def prefetch(config, tmp_path):
    """Function of the address of a hub: the verb, in a process and with a cache of its own."""

    def run(address, *code, offline=False):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        environment |= {"HF_HUB_OFFLINE": "1"} if offline else {"HF_HUB_DISABLE_XET": "1"}
        command = ["-c", *code] if code else ["-m", "rlsae", "prefetch", str(config), "--record", str(tmp_path / "record.json")]
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=tmp_path)

    return run


def test_every_repository_of_a_configuration_is_wanted_once(config):
    names = [(one.key, one.kind, one.repository, one.revision) for one in wanted(load(config))]
    assert names == [
        ("corpora.reviews", "dataset", "small/reviews", None),
        ("models.tiny", "model", "small/model", "main"),  # the classifier is the same one
        ("tunings.theirs", "model", "small/other", "v2"),
    ]


def test_what_was_fetched_is_recorded_and_then_read_without_a_network(prefetch, repositories, tmp_path):
    with serving(repositories) as (address, asked):
        done = prefetch(address)
        assert done.returncode == 0, done.stderr
        assert f"models.tiny: model small/model at main = {COMMIT}" in done.stdout
        assert "corpora.reviews: dataset small/reviews" in done.stdout
        assert not any("pytorch_model.bin" in path for path in asked if "/resolve/" in path)
        again = prefetch(address)
        assert again.returncode == 0, again.stderr
        assert again.stdout == done.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["model small/other@v2"]["commit"] == COMMIT
    code = "from rlsae.models import load; from rlsae.hub import load_rows; print(load('small/model')[0].config.model_type);"
    code += "load('small/other', revision='v2'); print(load_rows('small/reviews', None, 'train', None).num_rows)"
    read = prefetch("http://127.0.0.1:1", code, offline=True)
    assert read.stdout.split() == ["gpt_neox", "20"], read.stderr


def test_a_repository_that_has_changed_since_it_was_recorded_is_refused(prefetch, repositories, tmp_path):
    with serving(repositories) as (address, _):
        assert prefetch(address).returncode == 0
        record = json.loads((tmp_path / "record.json").read_text())
        record["model small/model@main"]["digest"] = "sha256:" + "0" * 64
        (tmp_path / "record.json").write_text(json.dumps(record))
        refused = prefetch(address)
    assert refused.returncode == 1
    assert "models.tiny: the model small/model at revision main is not what" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_hub_that_cannot_be_reached_is_one_message(prefetch):
    done = prefetch("http://127.0.0.1:1")
    assert done.returncode == 1
    assert "cannot load the data set small/reviews (split train) at revision main from the hub" in done.stderr
    assert "rlsae prefetch CONFIG" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configuration_without_the_hub_wants_nothing():
    assert wanted(load(ROOT / "config.yaml")) == []
