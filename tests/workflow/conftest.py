"""One finished run of a study too small to mean anything, which every module copies and disturbs in its own way."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]
WORDS = ["good", "great", "bad", "awful", "film", "story", "actor", "music", "the", "a", "was", "and", "i", "saw", "it", "."]
TINY: dict[str, Any] = {
    "corpora": {
        "reviews": {"source": "generated", "documents": 400, "context_length": 48},
        "texts": {"source": "file", "path": "inputs/texts.jsonl", "held_out": 0.2, "context_length": 32},
    },
    "models": {
        "tiny": {"source": "pretrain", "corpus": "reviews", "vocabulary": 300, "layers": 3, "width": 16, "heads": 2}
        | {"mlp_width": 32, "steps": 4, "batch_size": 8},
        "local": {"source": "path", "path": "inputs/model"},
    },
    "rewards": {
        "words": {"kind": "lexicon", "path": "inputs/words.tsv"},
        "own": {"kind": "python", "path": "inputs/own_reward.py"},
    },
    "tunings": {
        "ppo": {"method": "ppo", "reward": "words", "corpus": "reviews", "batches": 3, "batch_size": 8, "minibatch_size": 8}
        | {"evaluation_prompts": 16, "checkpoints": 1},
        "own-ppo": {"method": "ppo", "reward": "own", "corpus": "reviews", "batches": 2, "batch_size": 8, "minibatch_size": 8}
        | {"evaluation_prompts": 16},
    },
    "activations": {"mlp": {"survey_rows": 1024, "rows": 3072, "rows_per_part": 2048}},
    "dictionaries": {
        "small": {"expansion": 1, "epochs": 1, "batch_rows": 256},
        "big": {"expansion": 2, "epochs": 1, "batch_rows": 256},
    },
    "studies": {
        "main": {"model": "tiny", "tuning": "ppo", "corpus": "texts", "activation": "mlp"}
        | {"layers": {"by": "weight_l2_sum", "count": 1}, "dictionaries": ["small", "big"]}
        | {"sizes": {"small": "small", "big": "big"}, "interpretation": {"latents": 4, "examples": 3}},
    },
}
OTHER = TINY | {
    "studies": {
        "other": {"model": "local", "tuning": "own-ppo", "corpus": "texts", "activation": "mlp"}
        | {"layers": [0], "dictionaries": ["small"]},
    },
}
"""A study of a local model and a Python reward, run up to its policy."""


@dataclass
class Run:
    """A folder with the workflow's code, and one that it runs in."""

    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.workdir / "study.yaml").read_text())

    def write_config(self, content: dict[str, Any]) -> None:
        (self.workdir / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def set(self, path: str, value: Any) -> None:
        """Change one key of the configuration: `dictionaries.big.l1`."""
        content = self.config()
        *parents, last = path.split(".")
        entry = content
        for parent in parents:
            entry = entry[parent]
        entry[last] = value
        self.write_config(content)

    def snakemake(self, *arguments: str, config: str = "study.yaml") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakemake", "-s", str(self.repository / "Snakefile")]
        command += ["--directory", str(self.workdir), "--configfile", str(self.workdir / config)]
        command += ["--cores", "2", "--set-threads", "dictionary=1", "model=1", "tune=1", "activation_part=1"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=self.folder, env=clean_environment())

    def rlsae(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = clean_environment() | {"PYTHONPATH": str(self.repository)}
        command = [sys.executable, "-m", "rlsae", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.workdir, env=environment)

    def planned(self, *arguments: str, target: str = "all", config: str = "study.yaml") -> dict[str, int]:
        """The jobs that Snakemake would run, by rule; targets left out."""
        done = self.snakemake("--dry-run", "--quiet", "host", *arguments, "--", target, config=config)
        assert done.returncode == 0, done.stdout + done.stderr
        table = re.search(r"job +count\n[- ]+\n(.*?)\ntotal", done.stdout + done.stderr, re.DOTALL)
        jobs = dict(line.split() for line in table[1].splitlines()) if table else {}
        return {rule: int(count) for rule, count in jobs.items() if rule != target}


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SNAKEMAKE_PROFILE")}


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id) -> Run:
    """The run that is copied: never change it. Test processes that run side by side share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    run = Run(folder)
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            build(run)
            (folder / "done").touch()
    return run


def build(run: Run) -> None:
    """Copy the code, write the inputs, and run the workflow."""
    run.repository.mkdir(parents=True)
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(REPOSITORY / name, run.repository / name)
    for name in ("workflow", "rlsae", "envs"):
        shutil.copytree(REPOSITORY / name, run.repository / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_inputs(run.workdir / "inputs")
    run.write_config(copy.deepcopy(TINY))
    (run.workdir / "other.yaml").write_text(yaml.safe_dump(OTHER, sort_keys=False))
    for config, target in (("study.yaml", "all"), ("other.yaml", "policies")):
        done = run.snakemake("--show-failed-logs", "--", target, config=config)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def run(finished, tmp_path) -> Run:
    """A copy of the finished run, with all its times."""
    copied = Run(tmp_path / "copy")
    subprocess.run(["cp", "-a", str(finished.folder), str(copied.folder)], check=True)
    return copied


def write_inputs(folder: Path) -> None:
    """The files that the configuration names: texts, a model folder, a lexicon, a reward."""
    import random

    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from rlsae.pretrain import train_tokenizer

    folder.mkdir(parents=True)
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(24)) for _ in range(300)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # Single letters too: an untrained model writes hardly any word, and a reward that is always 0 teaches nothing.
    lexicon = {"good": 2.0, "bad": -2.0} | {letter: rng.uniform(-3, 3) for letter in "abcdefghijklmnopqrstuvwxyz"}
    (folder / "words.tsv").write_text("".join(f"{word}\t{polarity:.2f}\n" for word, polarity in lexicon.items()))
    (folder / "own_reward.py").write_text(
        "def reward(prompts, responses):\n    return [float(len(response)) / 10 for response in responses]\n"
    )
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts, 300)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    end = tokenizer.eos_token_id
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=300, max_position_embeddings=48, bos_token_id=end, eos_token_id=end, **shape)
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
