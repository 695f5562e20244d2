"""Memory that runs out is told as the setting to lower; other errors pass as they are."""

from __future__ import annotations

import re

import pytest
import torch

from rlsae.config import DPOTuning, ExternalTuning, GRPOTuning, PPOTuning, RLOOTuning
from rlsae.errors import RlsaeError
from rlsae.tuning.stage import explained_memory

SHARED = {"reward": "letters", "corpus": "reviews"}
ON_POLICY = {"ppo": PPOTuning, "rloo": RLOOTuning, "grpo": GRPOTuning}
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSecond line"),
    MemoryError("Unable to allocate 2.00 GiB for an array"),
    MemoryError(),
    RuntimeError(CPU_MESSAGE),
]


def dpo(**changes):
    return DPOTuning(method="dpo", **SHARED, batch_size=32, **changes)


def explained(error, entry):
    """What the user is told where this error happens."""
    with pytest.raises(RlsaeError) as caught, explained_memory(entry):
        raise error
    return str(caught.value)


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "numpy", "python", "cpu"])
def test_memory_that_ran_out_anywhere_is_explained_with_the_first_line_of_the_error(error):
    told = explained(error, dpo())
    assert told.startswith("out of memory: ")
    assert told.splitlines()[1:] == (str(error).splitlines()[:1])


@pytest.mark.parametrize("method", ON_POLICY)
def test_the_methods_that_sample_are_told_to_lower_the_minibatch(method):
    entry = ON_POLICY[method](method=method, **SHARED, batch_size=128, minibatch_size=16, gradient_accumulation=2)
    told = explained(ERRORS[0], entry)
    assert "raise gradient_accumulation (now 2) or lower minibatch_size (now 16)" in told
    assert "precision: bfloat16 and lora" in told


def test_dpo_is_told_to_lower_the_batch():
    told = explained(ERRORS[0], dpo(gradient_accumulation=4))
    assert "raise gradient_accumulation (now 4) or lower batch_size (now 32)" in told


def test_a_model_from_elsewhere_has_no_setting_to_lower():
    told = explained(ERRORS[0], ExternalTuning(method="external", path="tuned", **SHARED))
    assert "use a smaller model or a larger machine" in told
    assert "batch" not in told.splitlines()[0]


def test_an_allocation_that_the_processor_refuses_is_explained():
    with pytest.raises(RlsaeError, match="out of memory: raise gradient_accumulation"), explained_memory(dpo()):
        torch.empty(2**62, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"),
        ValueError("memory"),
        RlsaeError("max_tokens: 65 tokens are asked for"),
        KeyboardInterrupt("by hand"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error), match=re.escape(str(error))) as caught, explained_memory(dpo()):
        raise error
    assert caught.value is error


def test_what_goes_well_goes_on():
    with explained_memory(dpo()):
        result = 1
    assert result == 1
