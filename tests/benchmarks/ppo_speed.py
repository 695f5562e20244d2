"""Speed, phases and memory of PPO: `python -m tests.benchmarks.ppo_speed [--model FOLDER] [--batches N] [--threads N]`.

Batched generation is compared with one `generate` call per prompt, as in the examples of TRL 0.7's step interface; models,
prompts, limits, updates and everything else are equal. Both take turns in one process, the first batch of each run is not
counted. Phases are timed in a run of their own, memory in a process of its own.

Measured: the demo's model shape; neox-imdb where RLSAE_MODELS and RLSAE_DATA hold it; on CUDA also Pythia-70m's shape in
bfloat16, with random weights. `--model` measures one transformers folder instead, on generated reviews.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the verbs do, before torch is imported

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from rlsae import compute
from rlsae.config import FileCorpus, GeneratedCorpus, LexiconReward, PPOTuning, PretrainedModel
from rlsae.corpora import build_corpus
from rlsae.models import build_model, load, save
from rlsae.resumable import Stage
from rlsae.rewards import load_reward
from rlsae.training import joint_seed
from rlsae.tuning import ppo
from rlsae.tuning.rollout import Rollout
from rlsae.tuning.rollout import generate as batched

ROUNDS = 3
SETTINGS = {
    "batch 128, minibatch 32, 2 epochs": {"batch_size": 128, "minibatch_size": 32, "epochs": 2},
    "batch 64, minibatch 16, 4 epochs": {"batch_size": 64, "minibatch_size": 16, "epochs": 4},
}
PHASES = ["generation", "scoring forwards", "update forward", "backward", "optimizer and clipping"]
Generate = Callable[..., Rollout]


# --- what is measured --------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model, the corpus of its prompts, and how they are tuned."""

    name: str
    model: Path
    corpus: Path
    precision: str = "float32"

    def entry(self, batches: int, **settings: int) -> PPOTuning:
        shared = {"method": "ppo", "reward": "vader", "corpus": "reviews", "learning_rate": 1e-4, "precision": self.precision}
        return PPOTuning(**shared, batches=batches, **settings)


def subjects(folder: Path, chosen: Path | None) -> Iterator[Subject]:
    """Build the artifacts of each subject when its turn comes."""
    reviews = folder / "reviews"
    corpus = GeneratedCorpus(source="generated", documents=12_000)
    build_corpus(corpus, corpus.settings(), reviews, None, None)
    if chosen is not None:
        yield Subject(chosen.name, chosen, reviews)
        return
    entry = PretrainedModel(source="pretrain", corpus="reviews", steps=100)
    build_model(entry, entry.settings() | {"context_length": 64}, folder / "demo", None, None, reviews)
    yield Subject("the demo's shape", folder / "demo/model", reviews)
    if (imdb := Path(os.environ.get("RLSAE_MODELS", "")) / "neox-imdb").exists():
        texts = Path(os.environ["RLSAE_DATA"]) / "imdb-test.jsonl.gz"
        file = FileCorpus(source="file", path=str(texts), documents=4000, held_out=0.2)
        build_corpus(file, file.settings(), folder / "imdb-test", None, texts)
        yield Subject("neox-imdb", imdb, folder / "imdb-test")
    if torch.cuda.is_available():
        yield Subject("Pythia-70m's shape", pythia(folder / "pythia", folder / "demo/model"), reviews, "bfloat16")


def pythia(folder: Path, tokenizer_from: Path) -> Path:
    """Random weights; the tokenizer is that of another model, so most of its 50,304 tokens stand for no text."""
    _, tokenizer = load(tokenizer_from)
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    end = tokenizer.eos_token_id
    config = GPTNeoXConfig(vocab_size=50304, max_position_embeddings=2048, bos_token_id=end, eos_token_id=end, **shape)
    save(GPTNeoXForCausalLM(config), tokenizer, folder)
    return folder


def one_by_one(model: Any, tokenizer: Any, prompts: list[list[int]], limits: np.ndarray, seed: int) -> Rollout:
    """What the batched `generate` gives, by one call per prompt."""
    parts = [batched(model, tokenizer, [ids], limits[row : row + 1], joint_seed(seed, row)) for row, ids in enumerate(prompts)]
    longest = max(part.prompt_mask_BQ.shape[1] for part in parts)
    longest_response = max(part.response_mask_BR.shape[1] for part in parts)
    ids, prompt_masks, response_masks = [], [], []
    for part in parts:
        left = longest - part.prompt_mask_BQ.shape[1]
        right = longest_response - part.response_mask_BR.shape[1]
        ids.append(F.pad(part.ids_BT, (left, right), value=tokenizer.eos_token_id))
        prompt_masks.append(F.pad(part.prompt_mask_BQ, (left, 0)))
        response_masks.append(F.pad(part.response_mask_BR, (0, right)))
    return Rollout(
        torch.cat(ids),
        torch.cat(prompt_masks),
        torch.cat(response_masks),
        [part.prompts[0] for part in parts],
        [part.responses[0] for part in parts],
    )


# --- how it is measured ------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Clock and memory at the edges of the batches, and seconds by phase from the second batch on."""

    device: torch.device
    edges: list[float] = field(default_factory=list)
    high_water: list[float] = field(default_factory=list)
    cuda_peaks: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def edge(self) -> None:
        """A batch ends here and the next one begins."""
        self.edges.append(self.now())
        self.high_water.append(high_water_mb())
        if self.device.type == "cuda":
            self.cuda_peaks.append(torch.cuda.max_memory_allocated() / 2**20)
            torch.cuda.reset_peak_memory_stats()

    def beginning(self, generate: Generate) -> Generate:
        """Every batch begins with its generation."""

        def watched(*arguments: Any) -> Rollout:
            self.edge()
            return generate(*arguments)

        return watched

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            start = self.now()
            result = function(*arguments, **named)
            if len(self.edges) > 1:
                self.seconds[phase] += self.now() - start
            return result

        return watched

    @property
    def total(self) -> float:
        """Seconds of all batches but the first."""
        return self.edges[-1] - self.edges[1]


def high_water_mb() -> float:
    """Largest resident memory of this process so far (of this program: `ru_maxrss` would count the one that started it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def run(subject: Subject, entry: PPOTuning, generate: Generate, phases: bool = False) -> Watch:
    """One training from the start, watched."""
    device = compute.device()
    (lm, tokenizer), (base, _) = load(subject.model, device), load(subject.model, device)
    reward = load_reward(LexiconReward(kind="lexicon"))
    watch = Watch(device)
    with ExitStack() as stack:
        if phases:
            generate, reward = watch.timed("generation", generate), watch.timed("reward", reward)
            for owner, name, phase in (
                (ppo, "score", "scoring forwards"),
                (ppo, "ppo_loss", "update forward"),
                (torch.Tensor, "backward", "backward"),
                (torch.nn.utils, "clip_grad_norm_", "optimizer and clipping"),
            ):
                stack.enter_context(patch.object(owner, name, watch.timed(phase, getattr(owner, name))))
            watch_optimizer(watch, stack)
        stack.enter_context(patch.object(ppo, "generate", watch.beginning(generate)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stage = stack.enter_context(Stage("policies", folder / "tuned", {}, {}))
        ppo.tune(lm, base, tokenizer, subject.corpus, reward, entry, stage)
        watch.edge()
    return watch


def watch_optimizer(watch: Watch, stack: ExitStack) -> None:
    """Time the steps of the optimizer that PPO makes; torch wraps the class's own `step` itself, so instances are timed."""

    class Timed(torch.optim.AdamW):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            for name in ("step", "zero_grad"):
                setattr(self, name, watch.timed("optimizer and clipping", getattr(self, name)))

    stack.enter_context(patch.object(torch.optim, "AdamW", Timed))


def memory(subject: Subject, entry: PPOTuning, threads: int | None) -> Watch:
    compute.configure(threads)
    return run(subject, entry, batched)


# --- what is printed ---------------------------------------------------------------------------------------------


def table(*rows: list[str]) -> None:
    header, *rest = rows
    for row in (header, ["---"] * len(header), *rest):
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def measure(subject: Subject, batches: int, threads: int | None) -> None:
    lm, _ = load(subject.model)
    parameters = sum(p.numel() for p in lm.parameters()) / 1e6
    print(f"## {subject.name}: {parameters:.1f} M parameters, {subject.precision}, vocabulary {lm.config.vocab_size:,}\n")
    print(f"Load average before: {os.getloadavg()[0]:.1f}. {batches} batches per run after one to warm up, {ROUNDS} rounds.\n")
    speeds, shares, peaks = [], [], []
    for name, settings in SETTINGS.items():
        entry = subject.entry(batches + 1, **settings)
        rates: dict[Generate, list[float]] = {batched: [], one_by_one: []}
        for _ in range(ROUNDS):
            for generate, values in rates.items():
                values.append(batches * entry.batch_size / run(subject, entry, generate).total)
        ours, theirs = rates.values()
        ratio = statistics.median(ours) / statistics.median(theirs)
        by_round = ", ".join(f"{one / other:.1f}" for one, other in zip(ours, theirs, strict=True))
        speeds.append([name, median_and_range(ours), median_and_range(theirs), f"**{ratio:.1f}** ({by_round})"])

        watch = run(subject, entry, batched, phases=True)
        rest = watch.total - sum(watch.seconds[phase] for phase in PHASES)
        parts = [*(watch.seconds[phase] for phase in PHASES), watch.seconds["reward"], rest - watch.seconds["reward"], rest]
        shares.append([name, f"{watch.total / batches:.2f}", *(f"{part / watch.total:.1%}" for part in parts)])

        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            watch = fresh.submit(memory, subject, entry, threads).result()
        marks = [watch.high_water[2], watch.high_water[-1]]
        if watch.cuda_peaks:
            marks += [watch.cuda_peaks[2], watch.cuda_peaks[-1]]
        peaks.append([name, *(f"{mark:,.0f}" for mark in marks)])
    table(["settings", "batched (samples/s)", "prompt by prompt (samples/s)", "ratio of medians (by round)"], *speeds)
    table(["settings", "s/batch", *PHASES, "reward", "everything else", "the last two"], *shares)
    on_cuda = ["CUDA peak in the second rollout (MB)", "in the last"] if watch.cuda_peaks else []
    last = f"after the last of {batches + 1}"
    table(["settings", "peak resident memory after the second rollout (MB)", last, *on_cuda], *peaks)
    print(f"Load average after: {os.getloadavg()[0]:.1f}.\n", flush=True)


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")), "unknown CPU")
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32 products "
        f"{torch.get_float32_matmul_precision()}, OMP_WAIT_POLICY {os.environ['OMP_WAIT_POLICY']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="transformers folder to measure instead")
    parser.add_argument("--batches", type=int, default=4, help="batches of each run that count, two at least")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores by default")
    given = parser.parse_args()
    if given.batches < 2:
        parser.error("--batches: two at least")
    compute.configure(given.threads)
    print(f"{machine()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(Path(folder), given.model):
            measure(subject, given.batches, given.threads)


if __name__ == "__main__":
    main()
