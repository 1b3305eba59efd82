"""The options of processes that serve HTTP, of `kvist up` and `kvist demo` (number of workers), and of `kvist chat`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvist.agents_api.config import AgentApiOptions
from kvist.config import option
from kvist.engine.config import NameOptions
from kvist.errors import ConfigError
from kvist.flight.config import FlightOptions
from kvist.grammar.config import GrammarOptions
from kvist.router.addresses import normal_url
from kvist.server.config import InstanceOptions, ServerConfig, TlsOptions
from kvist.text import TextConfig

DEFAULT_STORES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """The options of a gateway: of its name, HTTP server and text processing."""

    name: NameOptions = field(default_factory=NameOptions)
    server: ServerConfig = field(default_factory=ServerConfig)
    tls: TlsOptions = field(default_factory=TlsOptions)
    instance: InstanceOptions = field(default_factory=InstanceOptions)
    text: TextConfig = field(default_factory=TextConfig)
    grammar: GrammarOptions = field(default_factory=GrammarOptions)
    agents: AgentApiOptions = field(default_factory=AgentApiOptions)
    flight: FlightOptions = field(default_factory=FlightOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontOptions:
    listen_fd: int | None = option(
        None,
        "a socket of the parent process, on which the router also accepts connections when the parent asks for it; "
        "used by kvist up",
        minimum=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """The routers that a worker announces itself to. Raises `ConfigError` for an invalid URL."""

    router: tuple[str, ...] = option(
        (), "URLs of routers; the worker announces itself to each of them, and leaves them when it stops"
    )
    announce_interval_s: float = option(
        2.0,
        "interval between two announcements; a router forgets the worker when three are missing",
        unit="seconds",
        minimum=0.1,
        maximum=60,
    )

    def __post_init__(self) -> None:
        self.router_urls()

    def router_urls(self) -> tuple[str, ...]:
        """Return the URLs in their one spelling, each once."""
        try:
            return tuple(dict.fromkeys(map(normal_url, self.router)))
        except ConfigError as error:
            raise ConfigError(f"--router: {error.message.replace('worker URL', 'URL')}", param="router") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    prefill: int = option(1, "prefill workers to start", unit="workers", minimum=0, maximum=64)
    decode: int = option(1, "decode workers to start", unit="workers", minimum=0, maximum=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnifiedOptions:
    unified: int = option(0, "workers to start that do both prefill and decode", unit="workers", minimum=0, maximum=64)


# options of the workers that an option of the pool implies, unless they are given: they use the pool
IMPLIED_BY_POOL: Mapping[tuple[str, object], Mapping[str, object]] = {
    ("storage", "mooncake"): {"enable_hierarchical_cache": True, "hicache_storage_backend": "mooncake"}
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolNodesOptions:
    """The page pool that is started with the workers. Raises `ConfigError` for stores of no pool."""

    storage: str | None = option(
        None,
        "also start a page pool on this machine, which all workers use as their storage tier: mooncake starts a master "
        "and --stores stores",
        choices=("mooncake",),
        unset="none",
    )
    stores: int = option(DEFAULT_STORES, "stores of the page pool to start", unit="stores", minimum=1, maximum=64)

    def __post_init__(self) -> None:
        if self.storage is None and self.stores != DEFAULT_STORES:
            raise ConfigError(f"--stores {self.stores} needs a page pool: add --storage mooncake", param="storage")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    start_timeout_s: float = option(
        300.0, "stop with an error if not every process is ready after this long", unit="seconds", minimum=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The workers to start. Raises `ConfigError` if there is none, or only one of prefill and decode."""

    prefill: int = 1
    decode: int = 1
    unified: int = 0
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if (self.prefill == 0) != (self.decode == 0):
            raise ConfigError(
                f"--prefill {self.prefill} --decode {self.decode}: prefill and decode need each other; "
                "give both, or --unified N",
                param="prefill",
            )
        if self.num_workers == 0:
            raise ConfigError("--prefill 0 --decode 0 --unified 0 starts no worker: give at least one", param="unified")

    @property
    def num_workers(self) -> int:
        return self.prefill + self.decode + self.unified


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    target: str | None = option(
        None,
        "URL of a running server, or a model to start a server for; by default a server of the embedded model is "
        "started",
    )
    system: str | None = option(None, "the system prompt", aliases=("system-prompt",))
    max_tokens: int | None = option(
        None, "maximum length of an answer", unit="tokens", minimum=1, unset="as long as the model's context allows"
    )
    temperature: float | None = option(
        None, "0 always takes the most likely token", minimum=0, unset="the server's default"
    )
    served_model_name: str | None = option(
        None, "model to use if the server has several", unset="the server's first model"
    )
    api_key: str | None = option(None, "API key of the running server", secret=True)
    stats: bool = option(True, "show latency and token counts after each answer")
    start_timeout_s: float = option(
        600.0, "maximum time to wait for a server that is started for the chat", unit="s", minimum=1
    )

    @property
    def url(self) -> str | None:
        """Return the URL of the running server; None if a server has to be started."""
        target = self.target or ""
        return target.rstrip("/").removesuffix("/v1") if target.startswith(("http://", "https://")) else None
