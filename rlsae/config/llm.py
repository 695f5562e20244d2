"""Language models that explain latents and judge explanations."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlsae.config.entry import Entry, Positive
from rlsae.config.tunings import FolderOrRepository


class OpenAiLlm(Entry):
    """Any server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama."""

    kind: Literal["openai"]
    base_url: str = Field(
        description="Address before /chat/completions: http://localhost:8000/v1. Windows of the corpus go there."
    )
    model: str = Field(description="Name of the model at the server.")
    key_variable: str | None = Field(
        "OPENAI_API_KEY", description="Name of the environment variable that holds the key, never the key; null: no key."
    )
    timeout: Annotated[float, Field(gt=0)] = Field(60.0, description="Seconds without a byte from the server until a retry.")
    retries: Annotated[int, Field(ge=0)] = Field(
        4, description="Attempts after the first where the server is down, busy or slow; waits double from 1 s."
    )
    requests_per_minute: Positive | None = Field(None, description="Limit of the requests, retries among them; null: none.")
    max_tokens: Positive = Field(512, description="Longest answer; models that think before they answer need more.")

    # Of the whole entry, because a message about one field repeats its value, which may be the key.
    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise ValueError("key_variable: expected the name of an environment variable; the key itself belongs into no file")
        try:
            url = urlsplit(self.base_url)
            plain = url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc
        except ValueError:
            plain = False
        if not plain or "?" in self.base_url or "#" in self.base_url:
            raise ValueError("base_url: expected http(s)://host[:port][/path] without user, password or query")
        return self


class LocalLlm(FolderOrRepository):
    """A transformers model that answers on this machine."""

    kind: Literal["hf_local"]
    max_tokens: Positive = Field(512, description="Longest answer; models that think before they answer need more.")


AnyLlm = Annotated[OpenAiLlm | LocalLlm, Field(discriminator="kind")]
