"""Reads the places that list workers (`--discovery`): a file, or the addresses of a DNS name.

members.py calls `read` again and again for the whole list. A failed reading raises `Unavailable`; the workers of the
last good one stay members. Files and resolvers may hang, so a daemon thread waits for them, one for each source; the
event loop waits for `_TIMEOUT_S` at most.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from kvist.channel import bracketed
from kvist.errors import ConfigError, Unavailable
from kvist.router.addresses import normal_url
from kvist.router.membership import Source

T = TypeVar("T")
Urls = tuple[str, ...]
Resolve = Callable[[str, int], Sequence[str]]  # host name, port → addresses

_TIMEOUT_S = 5.0
_FILE_INTERVAL_S, _DNS_INTERVAL_S = 0.5, 2.0
_MAX_FILE_BYTES = 1 << 20
_MAX_NAMED_LINES = 4


class Discovery(Protocol):
    source: Source
    interval_s: float  # between two readings

    async def read(self) -> Urls:
        """Return the URLs of all workers. Raises `Unavailable`."""


def discovery_of(text: str) -> Discovery:
    """Return the source that a `--discovery` names. Raises `ConfigError`."""
    kind, _, rest = text.partition(":")
    if kind not in DISCOVERIES or not rest:
        raise ConfigError(f"--discovery {text!r}: use file:PATH or dns:NAME:PORT", param="discovery")
    return DISCOVERIES[kind](Source(text), rest)


def urls_in(text: str) -> Urls:
    """Return the URLs of a list with one worker on each line; empty lines and those that begin with # do not count.
    Raises `Unavailable` that names the wrong lines."""
    urls, wrong = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if word and not word.startswith("#"):
            try:
                urls.append(normal_url(word))
            except ConfigError as error:
                wrong.append(f"line {number}: {error.message}")
    if wrong:
        more = f"; and {len(wrong) - _MAX_NAMED_LINES} more" if len(wrong) > _MAX_NAMED_LINES else ""
        raise Unavailable("; ".join(wrong[:_MAX_NAMED_LINES]) + more)
    return tuple(urls)


class FileDiscovery:
    """A file of URLs. A change counts once the file has stayed the same for one interval: a writer may be in the midst
    of its work. Replacing the file, or a link to it, is a change, too."""

    interval_s = _FILE_INTERVAL_S

    def __init__(self, source: Source, path: str) -> None:
        self.source = source
        self._path = Path(path)
        self._num_looks = 0
        self._seen: tuple[int, ...] | None = None  # identity of the file in the last call
        self._used: tuple[int, ...] | None = None  # of the file that `_text` comes from
        self._text = ""
        self._thread = _OneThread[None](f"{path} was not read")

    async def read(self) -> Urls:
        await self._thread.run(self._look)
        return urls_in(self._text)

    def _look(self) -> None:
        try:
            found = os.stat(self._path)
            identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
            is_settled = identity == self._seen or self._num_looks == 0
            self._seen = identity
            self._num_looks += 1
            if identity == self._used or not is_settled:
                return
            with self._path.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
            if len(content) > _MAX_FILE_BYTES:
                raise Unavailable(f"{self._path} has more than {_MAX_FILE_BYTES} bytes")
            self._text, self._used = content.decode(), identity
        except (OSError, UnicodeDecodeError) as error:
            self._num_looks += 1
            raise Unavailable(f"cannot read {self._path}: {error}") from error


class DnsDiscovery:
    """The addresses of a name, such as that of a headless service, all with one port."""

    interval_s = _DNS_INTERVAL_S

    def __init__(self, source: Source, place: str, *, resolve: Resolve | None = None) -> None:
        """`place`: NAME:PORT. `resolve`: None asks the system's resolver. Raises `ConfigError`."""
        name, _, port = place.rpartition(":")
        if not name or ":" in name or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigError(f"--discovery {source!r}: use dns:NAME:PORT", param="discovery")
        self.source = source
        self._name, self._port = name, int(port)
        self._resolve = resolve or resolve_all
        self._thread = _OneThread[Urls](f"the resolver has not answered for {name}")

    async def read(self) -> Urls:
        return await self._thread.run(self._look_up)

    def _look_up(self) -> Urls:
        try:
            addresses = self._resolve(self._name, self._port)
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"cannot resolve {self._name}: {error}") from error
        return tuple(normal_url(f"http://{bracketed(each)}:{self._port}") for each in sorted(set(addresses)))


DISCOVERIES: dict[str, Callable[[Source, str], Discovery]] = {"file": FileDiscovery, "dns": DnsDiscovery}


def resolve_all(name: str, port: int) -> list[str]:
    """Return the addresses of all A and AAAA records."""
    return [str(address[0]) for *_, address in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]


class _OneThread(Generic[T]):
    """Runs one function at a time on a daemon thread, which does not delay the end of the process."""

    def __init__(self, problem: str) -> None:
        self._problem = problem
        self._pending: asyncio.Future[T] | None = None

    async def run(self, function: Callable[[], T]) -> T:
        """Return the function's value. Raises `Unavailable` if it takes too long, and then again until it has ended."""
        if self._pending is None:
            self._pending = self._start(function)
        await asyncio.wait((self._pending,), timeout=_TIMEOUT_S)
        if not self._pending.done():
            raise Unavailable(f"{self._problem} within {_TIMEOUT_S:g} s")
        pending, self._pending = self._pending, None
        return pending.result()

    @staticmethod
    def _start(function: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: Exception | None) -> None:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)  # type: ignore[arg-type]  # the value of `function`

        def work() -> None:
            value, problem = None, None
            try:
                value = function()
            except Exception as error:
                problem = error
            try:
                loop.call_soon_threadsafe(settle, value, problem)
            except RuntimeError:  # the loop is closed
                return

        threading.Thread(target=work, daemon=True, name="discovery").start()
        return future
