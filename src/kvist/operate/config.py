"""The options of the verbs that are sent to a running server."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option
from kvist.errors import ConfigError
from kvist.request import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatedServer:
    """The running server that an operator's verb is sent to. Raises `ConfigError`."""

    url: str = option("http://127.0.0.1:30000", "URL of the router, or of the worker itself")
    api_key: str | None = option(None, "API key of that server", secret=True)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {self.url} is not a URL: use http://HOST:PORT", param="url")

    @property
    def headers(self) -> dict[str, str]:
        """The headers of requests to it."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleOptions:
    """Raises `ConfigError`."""

    worker: str | None = option(None, "URL or id of the worker, as GET /workers lists it")
    role: str | None = option(
        None, "the worker's role from now on", choices=tuple(map(str, Role)), unset="none: it has to be given"
    )
