"""A language model behind any server that speaks OpenAI's chat completions.

The key goes into one header of one request and nowhere else: redirects are not followed, a netrc file is not consulted, and
whatever a server says is searched for it before anybody sees it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import requests

from rlsae.config.llm import OpenAiLlm
from rlsae.errors import RlsaeError
from rlsae.interpretation.llm.client import CUT, LlmError, Message

LONGEST_WAIT = 120.0
"""Seconds; a server that asks for a longer pause counts as down."""
SHORTEST_SECRET = 8
"""Shorter keys are placeholders (`EMPTY`, `none`) for servers that need none; in answers they stay."""
SHOWN = 200
"""Characters of a server's complaint that a status repeats."""


class _Passing(Exception):
    """A failure that a later attempt may not meet; `wait`: seconds that the server asks for."""

    def __init__(self, status: str, wait: float = 0.0) -> None:
        super().__init__(status)
        self.status, self.wait = status, wait


class OpenAi:
    """POST {base_url}/chat/completions, with retries after 408, 429, 5xx, timeouts and lost connections.

    Args:
        sleep, clock: of the waits between requests; tests replace them.
    """

    def __init__(
        self, entry: OpenAiLlm, sleep: Callable[[float], Any] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.entry, self.sleep, self.clock = entry, sleep, clock
        self.session = requests.Session()
        self._earliest = -math.inf

    @property
    def identity(self) -> dict[str, Any]:
        shaping = self.entry.model_dump(include={"kind", "base_url", "model", "max_tokens"})
        return shaping | {"temperature": 0}

    def complete(self, messages: list[Message]) -> str:
        """
        Raises:
            LlmError: the server gave no answer.
            RlsaeError: the environment has no usable key.
        """
        key = _Key(self.entry.key_variable)
        for attempt in range(self.entry.retries + 1):
            self._keep_pace()
            try:
                return self._post(messages, key)
            except _Passing as failure:
                status, wait = failure.status, max(failure.wait, min(2.0**attempt, LONGEST_WAIT))
            if wait > LONGEST_WAIT:
                status += f", and asks for a pause of {wait:.0f} s"
                break
            if attempt < self.entry.retries:
                self.sleep(wait)
        raise LlmError(status)

    def _keep_pace(self) -> None:
        if self.entry.requests_per_minute:
            now = self.clock()
            if now < self._earliest:
                self.sleep(self._earliest - now)
            self._earliest = max(now, self._earliest) + 60 / self.entry.requests_per_minute

    def _post(self, messages: list[Message], key: _Key) -> str:
        body: dict[str, Any] = {
            "model": self.entry.model,
            "messages": messages,
            "max_tokens": self.entry.max_tokens,
            "temperature": 0,
        }
        url = self.entry.base_url.rstrip("/") + "/chat/completions"
        try:
            reply = self.session.post(url, json=body, auth=key.sign, timeout=self.entry.timeout, allow_redirects=False)
        except requests.Timeout:
            raise _Passing(f"the server gives no answer within {self.entry.timeout:g} s") from None
        # A host name that cannot be one is a ValueError of the library below.
        except (requests.RequestException, ValueError) as error:
            raise _Passing(f"the server cannot be reached ({type(error).__name__})") from None
        code = reply.status_code
        if code in (408, 429) or code >= 500:
            raise _Passing(f"the server answers HTTP {code}", retry_after(reply.headers.get("Retry-After")))
        if 300 <= code < 400:
            raise LlmError(f"the server redirects elsewhere (HTTP {code}); set base_url to where the model is")
        if code in (401, 403):
            # Some servers repeat a part of the key in what they say here.
            raise LlmError(f"the server refuses the key (HTTP {code}); key_variable: {self.entry.key_variable}")
        if code != 200:
            raise LlmError(f"the server answers HTTP {code}{key.redact(_complaint(reply))[:SHOWN]}", code in (400, 413, 422))
        return key.redact(_content(reply), SHORTEST_SECRET)


class _Key:
    """The key, with what is done with it; no text shows it."""

    def __init__(self, variable: str | None) -> None:
        self._value = os.environ.get(variable, "").strip() if variable else ""
        if variable and not self._value:
            raise RlsaeError(f"the environment variable {variable} is not set; it holds the key of the language model's server")
        # The HTTP library would repeat such a key in its error.
        if not (self._value.isascii() and self._value.isprintable()) or " " in self._value:
            raise RlsaeError(f"the environment variable {variable} holds no key: it has blanks or other odd characters")

    def sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._value:
            request.headers["Authorization"] = f"Bearer {self._value}"
        return request

    def redact(self, text: str, shortest: int = 1) -> str:
        return text.replace(self._value, "[key]") if len(self._value) >= shortest else text


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number or a date (RFC 9110 section 10.2.3); 0 if it is neither."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header or "").timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _complaint(reply: requests.Response) -> str:
    """What the server's error object says."""
    try:
        return ": " + _writable(" ".join(str(reply.json()["error"]["message"]).split()))
    except (ValueError, RecursionError, LookupError, TypeError):
        return ""


def _content(reply: requests.Response) -> str:
    """The text of an answer.

    Raises:
        LlmError: there is none.
    """
    try:
        choice = reply.json()["choices"][0]
        content, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, RecursionError):
        raise LlmError("the server's answer is not JSON") from None
    except (LookupError, TypeError):
        raise LlmError("the server's answer has no choices") from None
    if cut:
        raise LlmError(CUT, of_request=True)
    if not isinstance(content, str) or not content.strip():
        raise LlmError("the server's answer has no text", of_request=True)
    return _writable(content)


def _writable(text: str) -> str:
    """A text without the halves of characters that JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")
