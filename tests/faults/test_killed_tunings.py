"""A tuning that is killed again and again, also while it writes, ends with the artifact of an uninterrupted one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from rlsae.cli import app
from rlsae.config import GeneratedCorpus, PretrainedModel
from rlsae.corpora import build_corpus
from rlsae.models import build_model
from rlsae.tuning.policy import CHECKPOINTS
from rlsae.tuning.trl_trainers import COMPLETE
from tests.faults.artifacts import differing_files
from tests.workflow.conftest import clean_environment

BATCHES, CHECKPOINT = 60, 20
SHARED = {"reward": "letters", "seed": 3, "batches": BATCHES, "batch_size": 4, "warmup_batches": 2, "checkpoints": 2}
SHARED |= {"query_tokens": [2, 4], "response_tokens": [2, 4], "evaluation_prompts": 8, "learning_rate": 1e-3}
SAMPLING = {"corpus": "reviews", "minibatch_size": 4, "epochs": 2}
LORA = {"lora": {"rank": 2, "alpha": 4}}
TUNINGS = {
    "ppo": {"method": "ppo", **SAMPLING},
    "dpo": {"method": "dpo", "corpus": "pairs"},
    "rloo": {"method": "rloo", **SAMPLING, "group_size": 2},
    "grpo": {"method": "grpo", **SAMPLING, "group_size": 2},
    "ppo-lora": {"method": "ppo", **SAMPLING, **LORA},
    "dpo-lora": {"method": "dpo", "corpus": "pairs", **LORA},
}


@dataclass
class Inputs:
    """Base model, corpora and reward of every tuning."""

    folder: Path

    def arguments(self, name: str, out: Path) -> list[str]:
        """The verb and its options; the work folder is `work_folder(out)`."""
        tuning = SHARED | TUNINGS[name]
        options = ["--settings", json.dumps({"tuning": tuning, "reward": {"kind": "lexicon"}})]
        options += ["--base", self.folder / "tiny", "--corpus", self.folder / tuning["corpus"]]
        options += ["--reward-file", self.folder / "letters.tsv", "--out", out, "--work", work_folder(out), "--threads", 1]
        return ["tune", *map(str, options)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    for name, kind in (("reviews", "documents"), ("pairs", "preferences")):
        corpus = GeneratedCorpus(source="generated", kind=kind, documents=200, held_out=0.2)
        build_corpus(corpus, corpus.settings(), folder / name, None, None)
    model = PretrainedModel(
        source="pretrain", corpus="reviews", vocabulary=300, layers=2, width=32, heads=2, mlp_width=64, steps=4, batch_size=8
    )
    build_model(model, model.settings() | {"context_length": 64}, folder / "tiny", None, None, folder / "reviews")
    # Letters, since a hardly trained model writes hardly any word: a reward that is always 0 teaches nothing.
    rng = random.Random(0)
    lines = [f"{letter}\t{rng.uniform(-3, 3):.2f}\n" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "letters.tsv").write_text("".join(lines))
    return Inputs(folder)


def work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Run a tuning that saves its partial state after every batch."""
    environment = clean_environment() | {"RLSAE_SAVE_SECONDS": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "rlsae", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def uninterrupted(inputs: Inputs, name: str) -> Path:
    """The artifact of a tuning that ran in this process and saved no partial state."""
    out = inputs.folder / "uninterrupted" / name
    if not out.exists():
        done = CliRunner().invoke(app, inputs.arguments(name, out))
        assert done.exit_code == 0, done.output
    return out


def saved_batches(work: Path) -> int:
    """Batches in the newest partial state."""
    state = work / "state.safetensors"
    if state.exists():
        with safe_open(state, framework="pt") as file:
            return len(json.loads(file.metadata()["values"])["history"])
    complete = work.glob(f"trainer/checkpoint-*/{COMPLETE}")
    newest = max(complete, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
    return len(json.loads((newest.parent / "trainer_state.json").read_text())["log_history"]) if newest else 0


def writes(work: Path) -> bool:
    """Whether a partial state or a published checkpoint is half written."""
    trainer = [path for path in work.glob("trainer/checkpoint-*") if not (path / COMPLETE).exists()]
    return bool(trainer) or (work / "state.partial").exists() or any(work.glob(f"{CHECKPOINTS}/*.partial"))


def moments(rng: random.Random, kills: int) -> list[tuple[int, bool]]:
    """When to kill: after so many batches, and whether while the next file is written, of which one is a checkpoint's."""
    batches = [CHECKPOINT - 1, *rng.sample(range(1, BATCHES - 10), kills - 1)]
    return sorted((batch, batch == CHECKPOINT - 1 or rng.random() < 0.5) for batch in batches)


def killed(arguments: list[str], work: Path, log: Path, batches: int, while_writing: bool, delay: float) -> bool:
    """Start or continue a tuning and `kill -9` it once it has saved so many batches, and one at least; False if it ended."""
    wanted = max(batches, saved_batches(work) + 1)
    process = start(arguments, log)
    with suppress(FileNotFoundError):  # a tuning that ends removes its work folder
        while process.poll() is None and saved_batches(work) < wanted:
            time.sleep(0.005)
        while while_writing and process.poll() is None and not writes(work):
            time.sleep(0.0002)
    time.sleep(0 if while_writing else delay)
    process.kill()
    code = process.wait()
    assert code in (0, -signal.SIGKILL), log.read_text()
    return code != 0


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.endswith("lora")) for n in TUNINGS])
def test_a_tuning_killed_at_random_moments_ends_as_if_never_killed(inputs, tmp_path, name, kills):
    rng = random.Random(f"{name} {kills}")
    out = tmp_path / name
    arguments, work = inputs.arguments(name, out), work_folder(out)
    logs = [tmp_path / f"{run}.log" for run in range(kills + 1)]
    runs = 0
    for (batches, while_writing), log in zip(moments(rng, kills), logs, strict=False):
        runs += 1
        if not killed(arguments, work, log, batches, while_writing, delay=rng.uniform(0, 0.1)):
            break
    else:
        runs += 1
        assert start(arguments, logs[-1]).wait() == 0, logs[-1].read_text()
    assert runs > 1
    for log in logs[1:runs]:
        assert "continuing from the partial state" in log.read_text()
    assert not work.exists()
    assert differing_files(uninterrupted(inputs, name), out) == []
