"""The files of the page, read once. A request names one of them exactly, so no other file can be reached."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from starlette.types import Scope, Send

from kvist.errors import RequestError
from kvist.http.asgi import header, send_bytes

PAGE = "dashboard.html"
_TYPES = {
    "html": b"text/html; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "svg": b"image/svg+xml",
    "txt": b"text/plain; charset=utf-8",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    body: bytes
    content_type: bytes
    etag: bytes


class StaticFiles:
    def __init__(self) -> None:
        folder = files("kvist.dashboard") / "static"
        self._files = {
            found.name: _file(found.name, found.read_bytes())
            for found in folder.iterdir()
            if found.name.rpartition(".")[2] in _TYPES
        }

    @property
    def names(self) -> Collection[str]:
        return self._files.keys()

    async def send(self, name: str, scope: Scope, send: Send) -> None:
        """Send the file; 304 if the browser has it already. Raises `RequestError` (404) for an unknown name."""
        found = self._files.get(name)
        if found is None:
            unknown = RequestError("unknown path")
            unknown.http_status = 404
            raise unknown
        headers = [
            (b"content-type", found.content_type),
            (b"content-security-policy", _POLICY),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-cache"),  # the browser asks each time whether its copy is still the same
            (b"etag", found.etag),
        ]
        if header(scope, b"if-none-match") == found.etag:
            await send_bytes(send, b"", status=304, headers=headers)
        else:
            await send_bytes(send, found.body, headers=headers)


def _file(name: str, body: bytes) -> _File:
    etag = b'"' + sha256(body).hexdigest()[:32].encode() + b'"'
    return _File(body=body, content_type=_TYPES[name.rpartition(".")[2]], etag=etag)
