"""The server of a program: its address, its connections, and the event loop in which requests run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from urllib.parse import urlsplit
from weakref import WeakSet

from kvist.clock import MonotonicClock
from kvist.errors import ConfigError
from kvist.execution.backend import Backend
from kvist.execution.executor import Executor
from kvist.execution.job import ExecutionConfig
from kvist.execution.kvist_server import KvistServer
from kvist.execution.loop_thread import LoopThread
from kvist.execution.openai_server import OpenAIServer

_CLOSE_TIMEOUT_S = 5.0


class Endpoint:
    """Mutable (connections, opened with the first run); shared by all runs of a process that name it."""

    def __init__(self, make_backend: Callable[[], Backend], *, name: str) -> None:
        self.name = name
        self._make_backend = make_backend
        self._lock = threading.Lock()
        self._executors: WeakSet[Executor] = WeakSet()
        self._thread: LoopThread | None = None
        self._backend: Backend | None = None

    def open(self) -> tuple[LoopThread, Backend]:
        """Return the loop and the server's backend, started when first needed."""
        with self._lock:
            if self._thread is None or self._backend is None:
                self._thread = LoopThread("kvist-lang")
                self._backend = self._make_backend()
            return self._thread, self._backend

    def executor(self, config: ExecutionConfig) -> tuple[LoopThread, Executor]:
        """Return the loop, and an executor for one run, which ends with the connections."""
        thread, backend = self.open()
        made = Executor(backend, config, loop=thread.loop, clock=MonotonicClock())
        with self._lock:
            self._executors.add(made)
        return thread, made

    def close(self) -> None:
        """Close the connections. Programs that run fail; a later run opens new connections."""
        with self._lock:
            if self._thread is not None and self._backend is not None:
                for executor in list(self._executors):
                    self._thread.start(executor.close()).result(_CLOSE_TIMEOUT_S)
                self._executors.clear()
                self._thread.start(self._backend.close()).result(_CLOSE_TIMEOUT_S)
                self._thread.close()
            self._thread = self._backend = None


def RuntimeEndpoint(
    base_url: str, api_key: str | None = None, *, model: str | None = None, timeout_s: float = 600.0
) -> Endpoint:
    """Return a Kvist server, or any server with OpenAI's API that continues messages (`continue_final_message`).

    A server whose /server_info is not that of Kvist gets plain requests. `timeout_s` bounds each read."""
    url = _url(base_url)

    def make() -> Backend:
        return KvistServer(url, api_key=api_key, model=model, timeout_s=timeout_s)

    return Endpoint(make, name=url)


def OpenAI(
    model: str, *, base_url: str = "https://api.openai.com", api_key: str | None = None, timeout_s: float = 600.0
) -> Endpoint:
    """Return a server with OpenAI's API that gets OpenAI's requests only."""
    url = _url(base_url)

    def make() -> Backend:
        return OpenAIServer(url, api_key=api_key, model=model, timeout_s=timeout_s)

    return Endpoint(make, name=url)


def _url(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port over 65,535, or half of an address of IPv6
        valid = False
    if not valid:
        raise ConfigError(f"{url!r} is not the URL of a server: write http://HOST:PORT", param="base_url")
    return url


class _Default:
    """The endpoint of runs that name none. Set by the program once, as SGLang's default backend."""

    endpoint: Endpoint | None = None


def set_default_backend(backend: str | Endpoint) -> None:
    """Use the server, given by its URL or as an endpoint, for all runs that name no `backend`."""
    if backend is None:
        raise ConfigError("set_default_backend() needs the URL of a server: http://HOST:PORT", param="backend")
    _Default.endpoint = endpoint_of(backend)


def endpoint_of(backend: str | Endpoint | None) -> Endpoint:
    """Return the endpoint of a run. Raises `ConfigError` if none is known."""
    if isinstance(backend, str):
        return RuntimeEndpoint(_url(backend))
    found = _Default.endpoint if backend is None else backend
    if found is not None and not isinstance(found, Endpoint):
        raise ConfigError(f"a backend is a URL, RuntimeEndpoint or OpenAI, not {found!r}", param="backend")
    if found is None:
        raise ConfigError(
            "no server is known: call set_default_backend(URL), or run(..., backend=URL)", param="backend"
        )
    return found
