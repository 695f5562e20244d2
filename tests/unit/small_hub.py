"""A hub on this machine that serves folders as repositories: the few addresses that its libraries ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def serving(repositories, token=None):
    """Serve folders by kind and name (`("models", "small/model")`), to those alone who show the token, if there is one.

    Yields the address and the list of what is asked for.
    """
    asked = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, content, status=200, headers=None):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET()

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            _, _, kind, owner, name, *_ = urlsplit(self.path).path.split("/")
            folder = repositories[kind, f"{owner}/{name}"]
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            found = [entry(folder, folder / path) for path in wanted if path and (folder / path).is_file()]
            self.answer(json.dumps(found).encode(), headers={"Content-Type": "application/json"})

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            if token and self.headers["Authorization"] != f"Bearer {token}":
                return self.answer(b"{}", 401, {"X-Error-Code": "GatedRepo"})
            for (kind, name), folder in repositories.items():
                if path.startswith(f"/api/{kind}/{name}"):
                    return self.describe(folder, name, path.removeprefix(f"/api/{kind}/{name}"))
                prefix = f"/{name}/resolve/" if kind == "models" else f"/{kind}/{name}/resolve/"
                if path.startswith(prefix):
                    return self.serve(folder / path.removeprefix(prefix).partition("/")[2])
            return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

        def describe(self, folder, name, rest):
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            if rest.startswith("/tree"):
                told = [entry(folder, file) for file in files]
            else:
                siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
                told = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(json.dumps(told).encode(), headers={"Content-Type": "application/json"})

        def serve(self, file):
            if not file.is_file():
                return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = file.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(content, headers={"ETag": tag, "X-Repo-Commit": COMMIT})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def entry(folder: Path, file: Path):
    """A file as the hub lists it."""
    content = file.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": file.relative_to(folder).as_posix(), "size": len(content), "oid": oid}
