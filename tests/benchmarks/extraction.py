"""How fast activations are dumped: `python -m tests.benchmarks.extraction`.

A random model of Pythia-70m's shape reads random documents of 32 to 256 tokens; the outputs of all six MLPs are kept in
float16. Three ways in turn, each in float32 and bfloat16, loading the model not counted:

    naive   transformers with its language-model head, batches in the order of the corpus with an attention mask, lists in
            memory, torch.save at the end
    ours    `rlsae extract` into a store; publishing it (`rlsae consolidate`) is timed apart
    bare    the forward passes of ours alone, on the same batches: nothing is kept or written

With `--batch-tokens` ours alone, for several sizes of a forward pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

# As the verbs of rlsae do, before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlsae import compute
from rlsae.activations import extract, store
from rlsae.activations.tokens import Tokens
from rlsae.models import blocks
from rlsae.pretrain import train_tokenizer
from tests.unit.small_artifacts import tokens_of, write_policy, write_tokens

NAIVE_BATCH = 32
"""Documents of a naive batch."""
SHARD_BYTES = 16 << 20
"""Shards are smaller than real ones, so that a run of a minute has several, as a real one has hundreds."""
TOUCHED = 2 << 30
PRECISIONS = ("float32", "bfloat16")
SETTINGS: dict[str, Any] = {"hook": "mlp", "layers": None, "rows": 10**9, "rows_per_part": 1_048_576, "dtype": "float16"}
SETTINGS |= {"codec": None, "checkpoint": None}


class Contest:
    """The corpus and the model of all contenders. Each of them returns the seconds it took."""

    def __init__(self, folder: Path, documents: int, where: torch.device) -> None:
        self.folder, self.where = folder, where
        rng = np.random.default_rng(0)
        texts = [rng.integers(1, 50_000, length, dtype=np.int32) for length in rng.integers(32, 257, documents)]
        self.tokens = tokens_of(texts)
        self.tokens_folder = write_tokens(folder / "tokens/pythia.random", self.tokens)
        torch.manual_seed(0)
        shape = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
        config = AutoConfig.for_model("gpt_neox", vocab_size=50_304, bos_token_id=0, eos_token_id=0, **shape)
        tokenizer = train_tokenizer(["a text", "another text"], vocabulary=260)
        self.policy = write_policy(folder / "models/pythia", AutoModelForCausalLM.from_config(config), tokenizer)
        self.publishing: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}

    def model(self, precision: str) -> Any:
        weights = self.policy / "model"
        return AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, precision)).to(self.where).eval()

    @torch.no_grad()
    def naive(self, precision: str) -> float:
        model = self.model(precision)
        start = time.perf_counter()
        kept: list[list[torch.Tensor]] = [[] for _ in blocks(model)]
        for layer, block in enumerate(blocks(model)):
            # The hook reads the mask of the batch at hand.
            block.mlp.register_forward_hook(
                lambda module, arguments, output, rows=kept[layer]: rows.append(output[real_BT].half().cpu())
            )
        for first in range(0, len(self.tokens.held_out), NAIVE_BATCH):
            batch = list(range(first, min(first + NAIVE_BATCH, len(self.tokens.held_out))))
            lengths = np.diff(self.tokens.start)[batch]
            ids_BT = extract.padded(self.tokens, batch).to(self.where)
            real_BT = (torch.arange(ids_BT.shape[1]) < torch.from_numpy(lengths)[:, None]).to(self.where)
            model(input_ids=ids_BT, attention_mask=real_BT.long())
        for layer, rows in enumerate(kept):
            torch.save(torch.cat(rows), self.folder / f"naive-{layer}.pt")
        return time.perf_counter() - start

    def ours(self, precision: str) -> float:
        settings = SETTINGS | {"precision": precision}
        work, out, stamp = self.folder / "work", self.folder / "activations/pythia.random", self.folder / "part-0.json"
        loading = 0.0
        load = extract.load

        def timed(*arguments: Any) -> Any:
            nonlocal loading
            start = time.perf_counter()
            loaded = load(*arguments)
            loading = time.perf_counter() - start
            return loaded

        with mock.patch.object(extract, "load", timed):
            start = time.perf_counter()
            extract.extract_part(settings, 0, stamp, work, self.policy, self.policy / "model", self.tokens_folder)
            seconds = time.perf_counter() - start - loading
        start = time.perf_counter()
        extract.consolidate(settings, out, work, self.policy, self.tokens_folder, [stamp])
        self.publishing[precision].append(time.perf_counter() - start)
        shutil.rmtree(out)
        return seconds

    @torch.inference_mode()
    def bare(self, precision: str) -> float:
        model = self.model(precision)
        extract.truncate(model, len(blocks(model)) - 1)
        tokens = Tokens.open(self.tokens_folder)
        shard_rows = store.Geometry.of(model.config.hidden_size, 2, SETTINGS["rows_per_part"]).shard_rows
        start = time.perf_counter()
        for first, stop in extract.shards_of_part(0, int(tokens.start[-1]), SETTINGS["rows_per_part"], shard_rows):
            block = tokens.block(*extract.documents_of(tokens, first, stop))
            for documents in extract.length_buckets(block, range(len(block.held_out))):
                model.base_model(input_ids=extract.padded(block, documents).to(self.where), use_cache=False)
        if self.where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def in_passes_of(self, batch_tokens: int) -> Callable[[str], float]:
        """Ours with forward passes of another size."""

        def run(precision: str) -> float:
            with mock.patch.object(extract, "BATCH_TOKENS", batch_tokens):
                return self.ours(precision)

        return run


def touch_memory() -> None:
    """Virtual machines may hand out memory that was never touched very slowly: let every contender begin with touched pages."""
    np.ones(TOUCHED, np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, nargs="*", default=[])
    options = parser.parse_args()
    compute.configure()
    where = compute.device()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(store, "SHARD_BYTES", SHARD_BYTES):
        contest = Contest(Path(folder), options.documents, where)
        contenders = {"naive": contest.naive, "ours": contest.ours, "bare": contest.bare}
        if options.batch_tokens:
            contenders = {f"ours, {size} tokens per pass": contest.in_passes_of(size) for size in options.batch_tokens}
        total = len(contest.tokens.token)
        rates: dict[tuple[str, str], list[float]] = {(p, name): [] for p in PRECISIONS for name in contenders}
        for _ in range(options.rounds):
            for (precision, name), values in rates.items():
                touch_memory()
                values.append(total / contenders[name](precision))
    exact = "exact" if compute.medium_is_exact() else "not exact"
    print(f"\n{options.documents} documents, {total:,} tokens; rounds: {options.rounds}; torch {torch.__version__} on {where}")
    print(f"{torch.get_num_threads()} threads; fp32 matmul {torch.get_float32_matmul_precision()} (medium is {exact} here)")
    print(f"load average {os.getloadavg()[0]:.1f}, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}\n")
    print("| precision | | tokens/s, median [fastest, slowest] | ours / this |\n|---|---|---|---|")
    for (precision, name), values in rates.items():
        median, ours = statistics.median(values), statistics.median(rates.get((precision, "ours"), values))
        shown = f"{median:,.0f} [{max(values):,.0f}, {min(values):,.0f}]"
        print(f"| {precision} | {name} | {shown} | {ours / median:.2f} |")
    for precision, seconds in contest.publishing.items():
        median = statistics.median(seconds)
        print(f"\npublishing, {precision}: {median:.2f} s ({total / median:,.0f} tokens/s)")


if __name__ == "__main__":
    main()
