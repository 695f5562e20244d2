"""What every training loop shares: learning-rate schedules and optimizer state as plain tensors."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def warmup_linear(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: up over `warmup` steps, then straight down to zero at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: up over `warmup` steps, then half a cosine down to zero at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_hold_decay(step: int, warmup: int, decay: int, total: int) -> float:
    """Factor of the learning rate: up over `warmup` steps, constant, then down over the last `decay` steps."""
    return min((step + 1) / max(1, warmup), 1.0, (total - step) / max(1, decay))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, Tensor]:
    """Moments and step counts, named by the position of their parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {f"{prefix}.{i}.{key}": value for i, p in enumerate(parameters) for key, value in optimizer.state[p].items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer") -> None:
    """Restore what `optimizer_tensors` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            position, key = name.removeprefix(prefix + ".").split(".")
            parameter = parameters[int(position)]
            optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale each group's peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def joint_seed(*parts: int) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
