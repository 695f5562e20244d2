"""Nothing that was downloaded or damaged can run code, and no secret is written down.

That no string of a configuration is a command: tests/workflow/test_hostile_configuration.py.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from small_artifacts import Payload, random_documents, tokens_of, write_policy, write_store
from small_hub import serving
from small_llm_server import KEY, Reply, examples, served

from rlsae.activations.store import ActivationStore
from rlsae.config import FileCorpus
from rlsae.corpora import read_documents
from rlsae.errors import RlsaeError
from rlsae.hub import load_rows
from rlsae.models import load, load_classifier
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.external import load_external
from tests.workflow.conftest import TINY, Run, write_inputs

ROOT = Path(__file__).parents[2]
UNPICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


@pytest.fixture
def evil(tmp_path):
    """Bytes that create a folder when they are unpickled, plain and as torch writes them; afterwards it must not be there."""
    marker = tmp_path / "executed"
    stream = io.BytesIO()
    torch.save({"weights": Payload(marker)}, stream)
    yield {"plain": pickle.dumps(Payload(marker)), "torch": stream.getvalue()}
    assert not marker.exists()


def test_the_payload_would_have_been_seen(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


# --- the code ----------------------------------------------------------------------------------------------------


def calls(path):
    """Every call of a source file: its dotted name and keyword arguments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize("path", sorted((ROOT / "rlsae").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_unpickles_runs_a_shell_or_trusts_remote_code(path):
    for name, words in calls(path):
        first, _, last = name.rpartition(".")
        assert not (first.partition(".")[0] in UNPICKLES and last in ("load", "loads", "Unpickler")), name
        assert name not in ("eval", "exec", "os.system", "os.popen"), name
        assert name != "torch.load" or words.get("weights_only") == "True", name
        assert words.get("allow_pickle", "False") == "False", name
        assert words.get("shell", "False") == "False", name
        # Without a word transformers asks whoever sits at the terminal.
        assert words.get("trust_remote_code", "False" if last != "from_pretrained" else None) == "False", name


# --- loaders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, random_model, tokenizer):
    return write_policy(tmp_path / "models" / "tiny", random_model("gpt_neox"), tokenizer) / "model"


@pytest.mark.parametrize("kind", ["plain", "torch"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_is_read_from_safetensors_alone(model, evil, kind, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(evil[kind])
    for read in (lambda: load(model), lambda: load_classifier(model, "main", "cpu")):
        with pytest.raises(RlsaeError, match="cannot load"):
            read()


def test_code_beside_a_model_is_not_run(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    with pytest.raises(RlsaeError, match="cannot load"):
        load(model)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_a_dictionary_is_read_from_safetensors_alone(tmp_path, evil, kind):
    sae = SparseAutoencoder(torch.zeros(4, 8), torch.zeros(8), torch.zeros(8, 4), torch.zeros(4))
    sae.save(tmp_path / "sae")
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(evil[kind])
    with pytest.raises(RlsaeError):
        SparseAutoencoder.load(tmp_path / "sae")


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_a_dictionary_from_elsewhere_is_read_without_unpickling(tmp_path, evil, kind):
    (tmp_path / "ae").mkdir()
    (tmp_path / "ae" / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    (tmp_path / "ae" / "ae.pt").write_bytes(evil[kind])
    with pytest.raises(RlsaeError):
        load_external(tmp_path / "ae")


def test_a_store_that_asks_for_a_codec_that_unpickles_is_refused(tmp_path, evil):
    tokens = tokens_of(random_documents([8, 8]))
    folder = write_store(tmp_path / "acts", tokens, {0: np.ones((16, 4), np.float32)})
    (path,) = [file for file in folder.rglob("zarr.json") if file.parent.name == "acts" and "layer" in str(file)]
    described = json.loads(path.read_text())
    described["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    path.write_text(json.dumps(described))
    for chunk in (path.parent / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(evil["plain"])
    (root,) = [file for file in folder.rglob("zarr.json") if file.parent.name.endswith(".zarr")]
    consolidated = json.loads(root.read_text())
    consolidated.pop("consolidated_metadata", None)
    root.write_text(json.dumps(consolidated))
    with pytest.raises((RlsaeError, ValueError, KeyError, zarr.errors.BaseZarrError)):
        ActivationStore(folder).read(0, 0, 16)


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_a_partial_state_that_is_no_safetensors_is_refused(tmp_path, evil, kind):
    with Stage("models", tmp_path / "out", {}, {}) as stage:
        (stage.work / "state.safetensors").write_bytes(evil[kind])
        with pytest.raises(RlsaeError, match=r"state\.safetensors is damaged: .*; delete it"):
            stage.load_state()


@pytest.mark.parametrize("name", ["texts.pkl", "texts.jsonl", "texts.parquet", "texts.csv", "texts.jsonl.gz"])
def test_a_corpus_is_read_as_text(tmp_path, evil, name):
    (tmp_path / name).write_bytes(evil["plain"])
    with pytest.raises(RlsaeError):
        read_documents(FileCorpus(source="file", path=str(tmp_path / name)), tmp_path / name)


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_a_data_set_of_pickles_is_refused(tmp_path, evil, kind):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.pkl").write_bytes(evil[kind])
    with pytest.raises(RlsaeError, match="cannot load the data set"):
        load_rows(str(tmp_path / "rows"), None, "train", None)


def test_a_data_set_with_a_loading_script_is_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    with pytest.raises(RlsaeError, match="cannot load the data set"):
        load_rows(str(tmp_path / "rows"), None, "train", None)
    assert not (tmp_path / "executed").exists()


# --- secrets -------------------------------------------------------------------------------------------------------

TOKEN = "hf_verySecretToken0123456789"
STUDY = {"tuning": "own-ppo", "corpus": "texts", "activation": "mlp", "layers": [0], "dictionaries": ["small"], "llm": "reader"}
STUDY |= {"interpretation": {"latents": 3, "examples": 3, "probes": None, "interventions": None}}


def reader(asked):
    """A language model that explains and judges, and whose server refuses other questions and repeats the key."""
    if examples(asked):
        return json.dumps([1] * len(examples(asked)))
    if "related to" in asked:
        return Reply(json.dumps({"error": {"message": f"no such model for {KEY}"}}), 404)
    return f"It fires on {KEY}."


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_what_a_study_writes_or_says(tmp_path, monkeypatch):
    """The hub wants the token and the server of the language model the key; a second model, which is not there, fails."""
    run = Run(tmp_path)
    run.repository.symlink_to(ROOT)
    write_inputs(run.workdir / "inputs")
    hub = {("models", "small/model"): run.workdir / "inputs/model"}
    with serving(hub, TOKEN) as (hub_address, fetched), served(reader) as server:
        llm = {"kind": "openai", "base_url": server.url, "model": "small", "key_variable": "A_KEY"}
        models = {name: {"source": "hub", "repository": f"small/{name}"} for name in ("model", "lost")}
        studies = {"main": STUDY | {"model": "model"}, "failing": STUDY | {"model": "lost"}}
        run.write_config(TINY | {"models": models, "llms": {"reader": llm}, "studies": studies})
        for name, value in {"HF_TOKEN": TOKEN, "A_KEY": KEY, "HF_ENDPOINT": hub_address, "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        done = run.snakemake("--keep-going", "--show-failed-logs", "--verbose", "--printshellcmds")
    assert done.returncode == 1
    assert "cannot load the model small/lost" in done.stdout + done.stderr
    assert any(path.endswith("model.safetensors") for path in fetched)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    explained = run.workdir / "results/interpretation/main/explanations.parquet"
    assert "It fires on [key]." in set(pd.read_parquet(explained).explanation)
    assert "no such model for [key]" in (run.workdir / "logs/interpretation/main.log").read_text()
    written = [path for path in run.workdir.rglob("*") if path.is_file()]
    for place in ("results/.llm-answers", "results/reports/main", "logs/models/lost.log", "benchmarks", ".snakemake/log"):
        assert any(path.is_relative_to(run.workdir / place) for path in written)
    for secret in (TOKEN, KEY):
        assert secret not in done.stdout + done.stderr
        assert not [path for path in written if secret.encode() in content_of(path)]


def content_of(path):
    """The bytes of a file; those of a table as they are before compression."""
    return pd.read_parquet(path).to_csv().encode() if path.suffix == ".parquet" else path.read_bytes()
