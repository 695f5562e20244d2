"""Answers of language models on disk: a rerun is free, identical, and asks only for what is missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlsae.artifacts import write_atomically
from rlsae.interpretation.llm.client import Client, Message


class Cached:
    """A client whose answers are kept, one JSON file per call, named by the SHA-256 of model, parameters and messages.

    Failures are not kept. A file that cannot be read is asked for again.
    """

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder

    @property
    def identity(self) -> dict[str, Any]:
        return self.client.identity

    def complete(self, messages: list[Message]) -> str:
        """
        Raises:
            LlmError: the answer is not here and the client has none.
        """
        call = {"model": self.identity, "messages": messages}
        # Escaped, since tokens that are parts of characters may be no valid UTF-8.
        name = hashlib.sha256(json.dumps(call, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name}.json"
        kept = _read(path, call)
        if kept is not None:
            return kept
        answer = self.client.complete(messages)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(call | {"answer": answer}, sort_keys=True, indent=1) + "\n")
        return answer


def _read(path: Path, call: dict[str, Any]) -> str | None:
    """The answer that a file holds to this very call; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    answer = content.get("answer") if isinstance(content, dict) else None
    return answer if isinstance(answer, str) and content == call | {"answer": answer} else None
