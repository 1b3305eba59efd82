"""The unit of systemd: its command is valid, its times fit those of Kvist, and Kvist reports when it is ready."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.engine.config import WatchOptions
from kvist.service_manager import notify_ready
from kvist.settings import ServeSettings, read

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
MAX_EXPOSURE = "30"  # of 100, by systemd-analyze security: 3.0, "OK"


def directives(name: str = "kvist.service") -> dict[str, str]:
    lines = [line.partition("=") for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
    return {key: value for key, equals, value in lines if equals and not key.startswith("#")}


def test_the_command_reads_the_configuration_beside_it() -> None:
    program, verb, *argv = shlex.split(directives()["ExecStart"])
    assert (program, verb) == ("/opt/kvist/bin/kvist", "serve")
    settings = read(verb, [word.replace("/etc/kvist", str(FOLDER)) for word in argv], {})
    assert isinstance(settings, ServeSettings)
    assert settings.gateway.server.port == 30000


def test_a_stop_is_longer_than_the_drain_and_a_start_longer_than_the_loading() -> None:
    settings = read("serve", ["--config", str(FOLDER / "kvist.toml")], {})
    assert isinstance(settings, ServeSettings)
    server = settings.gateway.server
    drain_s = server.shutdown_timeout_s + server.drain_grace_s
    assert float(directives()["TimeoutStopSec"]) >= drain_s + 20
    assert directives()["TimeoutStartSec"] == "30min"
    assert WatchOptions().engine_start_timeout_s < 30 * 60
    assert directives()["KillMode"] == "mixed"  # the parent stops its engine


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    unit = tmp_path / "kvist.service"
    text = (FOLDER / "kvist.service").read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/kvist/bin/kvist", sys.executable), encoding="utf-8")
    (tmp_path / "kvist.service.d").mkdir()
    for command in (["verify", str(unit)], ["security", "--offline=true", f"--threshold={MAX_EXPOSURE}", str(unit)]):
        done = subprocess.run(["systemd-analyze", *command], capture_output=True, text=True, timeout=60)
        complaints = [line for line in done.stderr.splitlines() if "kvist.service" in line]
        assert (done.returncode, complaints) == (0, []), done.stdout
    shutil.copy(FOLDER / "gpu.conf", tmp_path / "kvist.service.d")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "gpu.conf" in line]) == (0, [])


@pytest.mark.parametrize("is_abstract", [False, True])
def test_a_ready_service_says_so_to_its_manager(tmp_path: Path, is_abstract: bool) -> None:
    path = f"@kvist-test-{tmp_path.name}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + path[1:] if is_abstract else path)
        manager.settimeout(5.0)
        notify_ready("http://127.0.0.1:30000", {"NOTIFY_SOCKET": path})
        assert manager.recv(4096) == b"READY=1\nSTATUS=ready at http://127.0.0.1:30000"


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket"])
def test_without_a_manager_nothing_happens(address: str) -> None:
    notify_ready("http://127.0.0.1:30000", {"NOTIFY_SOCKET": address})
    notify_ready("http://127.0.0.1:30000", {})
