"""What a language model must offer, how its failures are told, and when to stop asking it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from rlsae.progress import say

Message = dict[str, str]
"""`role` (user or assistant: not every chat template knows another) and `content`."""
Read = TypeVar("Read")

FAILURES = 5
"""Failures in a row after which a server is not asked again."""
CUT = "the model's answer is longer than max_tokens allows"
MALFORMED = "the model's answer has not the form that was asked for"


class LlmError(Exception):
    """There is no answer; `status` says why, without secrets.

    Args:
        of_request: this request was refused; another one may be answered.
    """

    def __init__(self, status: str, of_request: bool = False) -> None:
        super().__init__(status)
        self.status, self.of_request = status, of_request


class Client(Protocol):
    """A language model at temperature 0."""

    @property
    def identity(self) -> dict[str, Any]:
        """The model and the parameters that shape its answers, as plain JSON values."""
        ...

    def complete(self, messages: list[Message]) -> str:
        """The model's answer to a conversation.

        Raises:
            LlmError: there is none.
        """
        ...


class FailFast:
    """Stops asking a client that failed too often in a row: a run over hundreds of latents ends soon, all with one status."""

    def __init__(self, client: Client, limit: int = FAILURES) -> None:
        self.client, self.limit, self.failed = client, limit, 0
        self.status = ""

    @property
    def identity(self) -> dict[str, Any]:
        return self.client.identity

    def complete(self, messages: list[Message]) -> str:
        if self.failed >= self.limit:
            raise LlmError(self.status)
        try:
            answer = self.client.complete(messages)
        except LlmError as error:
            if not error.of_request:
                self.failed, self.status = self.failed + 1, error.status
                if self.failed == self.limit:
                    say(f"language model: not asked again after {self.failed} failures in a row: {self.status}")
            raise
        self.failed = 0
        return answer


def spoken(answer: str) -> str | None:
    """What an answer says after the thoughts that some models write first; None where the thoughts do not end."""
    said = answer.rpartition("</think>")[2]
    return None if said.lstrip().startswith("<think>") else said


def ask(client: Client, prompt: str, reminder: str, read: Callable[[str], Read | None]) -> Read:
    """Ask, and once more with a reminder where the answer cannot be read.

    Args:
        read: what an answer says; None where it has not the form that was asked for.

    Raises:
        LlmError: there is no answer, or none that can be read.
    """
    messages = [{"role": "user", "content": prompt}]
    answer = client.complete(messages)
    found = read(answer)
    if found is None:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": reminder}]
        found = read(client.complete(messages))
    if found is None:
        raise LlmError(MALFORMED, of_request=True)
    return found
