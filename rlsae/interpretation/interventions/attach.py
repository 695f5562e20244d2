"""A dictionary on a running model, for a notebook: change what some of its latents write, or read what they do at a text.

Shapes: B texts, T positions, D channels, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.errors import RlsaeError
from rlsae.interpretation.interventions.edit import Edit, edited
from rlsae.models import replace_module_output
from rlsae.sae.dictionary import SparseAutoencoder


@contextmanager
def attach(model: PreTrainedModel, sae: SparseAutoencoder, latents: Sequence[int], gain: float = 0.0) -> Iterator[None]:
    """Within the context the model writes `gain` times what some latents write; what the dictionary misses stays as it is.

        with rlsae.attach(model, sae, [12, 40]):  # without these latents
            answers = prompts.answers(model)

    The dictionary knows its module. Contexts may be nested; on one module the inner one reads what the outer one left.

    Args:
        gain: 0 ablates, 1 changes nothing, 2 doubles.

    Raises:
        RlsaeError: the dictionary has no such latent or reads two models, or the model has no such module.
    """
    function = edited(sae.to(model.device), [Edit(tuple(map(int, latents)), gain)])
    with replace_module_output(_module(model, sae), function):
        yield


@torch.inference_mode()
def latents_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: SparseAutoencoder, text: str) -> pd.DataFrame:
    """Activations of all latents at a text: a row per token, named by its text, and a column per latent.

    Raises:
        RlsaeError: the model does not have the module that the dictionary reads.
    """
    kept: list[Tensor] = []

    def keep(acts_BTD: Tensor) -> Tensor:
        kept.append(acts_BTD)
        return acts_BTD

    ids_BT = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    with replace_module_output(_module(model, sae), keep):
        model(input_ids=ids_BT)
    latents_TF = sae.to(model.device).encode(kept[0][0])
    return pd.DataFrame(latents_TF.cpu().numpy(), index=[tokenizer.decode([token]) for token in ids_BT[0]])


def _module(model: PreTrainedModel, sae: SparseAutoencoder) -> nn.Module:
    """The module of the model whose output a dictionary reads."""
    if sae.reads != "own":
        raise RlsaeError(
            f"the dictionary reads {sae.reads} of base and tuned, not the rows of one model; let the other model run beside it "
            "(rlsae.beside.at_model)"
        )
    path = sae.metadata.get("hook_name")
    found = dict(model.named_modules()).get(path)
    if found is None:
        raise RlsaeError(
            f"the dictionary reads the module {path!r}, which {type(model).__name__} does not have; expected the model that it "
            f"was trained on, {sae.metadata.get('model_name')!r}, or a tuning of it"
        )
    return found
