"""A transformers model that answers on this machine."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlsae.artifacts import input_digests
from rlsae.compute import device
from rlsae.config.llm import LocalLlm
from rlsae.interpretation.llm.client import LlmError, Message
from rlsae.models import context_limit, load


class HfLocal:
    """Greedy answers of a folder or hub repository, which is loaded when it is first asked."""

    def __init__(self, entry: LocalLlm) -> None:
        self.entry = entry

    @cached_property
    def identity(self) -> dict[str, Any]:
        """By content, wherever the folder lies; of a repository by name and revision.

        Raises:
            RlsaeError: the folder does not exist.
        """
        shaping: dict[str, Any] = {"kind": self.entry.kind, "max_tokens": self.entry.max_tokens}
        if self.entry.path is not None:
            return shaping | input_digests({"language model": Path(self.entry.path)})
        return shaping | {"repository": self.entry.repository, "revision": self.entry.revision}

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        source = Path(self.entry.path) if self.entry.path is not None else str(self.entry.repository)
        return load(source, device(), self.entry.revision)

    @torch.no_grad()
    def complete(self, messages: list[Message]) -> str:
        """
        Raises:
            LlmError: prompt and answer do not fit into the context, or the answer is empty.
            RlsaeError: the model cannot be loaded.
        """
        model, tokenizer = self._loaded
        ids_BT = torch.tensor([self._prompt(messages)], device=model.device)
        # Some templates begin the thoughts themselves; without their beginning an answer would not be known as unfinished.
        begun = "<think>" if tokenizer.decode(ids_BT[0]).rstrip().endswith("<think>") else ""
        length, limit = ids_BT.shape[1], context_limit(model)
        if length + self.entry.max_tokens > limit:
            raise LlmError(
                f"prompt and answer need {length} + {self.entry.max_tokens} tokens, the model's context holds {limit}",
                of_request=True,
            )
        ends = model.generation_config.eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        # What these settings leave open would be filled from the model's own ones: sampling, penalties.
        model.generation_config = GenerationConfig(eos_token_id=ends)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=self.entry.max_tokens, eos_token_id=ends, pad_token_id=tokenizer.eos_token_id
        )
        answered_BT = model.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings)
        answer = str(tokenizer.decode(answered_BT[0, length:], skip_special_tokens=True)).strip()
        if not answer:
            raise LlmError("the model's answer is empty", of_request=True)
        return begun + answer

    def _prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation, by the chat template where there is one."""
        tokenizer = self._loaded[1]
        said = [message | {"content": self._without_special_tokens(message["content"])} for message in messages]
        if not tokenizer.chat_template:
            return list(tokenizer("\n\n".join(message["content"] for message in said) + "\n\nAnswer:")["input_ids"])
        try:
            text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise LlmError(f"the model's chat template fails: {error}") from None
        # The template writes the special tokens itself.
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _without_special_tokens(self, text: str) -> str:
        """Special tokens that stand in a text broken up: corpus text must not end a turn of the conversation."""
        tokenizer = self._loaded[1]
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        for name in sorted(names | set(tokenizer.all_special_tokens), key=len, reverse=True):
            if len(name) > 1:
                text = text.replace(name, f"{name[0]} {name[1:]}")
        return text
