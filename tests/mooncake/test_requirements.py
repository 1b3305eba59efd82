"""The needs of Mooncake are checked before it is used, and each message names the command or the flag that helps."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.errors import Unavailable
from kvist.mooncake import requirements
from kvist.mooncake.requirements import Network, User, library_obstacle, load, missing_packages, obstacle

TESTS = User(title="tests", protocol_flag="--protocol", devices_flag="--device", host_flag="--host")


@pytest.fixture
def has_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "installed_release", lambda: "0.3.13.post1")
    monkeypatch.setattr(requirements, "missing_packages", list)
    monkeypatch.setattr(requirements, "load", lambda _module: None)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(requirements, "_DEVICES", tmp_path)
    return tmp_path


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_PACKAGES", ("no-such-package",))
    assert library_obstacle() == "Mooncake is not installed: pip install 'kvist[mooncake]'"


@pytest.mark.parametrize("release", ["0.3.14", "0.3.1", "0.3.130", "0.4", ""])
def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(requirements, "installed_release", lambda: release)
    assert library_obstacle() == (
        f"Mooncake {release} is installed, but Kvist needs 0.3.13: pip install 'kvist[mooncake]'"
    )


@pytest.mark.usefixtures("has_library")
@pytest.mark.parametrize("release", ["0.3.13", "0.3.13.post1", "0.3.13.post2"])
def test_every_build_of_the_release_is_taken(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(requirements, "installed_release", lambda: release)
    assert library_obstacle() == ""


def test_missing_system_libraries_are_named_with_the_command_for_these_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "installed_release", lambda: "0.3.13.post1")
    libraries = {"libc.so.6": "libc6", "libno-such.so.1": "libno-such1", "libnor-this.so.2": "libnor-this2"}
    monkeypatch.setattr(requirements, "_SYSTEM_LIBRARIES", libraries)
    assert missing_packages() == ["libno-such1", "libnor-this2"]
    assert library_obstacle().endswith("missing: apt-get install libno-such1 libnor-this2")


@pytest.mark.skipif(bool(library_obstacle()), reason=library_obstacle() or "-")
def test_each_system_library_that_is_checked_is_one_that_the_package_loads() -> None:
    maps = "from kvist.mooncake.requirements import load; load('mooncake.engine'); "
    maps += "print(open('/proc/self/maps').read())"
    loaded = subprocess.run([sys.executable, "-c", maps], check=True, capture_output=True, text=True).stdout
    outside = {Path(word).name for word in loaded.split() if word.startswith("/") and "/site-packages/" not in word}
    for soname in requirements._SYSTEM_LIBRARIES:
        assert any(name.startswith(soname) for name in outside), (soname, sorted(outside))


@pytest.mark.parametrize("page", ["mooncake.md", "operations.md"])
def test_the_docs_install_the_system_libraries_that_are_checked(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    assert f"apt-get install {' '.join(requirements._SYSTEM_LIBRARIES.values())} " in text


def test_a_library_that_cannot_be_loaded_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(Unavailable, match=r"undefined symbol.*pip install 'kvist\[mooncake\]'"):
        load("mooncake.no_such_module")


@pytest.mark.usefixtures("has_library")
def test_an_unknown_protocol_is_named_with_those_that_exist() -> None:
    reason = obstacle(Network(host="localhost", protocol="pigeon"), TESTS)
    assert reason == "--protocol pigeon is not one of tcp, rdma"


@pytest.mark.usefixtures("has_library")
def test_devices_without_rdma_are_refused() -> None:
    reason = obstacle(Network(host="localhost", devices=("mlx5_0", "mlx5_1")), TESTS)
    assert reason == "--device mlx5_0,mlx5_1 needs RDMA: add --protocol rdma"


@pytest.mark.usefixtures("has_library")
def test_rdma_on_a_host_without_devices_is_refused(devices: Path) -> None:
    reason = obstacle(Network(host="localhost", protocol="rdma"), TESTS)
    assert reason == f"this host has no RDMA device ({devices} has none): use --protocol tcp"


def add_device(devices: Path, name: str, *states: str) -> None:
    for number, state in enumerate(states, start=1):
        port = devices / name / "ports" / str(number)
        port.mkdir(parents=True)
        (port / "state").write_text(state)


@pytest.mark.usefixtures("has_library")
def test_rdma_without_an_active_port_is_refused(devices: Path) -> None:
    add_device(devices, "mlx5_0", "1: DOWN\n", "2: INIT\n")
    add_device(devices, "mlx5_1", "1: DOWN\n", "4: ACTIVE\n")
    assert obstacle(Network(host="localhost", protocol="rdma"), TESTS) == ""
    assert obstacle(Network(host="localhost", protocol="rdma", devices=("mlx5_0", "mlx5_1")), TESTS) == ""
    reason = obstacle(Network(host="localhost", protocol="rdma", devices=("mlx5_0",)), TESTS)
    assert reason == "no port of mlx5_0 is active (`rdma link` shows them): use --protocol tcp"


@pytest.mark.usefixtures("has_library")
def test_a_missing_rdma_device_is_named_with_those_that_exist(devices: Path) -> None:
    for name in ("mlx5_1", "mlx5_0"):
        add_device(devices, name, "4: ACTIVE\n")

    def reason(*names: str) -> str:
        return obstacle(Network(host="localhost", protocol="rdma", devices=names), TESTS)

    assert reason() == reason("mlx5_0") == reason("mlx5_1", "mlx5_0") == ""
    expected = "this host has no RDMA device mlx5_7: choose of mlx5_0, mlx5_1 with --device"
    assert reason("mlx5_0", "mlx5_7") == expected


@pytest.mark.usefixtures("has_library")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.9.8.7"])
def test_an_address_of_this_host_is_taken(host: str) -> None:
    assert obstacle(Network(host=host), TESTS) == ""


@pytest.mark.usefixtures("has_library")
@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "a" * 64, "no..name", "no.such.name.invalid"])
def test_an_address_of_another_host_is_refused(host: str) -> None:
    assert obstacle(Network(host=host), TESTS).endswith("(`ip address` shows them): set --host")
