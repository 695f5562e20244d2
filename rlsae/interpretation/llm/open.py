"""From a configuration entry to a client."""

from __future__ import annotations

from pathlib import Path

from rlsae.config.llm import AnyLlm, OpenAiLlm
from rlsae.interpretation.llm.cache import Cached
from rlsae.interpretation.llm.client import Client, FailFast
from rlsae.interpretation.llm.hf_local import HfLocal
from rlsae.interpretation.llm.openai import OpenAi


def open_client(entry: AnyLlm, cache_folder: Path) -> Client:
    """The client of an entry, its answers kept in a folder; one that keeps failing is soon not asked again.

    Nothing is loaded and no key is read before an answer is missing.
    """
    client = OpenAi(entry) if isinstance(entry, OpenAiLlm) else HfLocal(entry)
    return Cached(FailFast(client), cache_folder)
