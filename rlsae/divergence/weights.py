"""How far the weights of each layer moved.

    weight_l2_sum        Σ_p ‖θ_p^tuned - θ_p^base‖₂ over the parameters p of a layer (arXiv 2310.08164 section 3.2)
    weight_l2            ‖θ^tuned - θ^base‖₂ over all weights of a layer together
    weight_l2_relative   weight_l2 / ‖θ^base‖₂

Each of the whole layer and of its components: attention, mlp, and norms (whatever is neither).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlsae.divergence.table import WHOLE, Measured
from rlsae.errors import RlsaeError
from rlsae.models import blocks, component


def weight_divergence(base: Path, tuned: Path) -> list[Measured]:
    """Every weight measure of each layer and component; one parameter of each model in memory at a time.

    Args:
        base, tuned: transformers folders.

    Raises:
        RlsaeError: the models differ in their parameters or shapes.
    """
    of_parameter = component_of_parameter(base)
    norms, squares, base_squares = (defaultdict[tuple[int, str], float](float) for _ in range(3))
    for name, layer, before, after in layer_parameters(base, tuned):
        if before.shape != after.shape:
            shapes = f"shape {tuple(before.shape)} in {base}, {tuple(after.shape)} in {tuned}"
            raise RlsaeError(f"{name}: {shapes}; the models cannot be compared")
        before, after = before.double(), after.double()
        square = float((after - before).square().sum())
        for part in (WHOLE, of_parameter.get(name.split(f".{layer}.", 1)[1], "norms")):
            norms[layer, part] += square**0.5
            squares[layer, part] += square
            base_squares[layer, part] += float(before.square().sum())
    layers = range(len({layer for layer, _ in norms}))
    found = []
    for part in [WHOLE, *sorted({part for _, part in norms} - {WHOLE})]:
        sums_L, squares_L, base_L = (
            np.array([table[layer, part] for layer in layers]) for table in (norms, squares, base_squares)
        )
        relative_L = np.divide(squares_L, base_L, out=np.zeros(len(layers)), where=base_L > 0)
        found += [
            Measured("weight_l2_sum", part, sums_L),
            Measured("weight_l2", part, np.sqrt(squares_L)),
            Measured("weight_l2_relative", part, np.sqrt(relative_L)),
        ]
    return found


def component_of_parameter(folder: Path) -> dict[str, str]:
    """`attention` or `mlp` for each parameter of a block that belongs to one, by its name inside the block."""
    with torch.device("meta"):
        shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
    block = blocks(model)[0]
    found: dict[str, str] = {}
    for kind in ("attention", "mlp"):
        half = component(block, kind)
        prefix = next(name for name, child in block.named_modules() if child is half)
        found |= {f"{prefix}.{name}": kind for name, _ in half.named_parameters()}
    return found


def layer_parameters(base: Path, tuned: Path) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """(name, layer, base, tuned) of every parameter that belongs to a layer: its name has the layer's number as a part."""
    before, after = weight_files(base), weight_files(tuned)
    if before.keys() != after.keys():
        differing = sorted(before.keys() ^ after.keys())
        raise RlsaeError(f"{base} and {tuned} differ in their parameters: {', '.join(differing[:5])}")
    for name in sorted(before):
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers:
            yield name, numbers[0], _tensor(before[name], name), _tensor(after[name], name)


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors file that holds each parameter of a transformers folder."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    if not found:
        raise RlsaeError(f"{folder} holds no safetensors weights")
    return found


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
