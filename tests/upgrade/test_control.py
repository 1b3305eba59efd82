"""The control socket: closed to other users, one upgrade at a time, and an error for everything that is wrong."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvist.errors import ConfigError, Unavailable
from kvist.upgrade.config import UpgradeOptions
from kvist.upgrade.control import (
    Request,
    Upgrade,
    ask_for_upgrade,
    find_cluster,
    serving_control,
    socket_path,
    version_of,
)
from kvist.upgrade.order import Order
from kvist.upgrade.replacing import Outcome, Show, Successor
from kvist.upgrade.report import Row

REQUEST = Request(python=sys.executable, order="stop-first", start_timeout_s=5.0)
ROW = Row(process="router", old_version="1", new_version="2", seconds=1.0)


@pytest.fixture(autouse=True)
def quick_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.upgrade.control.version_of", lambda _python: "2.0")


@contextmanager
def cluster(folder: Path, outcome: Outcome, port: int = 1, wait: Callable[[], object] = lambda: None) -> Iterator[list]:  # type: ignore[type-arg]
    asked: list[tuple[Successor, Order]] = []

    def upgrade(successor: Successor, order: Order, show: Show) -> Outcome:
        asked.append((successor, order))
        show("one process is replaced")
        wait()
        return outcome

    with serving_control(folder, port, upgrade):
        yield asked


def test_an_upgrade_is_asked_for_shown_and_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    with cluster(tmp_path, Outcome(rows=(ROW,))) as asked:
        assert ask_for_upgrade(find_cluster(tmp_path, None), REQUEST, lines.append) == 0
    assert asked == [(Successor(python=sys.executable, start_timeout_s=5.0), Order.STOP_FIRST)]
    assert lines[:2] == [f"the new version is 2.0 ({sys.executable})", "one process is replaced"]
    assert "router" in lines[2]


def test_an_upgrade_that_ends_early_has_status_1_and_says_why(tmp_path: Path) -> None:
    lines: list[str] = []
    with cluster(tmp_path, Outcome(rows=(ROW,), problem="decode-0: it does not start")):
        assert ask_for_upgrade(find_cluster(tmp_path, 1), REQUEST, lines.append) == 1
    assert "decode-0: it does not start" in lines[-2]


def test_only_this_user_can_connect_and_the_file_goes_with_the_cluster(tmp_path: Path) -> None:
    path = socket_path(tmp_path, 1)
    path.touch()  # of a kvist up that was killed
    with cluster(tmp_path, Outcome(rows=())):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_ISSOCK(os.stat(path).st_mode)
    assert not path.exists()


def test_a_second_upgrade_is_refused_while_one_runs(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(60)

    with cluster(tmp_path, Outcome(rows=(ROW,)), wait=wait):
        path = find_cluster(tmp_path, None)
        first = threading.Thread(target=ask_for_upgrade, args=(path, REQUEST, lambda _text: None))
        first.start()
        assert begun.wait(60)
        try:
            with pytest.raises(Unavailable, match="another upgrade"):
                ask_for_upgrade(path, REQUEST, lambda _text: None)
        finally:
            go_on.set()
            first.join(60)
        assert ask_for_upgrade(path, REQUEST, lambda _text: None) == 0, "and is possible afterwards"


def test_an_upgrade_goes_on_without_a_client_that_disconnects(tmp_path: Path) -> None:
    begun, done, go_on = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(60)
        done.set()

    with cluster(tmp_path, Outcome(rows=(ROW,)), wait=wait):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(socket_path(tmp_path, 1)))
            client.sendall(b'{"python": "p", "order": "auto", "start_timeout_s": 1.0}\n')
            assert begun.wait(60)
        go_on.set()
        assert done.wait(60)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\n",
        b"{}\n",
        b'{"python": "p", "order": "sideways", "start_timeout_s": 1.0}\n',
        b'{"python": 1}\n',
        b"x" * 10,
    ],
)
def test_a_request_that_cannot_be_understood_is_answered_with_the_reason(tmp_path: Path, line: bytes) -> None:
    with cluster(tmp_path, Outcome(rows=())) as asked, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(os.fspath(socket_path(tmp_path, 1)))
        client.sendall(line)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b'"code":"config_error"' in answer
    assert asked == []


def test_the_cluster_is_found_by_its_port_and_a_missing_one_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--runtime-dir"):
        find_cluster(tmp_path, None)
    socket_path(tmp_path, 3).touch()  # of a cluster that is dead
    with cluster(tmp_path, Outcome(rows=()), port=1), cluster(tmp_path, Outcome(rows=()), port=2):
        assert find_cluster(tmp_path, 2) == socket_path(tmp_path, 2)
        with pytest.raises(ConfigError, match=r"--port 1, 2"):
            find_cluster(tmp_path, None)
        with pytest.raises(ConfigError, match=r"found: 1, 2"):
            find_cluster(tmp_path, 3)


def test_a_folder_whose_path_is_too_long_for_a_socket_is_logged_and_the_cluster_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    never: Upgrade = lambda *_args: pytest.fail("no upgrade was asked for")  # noqa: E731
    with serving_control(folder, 1, never):
        pass
    assert "kvist upgrade cannot reach this cluster" in caplog.text


def test_a_kvist_up_that_ends_during_the_upgrade_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(socket_path(tmp_path, 1)))
        server.listen()

        def drop() -> None:
            client, _ = server.accept()
            client.recv(4096)
            client.close()

        thread = threading.Thread(target=drop)
        thread.start()
        with pytest.raises(Unavailable, match="kvist up"):
            ask_for_upgrade(socket_path(tmp_path, 1), REQUEST, lambda _text: None)
        thread.join(60)


def test_the_new_version_is_the_one_of_the_python_that_asks() -> None:
    assert UpgradeOptions().new_python == sys.executable
    assert UpgradeOptions(python="/venv/bin/python").new_python == "/venv/bin/python"


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false", "/bin/echo"])
def test_a_python_without_kvist_is_an_error_that_names_it(python: str) -> None:
    with pytest.raises(ConfigError, match=f"--python {python}"):
        version_of(python)
