"""A language model's server in a thread that answers by a script, and windows to ask it about."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from rlsae.config.llm import OpenAiLlm
from rlsae.interpretation.llm.client import LlmError
from rlsae.interpretation.windows import Window

KEY = "sk-very-secret-0123456789"
QUESTION = [{"role": "user", "content": "What is it?"}]


@dataclass
class Reply:
    """What the server sends; a text stands for a good answer with that text."""

    body: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


@dataclass
class Server:
    url: str
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)


@contextmanager
def served(script):
    """A server that answers with the replies of a list in turn (the last for ever), or with a function of the prompt."""
    server = Server("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request | {"path": self.path})
            server.headers.append(dict(self.headers))
            if callable(script):
                reply = script(request["messages"][-1]["content"])
            else:
                reply = script[min(len(server.requests), len(script)) - 1]
            if isinstance(reply, str):
                reply = Reply(json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}))
            time.sleep(reply.delay)
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body.encode())), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body.encode())
            except OSError:
                pass  # the client has given up

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def entry(url, **changes):
    return OpenAiLlm(**{"kind": "openai", "base_url": url, "model": "small", "key_variable": "A_KEY", **changes})


class Scripted:
    """A client without a server: the answer is a function of the last message; a function may raise LlmError."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []
        self.identity = {"kind": "scripted"}

    def complete(self, messages):
        self.asked.append(messages)
        return self.answer(messages[-1]["content"])


def down(prompt):
    raise LlmError("the server cannot be reached (ConnectionError)")


WORDS = ["the", "film", "was", "very", "long", "and", "we", "left", "early", "today"]


def window(rng, fires, word="cat", length=10, document=0):
    """Ten words; where the latent fires, a cat is among them."""
    tokens = [" " + WORDS[i] for i in rng.integers(len(WORDS), size=length)]
    acts = np.zeros(length, np.float32)
    if fires:
        place = rng.integers(length)
        tokens[place], acts[place] = " " + word, rng.uniform(0.5, 3)
    return Window(document, True, tuple(tokens), np.zeros(length, np.int64), acts)


def windows(count, fires, seed=0):
    rng = np.random.default_rng(seed)
    return [window(rng, fires, document=d) for d in range(count)]


def examples(prompt):
    """The numbered texts of a prompt of a judge."""
    lines = [line.partition(". ") for line in prompt.splitlines()]
    return [json.loads(text) for number, _, text in lines if number.isdigit()]
