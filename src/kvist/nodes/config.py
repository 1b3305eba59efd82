"""The options of the pool's nodes. `kvist up` has those of the shared groups, and passes them on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kvist.config import check_api_key, option
from kvist.errors import ConfigError
from kvist.mooncake.requirements import PROTOCOLS
from kvist.server.config import ServerConfig

MASTER_RPC_PORT, MASTER_HTTP_PORT, STORE_HTTP_PORT = 50051, 9003, 9301  # Mooncake's own, and a free one
STOP_MARGIN_S = 32.0  # that a stop may take beside --flush-timeout-s
_WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKeyOptions:
    api_key: tuple[str, ...] = option(
        (),
        "one or several keys, separated by spaces or commas; clients must send one of them as 'Authorization: Bearer "
        "KEY', except to /health and /ready. A store sends the first one to its master. KVIST_API_KEY is safer",
        secret=True,
    )
    access_log: bool = option(
        True,
        "log one line for each HTTP request; polls (/health, /ready, /server_info, /metrics) only at --log-level debug",
    )

    def __post_init__(self) -> None:
        for key in self.api_key:
            check_api_key(key)

    @property
    def first_key(self) -> str | None:
        return self.api_key[0] if self.api_key else None

    def server(self, host: str, port: int) -> ServerConfig:
        return ServerConfig(host=host, port=port, api_key=self.api_key, access_log=self.access_log)


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterAddress:
    host: str = option(
        "127.0.0.1",
        "address to listen on. Mooncake's own port has no authentication: anything but loopback must be a private "
        "network",
    )
    port: int = option(
        MASTER_HTTP_PORT, "port of HTTP: /health, /ready, /server_info, /metrics, drain jobs", minimum=0, maximum=65535
    )
    rpc_port: int = option(MASTER_RPC_PORT, "port that stores and workers connect to", minimum=1, maximum=65535)
    mooncake_master_path: Path | None = option(
        None, "program to run as the master", unset="mooncake_master of the installed package"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How the master keeps the pool."""

    hot_page_replication: str = option(
        "enforce",
        "copy pages that many readers want to more stores: do so (enforce), only count such pages (observe), or not at "
        "all (off)",
        choices=("off", "observe", "enforce"),
    )
    hot_page_replicas: int = option(
        3, "maximum copies in memory of a page that many readers want", minimum=2, maximum=64
    )
    hot_page_reads_per_s: float = option(
        1.0, "a page with more reads than this is copied", unit="reads per second", minimum=0.01
    )
    store_ttl_s: int = option(
        3, "a store that is silent for this long is dead, and its pages are forgotten", unit="s", minimum=1, maximum=600
    )
    read_lease_s: float = option(
        10.0, "a page is neither evicted nor moved for this long after it was read", unit="s", minimum=0.1, maximum=3600
    )
    eviction_watermark: float = option(
        0.9, "share of the pool's memory above which pages are evicted from it", minimum=0.1, maximum=0.99
    )
    eviction_ratio: float = option(
        0.05, "share of the pages in memory that one eviction removes", minimum=0.01, maximum=0.5
    )
    ssd_offload: bool = option(True, "stores with --ssd-path keep pages on their SSD, too")
    ssd_promotion: bool = option(True, "copy a page that is on an SSD only back to memory when it is read again")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    host: str = option("127.0.0.1", "address to listen on, for HTTP and for the pages")
    port: int = option(
        STORE_HTTP_PORT, "port of HTTP: /health, /ready, /server_info, /metrics, /drain", minimum=0, maximum=65535
    )
    advertise_host: str | None = option(
        None, "address by which workers and other stores reach this store", unset="--host"
    )

    def __post_init__(self) -> None:
        if self.host in _WILDCARDS and self.advertise_host is None:
            raise ConfigError(
                f"--host {self.host} is not an address that others can connect to: name this host's own with "
                "--advertise-host",
                param="advertise_host",
            )

    @property
    def reachable_host(self) -> str:
        return self.advertise_host or self.host


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOptions:
    """The memory and the SSD that a store lends to the pool."""

    segment_size: float = option(1.0, "memory for pages, of each store", unit="GB", minimum=0.016)
    ssd_path: str | None = option(
        None,
        "folder on an SSD where the store keeps its pages, too: they survive a restart of the store",
        unset="none: the pages are lost when the store stops",
    )
    ssd_size: float | None = option(
        None, "maximum size of the pages in --ssd-path", unit="GB", minimum=0.016, unset="nine tenths of the free space"
    )
    ssd_buffer_size: float = option(
        0.256, "memory for pages on their way from the SSD to readers", unit="GB", minimum=0.064
    )

    def __post_init__(self) -> None:
        if self.ssd_path is None and self.ssd_size is not None:
            raise ConfigError(f"--ssd-size {self.ssd_size:g} needs a folder: add --ssd-path", param="ssd_path")
        if self.ssd_path is not None and not Path(self.ssd_path).is_absolute():
            raise ConfigError(f"--ssd-path {self.ssd_path} must be an absolute path, such as /{self.ssd_path}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinPoolOptions:
    """The network and the master of a store, and how long the store waits for what. The flags are those of workers."""

    hicache_mooncake_protocol: str = option("tcp", "network of the pages", choices=PROTOCOLS)
    hicache_mooncake_device: str | None = option(
        None, "RDMA devices, such as mlx5_0, with commas between them", unset="all of this host"
    )

    hicache_mooncake_master_addr: str = option(f"127.0.0.1:{MASTER_RPC_PORT}", "HOST:PORT of the master")
    hicache_mooncake_master_url: str | None = option(
        None, "URL of the master's HTTP port", unset=f"port {MASTER_HTTP_PORT} of the master's host"
    )
    master_timeout_s: float = option(
        60.0, "stop with an error if the master does not answer for this long at the start", unit="s", minimum=1
    )
    forget_timeout_s: float = option(
        60.0,
        "after a crash, maximum time until the master has forgotten the earlier run of this store; it takes the "
        "master's --store-ttl-s",
        unit="s",
        minimum=1,
    )
    flush_timeout_s: float = option(
        30.0, "at a stop, maximum time to write the pages in memory to --ssd-path", unit="s", minimum=0
    )

    def __post_init__(self) -> None:
        self.master()
        if self.hicache_mooncake_master_url is not None and not self.hicache_mooncake_master_url.startswith(
            ("http://", "https://")
        ):
            raise ConfigError(
                f"--hicache-mooncake-master-url {self.hicache_mooncake_master_url} is not a URL: use http://HOST:PORT",
                param="hicache_mooncake_master_url",
            )

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.hicache_mooncake_device or "").split(",")))

    def master(self) -> tuple[str, int]:
        """Return (host, port) of the master. Raises `ConfigError`."""
        return split_address(self.hicache_mooncake_master_addr)

    @property
    def master_url(self) -> str:
        if self.hicache_mooncake_master_url is not None:
            return self.hicache_mooncake_master_url
        host = self.master()[0]
        return f"http://{f'[{host}]' if ':' in host else host}:{MASTER_HTTP_PORT}"


def split_address(given: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT or http://HOST:PORT. Raises `ConfigError` naming the flag."""
    try:
        parts = urlsplit(given if "//" in given else f"//{given}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise ConfigError(
            f"--hicache-mooncake-master-addr {given} is not an address: use HOST:PORT, as 10.0.0.5:{MASTER_RPC_PORT}",
            param="hicache_mooncake_master_addr",
        )
    return host, port


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainOptions:
    store: str | None = option(None, "URL of the store to empty, such as http://10.0.0.7:9301")
    api_key: str | None = option(None, "API key of the store", secret=True)
    timeout_s: float = option(600.0, "stop waiting, with an error, after this long", unit="s", minimum=1)

    @property
    def url(self) -> str:
        """Return the URL of the store. Raises `ConfigError`."""
        if self.store is None or not self.store.startswith(("http://", "https://")):
            given = "" if self.store is None else f": {self.store} is not a URL"
            raise ConfigError(f"name the store to empty, as in kvist store drain http://HOST:{STORE_HTTP_PORT}{given}")
        return self.store.rstrip("/")
