"""What tests of TRL's trainers share: the methods and small settings of each."""

from __future__ import annotations

import pytest

from rlsae.config import DPOTuning, GRPOTuning, Lora, RLOOTuning

KINDS = {"dpo": DPOTuning, "rloo": RLOOTuning, "grpo": GRPOTuning}
METHODS = list(KINDS)
SAMPLING = ["rloo", "grpo"]
LORA = {"lora": Lora(rank=2, alpha=4)}

whole_or_lora = pytest.mark.parametrize("changes", [{}, LORA], ids=["whole", "lora"])


def entry(method, **changes):
    sizes = {"batches": 3, "batch_size": 8, "learning_rate": 1e-3, "evaluation_prompts": 8}
    sizes |= {} if method == "dpo" else {"minibatch_size": 4}
    lengths = {"query_tokens": (2, 4), "response_tokens": (3, 6)}
    return KINDS[method](**{"method": method, "reward": "letters", "corpus": "reviews"} | sizes | lengths | changes)
