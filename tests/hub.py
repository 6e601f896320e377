"""A Hugging Face hub on this machine's loopback, which takes commits, and can misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
ASKED = re.compile(r"/api/models/(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<what>revision|tree)/\w+)?(?:\?.*)?")
SENT = re.compile(r"/api/models/(?P<repository>[\w.-]+/[\w.-]+)/(?P<what>preupload|commit)/main(?:\?.*)?")


@dataclass
class Hub:
    """What is served, how, and what was asked.

    files: path (`/owner/name/resolve/main/file`) -> bytes. etags: what the hub says of a path instead of the SHA-256 of
    its bytes. cut_after: bytes of a body after which the next connection breaks; the requests after it are refused with
    503. storage: whether files are handed out by another host, as large ones are. refused: path -> status. token: the
    only one that is accepted, where one is needed.
    """

    address: str
    storage_address: str
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    broken: bool = False
    storage: bool = False
    refused: dict[str, int] = field(default_factory=dict)
    token: str | None = None
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    def repository(self, name: str) -> dict[str, bytes]:
        """The files of a repository by name; empty where there is none."""
        root = f"/{name}/resolve/main/"
        return {path.removeprefix(root): body for path, body in self.files.items() if path.startswith(root)}

    def keep(self, repository: str, name: str, body: bytes) -> None:
        for revision in ("main", COMMIT):
            self.files[f"/{repository}/resolve/{revision}/{name}"] = body

    def described(self, path: str) -> dict | list | None:
        """What the hub says of a repository, or of its tree; None where there is none, or of another path."""
        asked = ASKED.fullmatch(path)
        files = self.repository(asked["repository"]) if asked else {}
        if not files:
            return None
        if asked["what"] == "tree":
            return [{"type": "file", "path": name, "size": len(body), "oid": COMMIT} for name, body in files.items()]
        siblings = [{"rfilename": name} for name in files]
        return {"id": asked["repository"], "sha": COMMIT, "siblings": siblings}

    def take(self, path: str, body: bytes) -> dict | None:
        """What the hub answers to a new repository, to the announcement of a commit, and to the commit."""
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            return {"url": f"{self.address}/{lines[0]['organization']}/{lines[0]['name']}"}
        if path == "/api/validate-yaml":
            return {}
        sent = SENT.fullmatch(path)
        if sent is None:
            return None
        if sent["what"] == "preupload":
            asked = [file["path"] for file in lines[0]["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]}
        for line in lines[1:]:
            self.keep(sent["repository"], line["value"]["path"], base64.b64decode(line["value"]["content"]))
        return {"commitUrl": f"{self.address}/{sent['repository']}/commit/{COMMIT}", "commitOid": COMMIT}

    def status_of(self, path: str, authorization: str | None) -> int:
        if path in self.refused:
            return self.refused[path]
        if path not in self.files:
            return 404
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401
        return 200

    def ranges(self) -> list[str | None]:
        """The Range header of each download."""
        return [asked for method, _, asked, _ in self.requests if method == "GET"]


@contextmanager
def running_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = server.server_address[1]
    server.hub = Hub(f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def do_HEAD(self):
        hub, authorization = self.note()
        status = hub.status_of(self.path, authorization)
        if status != 200:
            return self.refuse(status)
        body = hub.files[self.path]
        self.send_response(302 if hub.storage else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        etag = hub.etags.get(self.path, hashlib.sha256(body).hexdigest())
        self.send_header("X-Linked-Etag" if hub.storage else "ETag", f'"{etag}"')
        if hub.storage:
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("Location", hub.storage_address + self.path)
        self.send_header("Content-Length", "0" if hub.storage else str(len(body)))
        self.end_headers()
        return None

    def do_GET(self):
        hub, authorization = self.note()
        stored = self.path.startswith("/storage/")
        path = self.path.removeprefix("/storage")
        if path not in self.server.hub.files and (described := self.server.hub.described(path)) is not None:
            return self.answer(described)
        status = 503 if hub.broken else hub.status_of(path, f"Bearer {hub.token}" if stored else authorization)
        if status != 200:
            return self.refuse(status)
        body, start = hub.files[path], int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if self.headers["Range"] else 200)
        if self.headers["Range"]:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if hub.cut_after is None:
            self.wfile.write(body[start:])
        else:
            self.wfile.write(body[start : start + hub.cut_after])
            hub.cut_after, hub.broken, self.close_connection = None, True, True
        return None

    def do_POST(self):
        hub, authorization = self.note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if hub.token is not None and authorization != f"Bearer {hub.token}":
            return self.refuse(401)
        answer = hub.take(self.path, body)
        return self.refuse(404) if answer is None else self.answer(answer)

    def answer(self, content: dict | list) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def note(self) -> tuple[Hub, str | None]:
        hub = self.server.hub
        if "/resolve/" in self.path:  # the library asks about itself on the side
            hub.requests.append((self.command, self.path, self.headers["Range"], self.headers["Authorization"]))
        return hub, self.headers["Authorization"]

    def refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
