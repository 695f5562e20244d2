"""What a direction of the residual stream says: the tokens that it makes more and less likely (nostalgebraist 2020)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

TOKENS = 8


@torch.inference_mode()
def raised_and_lowered(model: PreTrainedModel, directions_SD: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens whose logits W_U · direction is largest and smallest for [S, TOKENS], the strongest first.

    [S, 0] where the rows are of another width than the residual stream: those of a module inside the MLP, say.
    """
    unembedding_VD = model.get_output_embeddings().weight
    if directions_SD.shape[1] != unembedding_VD.shape[1]:
        none = np.empty((len(directions_SD), 0), np.int64)
        return none, none
    order_SV = (directions_SD.to(unembedding_VD) @ unembedding_VD.T).argsort(1, descending=True).cpu().numpy()
    return order_SV[:, :TOKENS], order_SV[:, ::-1][:, :TOKENS]
