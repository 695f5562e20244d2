"""Causal language models: load one from a folder, publish a base model, find its layers by structure.

The artifact is `model/`: a folder that `transformers` loads, with its tokenizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlsae.config import AnyModel, LocalModel, PretrainedModel
from rlsae.errors import RlsaeError
from rlsae.hub import unreachable
from rlsae.resumable import Stage

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

Hook = str
"""`mlp`, `attention`, `block`, or the path of a module inside each block."""


def build_model(
    entry: AnyModel, settings: dict[str, Any], out: Path, work: Path | None, source: Path | None, corpus: Path | None
) -> None:
    """Stage `models`: publish a base model as a transformers folder.

    Args:
        entry: pretrain it here, copy a local folder, or take it from the hub.
        settings: what the manifest records.
        source: folder of a local model.
        corpus: corpus artifact of a pretrained model.
    """
    inputs = {"corpus": corpus} if corpus else {"model": source} if source else {}
    with Stage("models", out, settings, inputs, work) as stage:
        if isinstance(entry, PretrainedModel):
            from rlsae.pretrain import pretrain

            assert corpus is not None
            model, tokenizer, metrics = pretrain(entry, settings["context_length"], corpus, stage)
        elif isinstance(entry, LocalModel):
            assert source is not None
            model, tokenizer = load(source)
            metrics = {}
        else:
            model, tokenizer = load(entry.repository, revision=entry.revision)
            metrics = {}
        check_tokenizer(model, tokenizer)
        save(model, tokenizer, stage.staging / "model")
        parameters = sum(p.numel() for p in model.parameters())
        stage.publish({"parameters": parameters, "layers": len(blocks(model)), "channels": width(model), **metrics})


def load(
    source: Path | str, device: torch.device | str = "cpu", revision: str = "main"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in float32 without dropout, and its tokenizer.

    Args:
        source: a transformers folder or, given as text, a repository of the hub.
        revision: commit or tag of the repository.

    Raises:
        RlsaeError: there is no such model, or its weights lack a part of it.
    """
    return _load(AutoModelForCausalLM, source, revision, device)


def load_classifier(
    source: Path | str, revision: str, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model and its tokenizer, from a folder or the hub, able to score padded batches."""
    model, tokenizer = _load(AutoModelForSequenceClassification, source, revision, device)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"  # positions that are learned begin at the first token
    tokenizer.model_max_length = min(tokenizer.model_max_length, context_limit(model))
    return model, tokenizer


def _load(
    kind: Any, source: Path | str, revision: str, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(source, Path) and not (source / "config.json").exists():
        raise RlsaeError(f"{source} is no transformers model: it has no config.json")
    place: dict[str, Any] = {"local_files_only": True} if isinstance(source, Path) else {"revision": revision}
    try:
        model, report = kind.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **place
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **place)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(source, Path):
            raise RlsaeError(f"transformers cannot load {source}: {error}") from None
        raise unreachable("model", source, revision, error) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + 1:
        raise RlsaeError(f"{source} holds no tokenizer; save one beside the weights")
    if report["missing_keys"]:
        raise RlsaeError(
            f"{source}: the weights lack {sorted(report['missing_keys'])}; this is not the model of its config.json"
        )
    return model.to(device).eval(), tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a transformers folder (safetensors)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        RlsaeError: the tokenizer can produce ids that the model has no embedding for, or has no end-of-text token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise RlsaeError(f"the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}: they do not belong together")
    if tokenizer.eos_token_id is None:
        raise RlsaeError("the tokenizer has no end-of-text token (eos_token); set one in its tokenizer_config.json")


def check_same_shape(base: PreTrainedModel, tuned: PreTrainedModel, tuned_name: str) -> None:
    """
    Raises:
        RlsaeError: the two differ in architecture, layers, width or vocabulary: their layers cannot be compared.
    """
    facts = {
        "architecture": lambda model: type(model).__name__,
        "layers": lambda model: len(blocks(model)),
        "width": width,
        "vocabulary": lambda model: model.get_input_embeddings().weight.shape[0],
    }
    for name, fact in facts.items():
        if fact(base) != fact(tuned):
            raise RlsaeError(f"{tuned_name} is no tuning of the base: {name} {fact(tuned)}, the base has {fact(base)}")
    ours, theirs = context_limit(base), context_limit(tuned)
    if theirs < ours:
        raise RlsaeError(f"{tuned_name} is no tuning of the base: context {theirs}, the base has {ours}")


def check_same_tokenizer(base: PreTrainedTokenizerBase, tuned: PreTrainedTokenizerBase, tuned_name: str) -> None:
    """
    Raises:
        RlsaeError: the two tokenizers number their tokens differently.
    """
    ours, theirs = base.get_vocab(), tuned.get_vocab()
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        shown = ", ".join(repr(token) for token in different[:3])
        raise RlsaeError(f"{tuned_name}: its tokenizer differs from the base's in {len(different)} tokens ({shown} …)")


# --- layers, found by structure ----------------------------------------------------------------------------------


def width(model: PreTrainedModel) -> int:
    """Channels of the residual stream."""
    return int(model.get_input_embeddings().weight.shape[1])


def context_limit(model: PreTrainedModel) -> int:
    """Longest sequence that the model takes."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks: the module list as long as the model has layers."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and _has_matrix(module[0]):
            return module
    raise RlsaeError(f"{type(model).__name__}: found no list of {count} transformer blocks")


def component(block: nn.Module, hook: Hook) -> nn.Module:
    """A block itself, its attention or its MLP, or the module at a path inside it.

    Attention and MLP both have weight matrices; an MLP's forward takes the hidden states alone, an attention's takes more.
    """
    if hook == "block":
        return block
    if hook not in ("mlp", "attention"):
        try:
            return block.get_submodule(hook)
        except AttributeError:
            paths = ", ".join(path for path, _ in block.named_modules() if path)
            raise RlsaeError(f"hook: {type(block).__name__} has no module {hook!r}; it has: {paths}") from None
    halves = [child for child in block.children() if _has_matrix(child)]
    mlps = [half for half in halves if len(inspect.signature(half.forward).parameters) == 1]
    found = mlps if hook == "mlp" else [half for half in halves if half not in mlps]
    if len(found) != 1:
        raise RlsaeError(
            f"{type(block).__name__}: expected one {hook}, found {len(found)}; children: {dict(block.named_children())}"
        )
    return found[0]


def module_path(model: PreTrainedModel, layer: int, hook: Hook) -> str:
    """Dotted name of a hooked module, as SAELens records it: `gpt_neox.layers.3.mlp`."""
    target = component(blocks(model)[layer], hook)
    return next(name for name, module in model.named_modules() if module is target)


def output_tensor(output: Any) -> Tensor:
    """The hidden states in a module's output, which is a tensor or a tuple that starts with it."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def replace_output(model: PreTrainedModel, layer: int, hook: Hook, function: Any) -> Iterator[None]:
    """Within the context a layer's output acts_BTD is replaced by `function(acts_BTD)`."""
    with replace_module_output(component(blocks(model)[layer], hook), function):
        yield


@contextmanager
def replace_module_output(target: nn.Module, function: Any) -> Iterator[None]:
    """The same of a module."""

    def edit(module: nn.Module, arguments: Any, output: Any) -> Any:
        replaced = function(output_tensor(output))
        return replaced if isinstance(output, Tensor) else (replaced, *output[1:])

    handle = target.register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def computed_once(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """Within the context every forward pass is on the first one's batch, so that blocks before the layer run only then."""
    before = list(blocks(model))[:layer]

    def remember(module: nn.Module, arguments: Any, output: Any) -> None:
        for block in before:
            block.forward = lambda *_, **__: output

    handles = [block.register_forward_hook(remember) for block in before[-1:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in before:
            block.__dict__.pop("forward", None)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() == 2 for parameter in module.parameters())
