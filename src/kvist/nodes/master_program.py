"""The program `mooncake_master`: found, checked, its command line, and its lines in our log.

The flags differ from release to release, and the program refuses to start with one that it does not know. Its `--help`
is therefore read first: if a flag is missing, the error names the flag and the release that has it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import re
import signal
import subprocess
from pathlib import Path

from kvist.errors import ConfigError
from kvist.mooncake.requirements import INSTALL, RELEASE, library_obstacle
from kvist.nodes.config import PoolOptions

PROBE_TIMEOUT_S = 20.0
NAME = "mooncake_master"
_FLAG = re.compile(r"^\s+-(\w+) \(", re.MULTILINE)
_LINE = re.compile(r"(?P<level>[IWEF])\d{4} [\d:.]+ +\d+ (?P<place>[\w./-]+:\d+)\] (?P<text>.*)")
_LEVELS = {"I": logging.DEBUG, "W": logging.INFO, "E": logging.WARNING, "F": logging.ERROR}
_NOISE = ("Logging before InitGoogleLogging", "SetUsageMessage() never called", "Master Admin Metrics:")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here, because a forked child must not load libraries

logger = logging.getLogger("kvist.mooncake_master")


def find_program(given: Path | None) -> Path:
    """Return the program. Raises `ConfigError` with the command or flag that helps."""
    if given is not None:
        if not given.is_file():
            raise ConfigError(f"--mooncake-master-path {given}: there is no such file", param="mooncake_master_path")
        return given
    if reason := library_obstacle():
        raise ConfigError(reason)
    package = importlib.util.find_spec("mooncake")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    for folder in folders:
        if (program := Path(folder, NAME)).is_file():
            return program
    raise ConfigError(f"the installed package of Mooncake has no {NAME}: {INSTALL}")


def check_program(program: Path, flags: dict[str, str]) -> None:
    """Run the program's `--help`. Raises `ConfigError` unless it knows all of `flags`."""
    try:
        done = subprocess.run(
            [program, "--help"], capture_output=True, text=True, errors="replace", timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{program} does not run: {error}", param="mooncake_master_path") from error
    known = set(_FLAG.findall(done.stdout))
    missing = [f"--{name}" for name in flags if name not in known]
    if missing:
        raise ConfigError(
            f"{program} is not the {NAME} of Mooncake {RELEASE}: it does not know {', '.join(missing)}. Install "
            f"{RELEASE} ({INSTALL}), or name its program with --mooncake-master-path",
            param="mooncake_master_path",
        )


def program_flags(pool: PoolOptions, *, host: str, rpc_port: int, metrics_port: int) -> dict[str, str]:
    """Return the flags of the program, by name. Its HTTP port also removes pages and is not protected: it is on
    loopback only, and `kvist master` passes on what is harmless."""
    return {
        "rpc_address": host,
        "rpc_port": str(rpc_port),
        "metrics_host": "127.0.0.1",
        "metrics_port": str(metrics_port),
        "client_ttl": str(pool.store_ttl_s),
        "default_kv_lease_ttl": str(round(pool.read_lease_s * 1000)),
        "enable_offload": _word(pool.ssd_offload),
        "promotion_on_hit": _word(pool.ssd_offload and pool.ssd_promotion),
        "dynamic_replication_mode": pool.hot_page_replication,
        "dynamic_replication_max_memory_replicas": str(pool.hot_page_replicas),
        "dynamic_replication_admission_qps_threshold": f"{pool.hot_page_reads_per_s:g}",
        "eviction_high_watermark_ratio": f"{pool.eviction_watermark:g}",
        "eviction_ratio": f"{pool.eviction_ratio:g}",
        "enable_snapshot": "false",  # a restored snapshot has returned bytes of other keys (docs/mooncake.md)
        "enable_snapshot_restore": "false",
        "logtostderr": "true",
    }


def to_words(flags: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def _word(value: bool) -> str:
    return "true" if value else "false"


def log_line(line: str) -> None:
    """Log a line of the program. Its own INFO is our DEBUG: it reports every call."""
    if not line or any(noise in line for noise in _NOISE):
        return
    match = _LINE.fullmatch(line)
    level, text = (logging.INFO, line) if match is None else (_LEVELS[match["level"]], match["text"])
    logger.log(level, "%s", text)


def die_with_parent() -> None:
    """Make the kernel end this process when its parent dies. For `preexec_fn`: it runs between fork and exec."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
