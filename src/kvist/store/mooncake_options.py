"""The options of a Mooncake store: from flags, from `--hicache-storage-backend-extra-config` and from the environment.

A value is taken from the first place that has it: a flag (or the field of an HTTP client), a key of the extra config,
a `MOONCAKE_*` variable, the default. Keys and variables are SGLang's. A key with another meaning than here is refused,
with what to do instead; so is a variable, if it would change where pages are.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.config import check_api_key, option
from kvist.door import Given
from kvist.errors import ConfigError, RequestError
from kvist.mooncake.requirements import PROTOCOLS, Network, User

MASTER_PORT, MASTER_HTTP_PORT = 50051, 9003  # Mooncake's
MASTER_SCHEME = "mooncake://"  # of a master among --hicache-storage-roots
STORES_USER = User(
    title="the storage tier",
    protocol_flag="--hicache-mooncake-protocol",
    devices_flag="--hicache-mooncake-device",
    host_flag="--hicache-mooncake-host",
)
_GB = 10**9
_MAX_KEY_CHARS = 4096
_ADDRESS = re.compile(r"(http://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+)(:(?P<port>[0-9]{1,5}))?/?")
_BYTES = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>[kmgt]?)i?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}  # as Mooncake and SGLang read them
_CLIENT_MAY_SET = ("mooncake_master_addr", "mooncake_replica_num")


def master_address(text: str) -> str:
    """Return the master's address as HOST:PORT, from this form or http://HOST:PORT. Raises `ConfigError`."""
    found = _ADDRESS.fullmatch(text.removeprefix(MASTER_SCHEME))
    port = int(found["port"] or MASTER_PORT) if found else 0
    if found is None or not 0 < port < 1 << 16:
        raise ConfigError(
            f"{text!r} is not the address of a Mooncake master: write HOST:PORT or http://HOST:PORT, such as "
            f"127.0.0.1:{MASTER_PORT}",
            param="mooncake_master_addr",
        )
    return f"{found['host']}:{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeStoreOptions:
    """Raises `ConfigError` for an impossible value. The values that no flag sets are None until `resolved`."""

    mooncake_master_addr: str | None = option(
        None,
        "address of the Mooncake master, HOST:PORT or http://HOST:PORT",
        flag="hicache-mooncake-master-addr",
        aliases=("hicache-storage-mooncake-master-addr",),
        unset="$MOONCAKE_MASTER",
    )
    mooncake_master_url: str | None = option(
        None,
        "URL of the Mooncake master's HTTP port, whose figures of the pool are shown by /hicache/storage-backend and "
        "/metrics",
        flag="hicache-mooncake-master-url",
        aliases=("hicache-storage-mooncake-master-url",),
        unset=f"port {MASTER_HTTP_PORT} of the master's host",
    )
    mooncake_master_api_key_file: str | None = option(
        None,
        "file with an API key of the Mooncake master (`kvist master --api-key`), for its figures of the pool",
        flag="hicache-mooncake-master-api-key-file",
        aliases=("hicache-storage-mooncake-master-api-key-file",),
        unset="no key is sent",
    )
    backend_extra_config: str | None = option(
        None,
        'further settings as JSON with SGLang\'s keys, such as {"protocol": "rdma"}, or @FILE with such JSON; flags '
        "take precedence",
        unset="none",
    )
    mooncake_protocol: str | None = option(
        None,
        "network between this worker and the Mooncake stores",
        choices=PROTOCOLS,
        flag="hicache-mooncake-protocol",
        aliases=("hicache-storage-mooncake-protocol",),
        unset="$MOONCAKE_PROTOCOL, or tcp",
    )
    mooncake_device: str | None = option(
        None,
        "RDMA devices, such as mlx5_0,mlx5_1",
        flag="hicache-mooncake-device",
        aliases=("hicache-storage-mooncake-device",),
        unset="$MOONCAKE_DEVICE, or all of this host",
    )
    mooncake_host: str | None = option(
        None,
        "address of this host in the network of the Mooncake stores",
        flag="hicache-mooncake-host",
        aliases=("hicache-storage-mooncake-host",),
        unset="$MOONCAKE_LOCAL_HOSTNAME, or that of the engine's socket",
    )
    mooncake_segment_size: float | None = option(
        None,
        "memory that this worker itself gives to the Mooncake pool; its pages are lost when the worker ends",
        unit="GB",
        minimum=0,
        flag="hicache-mooncake-segment-size",
        aliases=("hicache-storage-mooncake-segment-size",),
        unset="$MOONCAKE_GLOBAL_SEGMENT_SIZE, or 0",
    )
    mooncake_replica_num: int = option(
        1,
        "Mooncake stores that keep a copy of each page; with 2 or more no page is lost when one store dies",
        minimum=1,
        maximum=16,
        flag="hicache-mooncake-replica-num",
        aliases=("hicache-storage-mooncake-replica-num",),
    )
    mooncake_local_cache_size: float = option(
        0.0,
        "memory in which this worker keeps pages that it reads often from the Mooncake pool, for pages that its host "
        "tier evicts",
        unit="GB",
        minimum=0,
        flag="hicache-mooncake-local-cache-size",
        aliases=("hicache-storage-mooncake-local-cache-size",),
    )
    mooncake_tenant_id: str | None = option(
        None,
        "tenant of a Mooncake pool whose master keeps tenants apart",
        flag="hicache-mooncake-tenant-id",
        aliases=("hicache-storage-mooncake-tenant-id",),
        unset="$MOONCAKE_TENANT_ID, or default",
    )

    def __post_init__(self) -> None:
        if self.mooncake_master_url is not None and not self.mooncake_master_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{self.mooncake_master_url!r} is not a URL: write http://HOST:{MASTER_HTTP_PORT}",
                param="mooncake_master_url",
            )
        if self.mooncake_master_addr is not None:
            master_address(self.mooncake_master_addr)
        if self.mooncake_protocol not in (None, *PROTOCOLS):
            raise ConfigError(
                f"{self.mooncake_protocol!r} is not a protocol of the Mooncake store: known are {', '.join(PROTOCOLS)}",
                param="mooncake_protocol",
            )

    def __str__(self) -> str:
        return f"the mooncake store of the master {self.mooncake_master_addr}"

    @property
    def location(self) -> str:
        return f"{self.mooncake_master_addr}/{self.mooncake_tenant_id}"

    @property
    def master(self) -> str:
        assert self.mooncake_master_addr is not None, "resolved options"
        return master_address(self.mooncake_master_addr)

    @property
    def master_url(self) -> str:
        return self.mooncake_master_url or f"http://{self.master.rpartition(':')[0]}:{MASTER_HTTP_PORT}"

    def master_api_key(self) -> str | None:
        """Read the key of the master's HTTP port. Raises `ConfigError` if the file has none."""
        path, param = self.mooncake_master_api_key_file, "mooncake_master_api_key_file"
        if path is None:
            return None
        try:
            with Path(path).expanduser().open(encoding="ascii") as file:
                key = file.read(_MAX_KEY_CHARS).strip()
            check_api_key(key)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read an API key from {path}: {error}", param=param) from error
        return key

    @property
    def segment_bytes(self) -> int:
        return round((self.mooncake_segment_size or 0) * _GB)

    @property
    def local_cache_bytes(self) -> int:
        return round(self.mooncake_local_cache_size * _GB)

    def network(self, advertised_host: str) -> Network:
        devices = tuple(filter(None, (self.mooncake_device or "").split(",")))
        return Network(
            host=self.mooncake_host or advertised_host, protocol=self.mooncake_protocol or "tcp", devices=devices
        )

    def resolved(self) -> MooncakeStoreOptions:
        """Return the options with the values of the extra config and of the environment. Raises `ConfigError`."""
        found = {**_from_environment(os.environ), **_from_extra_config(self.backend_extra_config)}
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        merged = {**found, **given, "backend_extra_config": None}
        if "mooncake_master_addr" not in merged:
            raise ConfigError(
                "the Mooncake store needs the address of a master: add --hicache-mooncake-master-addr HOST:PORT "
                "(`kvist master` starts one)",
                param="mooncake_master_addr",
            )
        merged["mooncake_master_addr"] = master_address(str(merged["mooncake_master_addr"]))
        if metrics_port := merged.pop(_METRICS_PORT, None):
            host = merged["mooncake_master_addr"].rpartition(":")[0]
            merged.setdefault("mooncake_master_url", f"http://{host}:{metrics_port}")
        merged.setdefault("mooncake_protocol", "tcp")
        merged.setdefault("mooncake_segment_size", 0.0)
        merged.setdefault("mooncake_tenant_id", "default")
        return MooncakeStoreOptions(**merged)

    def with_request(self, requested: Given, roots: Sequence[str]) -> MooncakeStoreOptions:
        """Return these options, changed by those of an HTTP client, and resolved. A client may name the master of these
        options, or one of `roots`, and the number of replicas. Raises `RequestError` for anything else."""
        config = requested.get("backend_extra_config")
        if isinstance(config, str) and config.startswith("@"):
            raise RequestError("a client cannot name a file of the worker: send the JSON", param="backend_extra_config")
        asked = {**_from_extra_config(None if config is None else str(config)), **requested}
        asked.pop("backend_extra_config", None)
        if _METRICS_PORT in asked:
            raise RequestError(f"a client cannot change {_METRICS_PORT}: omit the key", param="backend_extra_config")
        ours = self._resolved_or_none()
        masters = [master_address(root) for root in roots if root.startswith(MASTER_SCHEME)]
        if ours is not None:
            masters.append(ours.master)
        options = dataclasses.replace(ours or self, **asked).resolved()  # type: ignore[arg-type]
        if options.master not in masters:
            raise RequestError(
                f"{options.master} is not a Mooncake master that this worker may use: start it with "
                f"--hicache-storage-roots {MASTER_SCHEME}{options.master}",
                param="mooncake_master_addr",
            )
        for name in set(asked) - set(_CLIENT_MAY_SET):
            if getattr(options, name) != getattr(ours or MooncakeStoreOptions(), name):
                raise RequestError(
                    f"a client cannot change {name}: start the worker with another value, or omit the field", param=name
                )
        return options

    def _resolved_or_none(self) -> MooncakeStoreOptions | None:
        try:
            return self.resolved()
        except ConfigError:
            return None


# ---------------------------------------------------------------- SGLang's keys and variables

_Value = str | int | float | bool | None


def _address(value: _Value) -> str:
    return master_address(str(value))


def _gigabytes(value: _Value) -> float:
    found = _BYTES.fullmatch(str(value).strip())
    if found is None or isinstance(value, bool):
        raise ConfigError(f"{value!r} is not a number of bytes: write 4gb or 4294967296")
    return float(found["number"]) * _UNITS[found["unit"].lower()] / _GB


def _text(value: _Value) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{value!r} is not a text")
    return value


def _text_or_none(value: _Value) -> str | None:
    return None if value is None else _text(value) or None


def _port(value: _Value) -> str:
    if isinstance(value, bool) or not str(value).isdecimal() or not 0 < int(str(value)) < 1 << 16:
        raise ConfigError(f"{value!r} is not a port: write a number from 1 to 65535")
    return str(value)


_METRICS_PORT = "master_metrics_port"  # becomes part of `mooncake_master_url`
_KEYS: Mapping[str, tuple[str, Callable[[_Value], str | float | None]]] = {
    "master_server_address": ("mooncake_master_addr", _address),
    "local_hostname": ("mooncake_host", _text_or_none),
    "protocol": ("mooncake_protocol", _text),
    "device_name": ("mooncake_device", _text_or_none),
    "global_segment_size": ("mooncake_segment_size", _gigabytes),
    "tenant_id": ("mooncake_tenant_id", _text_or_none),
    "master_metrics_port": (_METRICS_PORT, _port),
}
_VARIABLES = {
    "MOONCAKE_MASTER": "master_server_address",
    "MOONCAKE_LOCAL_HOSTNAME": "local_hostname",
    "MOONCAKE_PROTOCOL": "protocol",
    "MOONCAKE_DEVICE": "device_name",
    "MOONCAKE_GLOBAL_SEGMENT_SIZE": "global_segment_size",
    "MOONCAKE_TENANT_ID": "tenant_id",
    "MOONCAKE_MASTER_METRICS_PORT": "master_metrics_port",
    "MOONCAKE_TE_META_DATA_SERVER": "metadata_server",
    "MOONCAKE_STANDALONE_STORAGE": "standalone_storage",
    "MOONCAKE_CLIENT": "client_server_address",
}
_NO_STANDALONE = "a worker is itself a client of the pool: run `kvist store` beside it"
_NO_SSD = "a worker keeps no pages on an SSD: set it at `kvist store`"
# Keys that have one value here: the values that are accepted, and what to do instead of others.
_FIXED: Mapping[str, tuple[tuple[_Value, ...], str]] = {
    "metadata_server": (("P2PHANDSHAKE", ""), "stores find each other without a metadata server: leave it out"),
    "check_server": ((True,), "the master is always checked before a store is used: leave it out"),
    "standalone_storage": ((False, "false", "0", ""), _NO_STANDALONE),
    "client_server_address": ((None, ""), _NO_STANDALONE),
    "enable_ssd_offload": ((False,), _NO_SSD),
    "ssd_offload_path": ((None, ""), _NO_SSD),
    "local_buffer_size": ((), "pages are copied without a buffer: leave it out"),
    "enable_client_http_server": ((False,), "the worker's own /metrics has its counts: leave it out"),
    "prefetch_threshold": ((), "use --hicache-storage-prefetch-threshold"),
    "prefetch_timeout_base": ((), "use --hicache-storage-prefetch-timeout-base-s"),
    "prefetch_timeout_per_ki_token": ((), "use --hicache-storage-prefetch-timeout-per-1k-s"),
    "hicache_storage_pass_prefix_keys": ((False,), "keys of pages contain their prefix already: leave it out"),
    "extra_backend_tag": ((None, ""), "keys of pages contain the model and the layout already: leave it out"),
}


def _from_extra_config(text: str | None) -> dict[str, str | float | None]:
    """Return options by field from the JSON with SGLang's keys. Raises `ConfigError`."""
    if text is None:
        return {}
    param = "backend_extra_config"
    try:
        if text.startswith("@"):
            text = Path(text[1:]).expanduser().read_text(encoding="utf-8")
        read = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the extra config is not JSON: {error}", param=param) from error
    if not isinstance(read, dict):
        raise ConfigError('the extra config is not a JSON object, such as {"protocol": "rdma"}', param=param)
    found: dict[str, str | float | None] = {}
    for key, value in read.items():
        if isinstance(value, dict | list):
            raise ConfigError(f"{key} of the extra config has several values; it must be one", param=param)
        try:
            found.update(_one(key, value))
        except ConfigError as error:
            raise ConfigError(f"{key} of the extra config: {error.message}", param=param) from error
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, str | float | None]:
    found: dict[str, str | float | None] = {}
    for variable, key in _VARIABLES.items():
        if environ.get(variable):
            try:
                found.update(_one(key, environ[variable]))
            except ConfigError as error:
                param = _KEYS[key][0] if key in _KEYS else "backend"
                raise ConfigError(f"{variable} in the environment: {error.message}", param=param) from error
    return found


def _one(key: str, value: _Value) -> dict[str, str | float | None]:
    """Return the option of one key. Raises `ConfigError` for an unknown key, and for a value that is not possible."""
    if key in _KEYS:
        name, read = _KEYS[key]
        return {name: read(value)}
    if key in _FIXED:
        accepted, remedy = _FIXED[key]
        if value in accepted:
            return {}
        raise ConfigError(f"{value!r} is not possible here: {remedy}")
    near = difflib.get_close_matches(key, [*_KEYS, *_FIXED], 1)
    hint = f"; did you mean {near[0]}?" if near else f": known are {', '.join(_KEYS)}"
    raise ConfigError(f"unknown key{hint}")
