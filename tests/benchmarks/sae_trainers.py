"""Trainers of several libraries behind one interface, each run by the interpreter that has it.

`python -m tests.benchmarks.sae_trainers '{"library": "sparsify", ...}' ...` trains on rows in memory, one argument after the
other, every library in the same order, and saves the autoencoders in the library's own format; or it trains in rounds: at each
line that it reads it takes some steps and prints their seconds, so that several trainers can take turns. Each runs the loop
that its library ships, but for sparsify, whose loop cannot be told from its language model: its steps are written out here.

Rows come centred, with a mean variance of 1 per channel, as rlsae and SAELens want them; dictionary_learning gets them with a
mean squared length of 1, as it normalises them itself.

Shapes: N rows, B rows of a batch, D channels, F latents.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"OMP_WAIT_POLICY": "passive", "WANDB_MODE": "disabled", "SPARSIFY_DISABLE_TRITON": "1"}

import numpy as np
import torch

WARMUP, DECAY = 0.05, 0.2
"""Shares of the run with rising and with falling learning rate."""
SPARSITY_WARMUP = 0.1
"""Share of the run with rising weight of the sparsity."""


@dataclasses.dataclass(frozen=True)
class Options:
    library: str
    architecture: str
    channels: int
    latents: int
    batch_rows: int
    steps: int
    k: int = 32
    """Of jumprelu the L0 that it aims at."""
    sparsity: float = 0.1
    """Weight of L1, or of jumprelu's (L0 / k - 1)², beside the squared error of rows of mean squared length 1."""
    variant: str = ""
    """Which of its trainers, where a library has several; of rlsae's matryoshka `quarter`: its first prefix is a quarter."""
    learning_rate: float = 1e-3
    seed: int = 0
    precision: str = "highest"
    """Of torch.set_float32_matmul_precision."""
    rows: str | None = None
    """File of centred and scaled rows [N, D]; None: random ones."""
    out: str | None = None
    round_steps: int = 0
    """Steps of a round; 0: train in one go."""
    crosscoder: str = ""
    """Train a crosscoder, on rows of two models of so many channels side by side: its published implementation lies in this
    folder."""

    @property
    def width(self) -> int:
        """Of a row."""
        return self.channels * (2 if self.crosscoder else 1)


class Rows:
    """Batches in the order that all trainers share."""

    def __init__(self, options: Options) -> None:
        self.options, self.batch_rows, self.steps = options, options.batch_rows, options.steps
        if options.rows:
            self.rows_ND = np.load(options.rows)
        else:
            self.rows_ND = np.random.default_rng(0).standard_normal((16 * self.batch_rows, options.width), np.float32)
        self.shape = self.rows_ND.shape
        self.per_epoch = len(self.rows_ND) // self.batch_rows
        self._order = np.arange(len(self.rows_ND))

    def batches(self, from_step: int = 0) -> Iterator[np.ndarray]:
        start = time.perf_counter()
        for step in range(from_step, self.steps):
            if self.options.round_steps and step % self.options.round_steps == 0:
                if step:
                    print(json.dumps(time.perf_counter() - start), flush=True)
                if not sys.stdin.readline():
                    sys.exit()
                start = time.perf_counter()
            epoch, batch = divmod(step, self.per_epoch)
            first = batch * self.batch_rows
            if not self.options.rows:
                yield self.rows_ND[first : first + self.batch_rows]
                continue
            if batch == 0:
                self._order = np.random.default_rng(epoch).permutation(len(self.rows_ND))
            yield self.rows_ND[self._order[first : first + self.batch_rows]]

    def tensors(self) -> Iterator[torch.Tensor]:
        return map(torch.from_numpy, self.batches())


def rlsae(options: Options, rows: Rows) -> None:
    from rlsae import compute
    from rlsae.config import AnyDictionary
    from rlsae.expand import parse_settings
    from rlsae.resumable import Stage
    from rlsae.sae.train import new_members, train

    compute.configure()
    settings: dict[str, Any] = {"architecture": options.architecture, "seeds": [options.seed]}
    settings |= {"expansion": options.latents / options.channels, "batch_rows": options.batch_rows}
    settings |= {"learning_rate": options.learning_rate, "warmup_share": WARMUP, "decay_share": DECAY}
    settings["precision"] = "bfloat16" if options.precision == "bfloat16" else "float32"
    settings |= {
        "relu": {"l1": options.sparsity},
        "tied_relu": {"l1": options.sparsity * options.channels**-0.5},
        "gated": {"l1": options.sparsity},
        "jumprelu": {"l0": options.k, "l0_weight": options.sparsity},
        "matryoshka": {"k": options.k} | ({"prefixes": [0.25, 0.5, 1.0]} if options.variant == "quarter" else {}),
    }.get(options.architecture, {"k": options.k})
    settings |= {"reads": "both"} if options.crosscoder else {}
    entry = parse_settings(AnyDictionary, json.dumps(settings))
    members = new_members(entry, options.width, "benchmark", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, Stage("benchmark", Path(folder) / "out", {}, {}) as stage:
        scale = options.width**-0.5 if members[options.seed].unit_length else 1.0
        train(members, rows, entry, torch.zeros(options.width), scale, stage)  # type: ignore[arg-type]
    if options.out:
        sae = members[options.seed].export().reading_raw_rows(torch.zeros(options.width), scale)
        sae.save(Path(options.out))


def sae_lens(options: Options, rows: Rows) -> None:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"relu": "standard"}.get(options.architecture, options.architecture)
    sae_class, config_class = get_sae_training_class(name)
    own: dict[str, Any] = {"k": options.k}
    sparsity_warmup = round(SPARSITY_WARMUP * options.steps)
    if options.architecture in ("relu", "gated"):
        own = {"l1_coefficient": options.sparsity * options.channels**0.5, "l1_warm_up_steps": sparsity_warmup}
    elif options.architecture == "jumprelu":
        # Its quadratic loss is 2 k (L0 / k - 1)² of each row; the slope of its step loss at L0 = 2 k is that of ours.
        weight = options.sparsity * options.channels * {"step": 2, "quadratic": 0.5}[options.variant] / options.k
        own = {"l0_coefficient": weight, "l0_warm_up_steps": sparsity_warmup}
        own |= {"jumprelu_sparsity_loss_mode": options.variant, "target_l0": options.k}
    torch.manual_seed(options.seed)
    sae = sae_class(config_class(d_in=options.channels, d_sae=options.latents, normalize_activations="none", **own))
    config = SAETrainerConfig(
        total_training_samples=options.steps * options.batch_rows,
        train_batch_size_samples=options.batch_rows,
        lr=options.learning_rate,
        lr_end=options.learning_rate / 10,
        lr_warm_up_steps=round(WARMUP * options.steps),
        lr_decay_steps=round(DECAY * options.steps),
    )
    trained = SAETrainer(config, sae, rows.tensors()).fit()
    if options.out:
        trained.save_inference_model(options.out)


def dictionary_learning(options: Options, rows: Rows) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    top_k = {"k": options.k, "threshold_start_step": min(1000, options.steps // 2)}
    warmup = {"sparsity_warmup_steps": round(SPARSITY_WARMUP * options.steps)}
    l1 = warmup | {"l1_penalty": options.sparsity}
    kind, own = {
        "relu": (StandardTrainerAprilUpdate if options.variant == "april" else StandardTrainer, l1),
        "gated": (GatedSAETrainer, l1),
        "jumprelu": (JumpReluTrainer, warmup | {"sparsity_penalty": options.sparsity, "target_l0": options.k}),
        "topk": (TopKTrainer, top_k),
        "batchtopk": (BatchTopKTrainer, top_k),
    }[options.architecture]
    rows.rows_ND *= options.channels**-0.5
    torch.manual_seed(options.seed)  # not every trainer does
    trainer = kind(
        steps=options.steps,
        activation_dim=options.channels,
        dict_size=options.latents,
        layer=0,
        lm_name="",
        lr=options.learning_rate,
        warmup_steps=round(WARMUP * options.steps),
        decay_start=round((1 - DECAY) * options.steps),
        seed=options.seed,
        device="cpu",
        **own,
    )
    for step, acts_BD in enumerate(rows.tensors()):
        trainer.update(step, acts_BD)
    trainer.ae.scale_biases(options.channels**0.5)
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True)
        torch.save(trainer.ae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))


def sparsify(options: Options, rows: Rows) -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(options.seed)
    coder = SparseCoder(options.channels, SparseCoderConfig(num_latents=options.latents, k=options.k))
    optimizer = torch.optim.Adam(coder.parameters(), lr=options.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * options.steps), options.steps)
    since_fired_F = torch.zeros(options.latents, dtype=torch.long)
    for step, acts_BD in enumerate(rows.tensors()):
        if step == 0:
            coder.b_dec.data = acts_BD.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(acts_BD)
        float(out.fvu.detach())
        out.fvu.backward()
        fired_F = torch.zeros(options.latents, dtype=torch.bool)
        fired_F[out.latent_indices.flatten()] = True
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        since_fired_F += len(acts_BD)
        since_fired_F[fired_F] = 0
    if options.out:
        coder.set_decoder_norm_to_unit_norm()
        coder.save_to_disk(options.out)


def crosscoder(options: Options, rows: Rows) -> None:
    """`CrossCoder` of ckkissane/crosscoder-model-diff-replication, and the step of its `Trainer`, which wants models."""
    sys.path.insert(0, options.crosscoder)
    from crosscoder import CrossCoder

    config = {"dict_size": options.latents, "d_in": options.channels, "enc_dtype": "fp32", "dec_init_norm": 0.08}
    model = CrossCoder(config | {"seed": options.seed, "device": "cpu"})
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for acts_BE in rows.tensors():
        losses = model.get_losses(acts_BE.view(-1, 2, options.channels))
        loss = losses.l2_loss + options.sparsity * losses.l1_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for figure in (loss, *losses):
            figure.mean().item()


def products(options: Options, rows: Rows) -> None:
    """The matrix products alone that a dense step needs: all five, or with `architecture: encoder` the first."""
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    if dtype == torch.float32:
        from rlsae import compute

        compute.configure()
    B, D, F = options.batch_rows, options.width, options.latents
    W_FD, grad_FD = (torch.randn(F, D, dtype=dtype) for _ in range(2))
    latents_BF, grad_BF = (torch.randn(B, F, dtype=dtype) for _ in range(2))
    error_BD = torch.randn(B, D, dtype=dtype)
    for batch_BD in rows.tensors():
        acts_BD = batch_BD.to(dtype)
        torch.mm(acts_BD, W_FD.T, out=latents_BF)
        if options.architecture == "encoder":
            continue
        torch.mm(latents_BF, W_FD, out=error_BD)
        torch.mm(error_BD, W_FD.T, out=grad_BF)
        torch.mm(latents_BF.T, error_BD, out=grad_FD)
        torch.mm(grad_BF.T, acts_BD, out=grad_FD)


LIBRARIES = SimpleNamespace(
    rlsae=rlsae,
    sae_lens=sae_lens,
    dictionary_learning=dictionary_learning,
    sparsify=sparsify,
    crosscoder=crosscoder,
    products=products,
)


def main() -> None:
    for text in sys.argv[1:]:
        options = Options(**json.loads(text))
        if options.precision != "bfloat16":
            torch.set_float32_matmul_precision(options.precision)
        getattr(LIBRARIES, options.library)(options, Rows(options))


if __name__ == "__main__":
    main()
