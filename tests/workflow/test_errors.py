"""Mistakes are explained: which key or file, what was expected, what to do; no traceback, nothing half-written."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsae.resumable import hold
from tests.workflow.conftest import OTHER, TINY, Run, clean_environment


def changed(path: str, value) -> dict:
    content = copy.deepcopy(TINY | {"studies": TINY["studies"] | OTHER["studies"]})
    *parents, last = path.split(".")
    entry = content
    for parent in parents:
        entry = entry[parent]
    entry[last] = value
    return content


@pytest.fixture(scope="module")
def fresh(finished, tmp_path_factory) -> Run:
    """The code and inputs of the finished run, without its results."""
    run = Run(tmp_path_factory.mktemp("fresh"))
    run.workdir.mkdir()
    subprocess.run(["cp", "-a", finished.repository, run.repository], check=True)
    subprocess.run(["cp", "-a", finished.workdir / "inputs", run.workdir / "inputs"], check=True)
    return run


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dictionaries.big.expansoin", 2, "dictionaries.big.expansoin: unknown key; did you mean expansion?"),
        ("tunings.ppo.batches", "many", "tunings.ppo.batches: input should be a valid integer"),
        ("corpora.texts.held_out", 1.5, "corpora.texts.held_out: input should be less than 1, found 1.5"),
        ("corpora.texts.path", "${RLSAE_NOWHERE}/x.jsonl", "the environment variable RLSAE_NOWHERE is not set"),
        ("corpora.texts.path", "inputs/absent.jsonl", "inputs/absent.jsonl"),
        ("models.local.path", "inputs/absent-model", "models.local.path: inputs/absent-model is no transformers model"),
        ("studies.main.tuning", "dpo", "studies.main.tuning: no entry 'dpo' in tunings"),
        ("studies.Main", TINY["studies"]["main"], "'Main' is no slug"),
        ("dictionaries.small-l1-0p1", {"l1": 0.1}, None),
    ],
)
def test_a_mistake_in_the_configuration_is_named_before_anything_runs(fresh, path, value, message):
    content = changed(path, value)
    if message is None:
        content["dictionaries"]["small"] = {"l1": [0.1, 0.2]}
        message = "dictionaries.small-l1-0p1: two entries expand to this name"
    fresh.write_config(content)
    done = fresh.snakemake("--dry-run", "--quiet", "host")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert message in said
    assert "Traceback" not in said
    assert not (fresh.workdir / "results").exists()


def verb(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "rlsae", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def corpus(folder: Path, source: Path, settings: str = '{"source": "file"}') -> str:
    """What the corpus stage says of a bad source; it must leave nothing behind."""
    done = verb(folder, "corpus", "--settings", settings, "--source", str(source), "--out", "out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no documents"),
        (b'{"text": "fine"}\n{"text": "\xff"}\n', "document 1 (line 2): not valid UTF-8"),
        (b'{"text": "fine"}\n{"text": 3}\n', "document 1: expected a text, found int 3"),
        (b'{"text": "fine"}\n{"body": "x"}\n', "document 1 (line 2): no key 'text'; it has: body"),
        (b'{"text": "fine"}\nnot json\n', "document 1 (line 2): not valid JSON"),
        (b'{"text": "one"}\n{"text": "two"}\n', "leaves one side empty"),
    ],
)
def test_a_bad_document_is_named(tmp_path, content, message):
    (tmp_path / "texts.jsonl").write_bytes(content)
    assert message in corpus(tmp_path, tmp_path / "texts.jsonl")


def test_more_documents_than_there_are_is_an_error(tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree\n")
    assert "5 are asked for, the source has 3" in corpus(tmp_path, tmp_path / "texts.txt", '{"source": "file", "documents": 5}')


def test_a_folder_that_is_no_model_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    done = verb(tmp_path, "model", "--settings", '{"source": "path"}', "--source", "empty", "--out", "out")
    assert done.returncode == 1
    assert "empty is no transformers model: it has no config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_layers_than_the_model_has_is_an_error_before_anything_runs(run):
    run.set("studies.main.layers.count", 9)
    done = run.snakemake("--dry-run", "--", "all")
    assert done.returncode != 0
    assert "studies.main.layers.count: 9 layers are asked for, the model has 3" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_results_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree\nfour\nfive\nsix\n")
    (tmp_path / "blocked").write_text("a file where a folder should be")
    settings = '{"source": "file", "held_out": 0.5}'
    done = verb(tmp_path, "corpus", "--settings", settings, "--source", "texts.txt", "--out", "blocked/corpora/x")
    assert done.returncode == 1
    assert "error: cannot write" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_an_error_and_leaves_no_artifact(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        done = verb(tmp_path, "corpus", "--settings", '{"source": "generated", "documents": 5000}', "--out", "small/reviews")
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (small / "reviews/manifest.json").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_debug_shows_the_traceback(tmp_path):
    done = verb(tmp_path, "--debug", "corpus", "--settings", '{"source": "file"}', "--source", "absent", "--out", "out")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_second_run_on_the_same_results_is_refused_wherever_it_starts(fresh, tmp_path):
    other = Run(tmp_path)
    other.repository.symlink_to(fresh.repository)
    other.workdir.mkdir()
    (other.workdir / "inputs").symlink_to(fresh.workdir / "inputs")
    (fresh.workdir / "results").mkdir(exist_ok=True)
    (other.workdir / "results").symlink_to(fresh.workdir / "results")
    other.write_config(TINY)
    target = "results/corpora/texts/manifest.json"
    with hold(fresh.workdir / "results/.lock"):
        refused = other.snakemake("--", target)
    assert refused.returncode == 1
    assert f"results is in use by process {os.getpid()} on {os.uname().nodename}" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    assert not (other.workdir / target).exists()
    assert other.snakemake("--", target).returncode == 0  # and it left no lock behind
