"""A small Hugging Face Hub on loopback, for the Hub's own client: repositories of files, with commits and access.

Answers what the client asks for when it downloads a model: the commit of a revision, the files of a commit, and each
file. `requests` has every request in order, so that tests can count downloads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

MAIN = "main"


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Repo:
    files: Mapping[str, bytes]
    revisions: tuple[str, ...] = (MAIN,)
    is_gated: bool = False  # only requests with the Hub's token get the files
    is_private: bool = False  # as gated, and other requests do not learn that it exists


@dataclass(frozen=True, slots=True)
class Asked:
    method: str
    path: str


@dataclass(slots=True, kw_only=True)
class FakeHub:
    """The hub. Mutable; owned by its test, which may change `repos` and `broken` between requests."""

    token: str = "hf_of_the_test"
    repos: dict[str, Repo] = field(default_factory=dict)
    is_broken: bool = False  # every answer is a 503
    requests: list[Asked] = field(default_factory=list)
    _server: ThreadingHTTPServer | None = None

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fake-hub", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self) -> list[str]:
        """Return the files that were sent, in order."""
        parts = (one.path.split("/resolve/") for one in self.requests if one.method == "GET")
        return [part[1].split("/", 1)[1] for part in parts if len(part) == 2]

    def _answer(self, handler: _Handler) -> None:
        path = urlsplit(handler.path).path
        self.requests.append(Asked(handler.command, path))
        if self.is_broken:
            handler.send(HTTPStatus.SERVICE_UNAVAILABLE, b"down")
            return
        words = path.strip("/").split("/")
        words = words[2:] if words[:2] == ["api", "models"] else words
        name, rest = "/".join(words[:2]), words[2:]
        sent = handler.headers.get("Authorization")
        if sent not in (None, f"Bearer {self.token}"):
            handler.send(
                HTTPStatus.UNAUTHORIZED, b"", {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
            return
        repo = self.repos.get(name)
        if repo is None or (repo.is_private and sent is None):
            handler.send(HTTPStatus.UNAUTHORIZED, b"", {"X-Error-Code": "RepoNotFound"})
            return
        kind, revision = (rest[0], rest[1]) if len(rest) >= 2 else ("revision", MAIN)
        known = {name: commit_of(one) for one in repo.revisions for name in (one, commit_of(one))}
        if revision not in known:
            handler.send(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            siblings = [{"rfilename": file} for file in repo.files]
            handler.send_json({"id": name, "sha": known[revision], "siblings": siblings})
        elif kind == "tree":
            files = repo.files.items()
            handler.send_json(
                [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files]
            )
        elif repo.is_gated and sent is None:
            handler.send(HTTPStatus.UNAUTHORIZED, b"", {"X-Error-Code": "GatedRepo"})
        elif kind == "resolve" and (file := "/".join(rest[2:])) in repo.files:
            data = repo.files[file]
            handler.send(HTTPStatus.OK, data, {"X-Repo-Commit": known[revision], "ETag": f'"{_etag(data)}"'})
        else:
            handler.send(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "EntryNotFound"})


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `FakeHub.requests` has the requests."""

    def send_json(self, value: object) -> None:
        self.send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
