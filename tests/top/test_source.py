"""`kvist top` reads a server over HTTP, and goes on when the server does not answer."""

from __future__ import annotations

import io
from collections.abc import Callable

import httpx
import msgspec
import pytest
from rich.console import Console

from kvist.cli import main
from kvist.cluster.ports import free_ports
from kvist.errors import Unauthorized, Unavailable
from kvist.operate.config import OperatedServer
from kvist.top import command
from kvist.top.config import TopOptions
from kvist.top.source import MAX_BYTES, Reading, Source
from tests.top.test_view import snapshot

URL = "http://gateway"
SLOWEST = {"requests": [{"id": "r", "status": "finished", "duration_s": 2.0, "unknown": 1}]}


class Server:
    """Answers as a gateway would; `down` while it restarts. Mutable."""

    def __init__(self, key: str | None = None) -> None:
        self.down, self.key, self.has_requests, self.body = False, key, True, msgspec.json.encode(snapshot())

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("Connection refused")
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return httpx.Response(401, json={"error": {"code": "invalid_api_key", "message": "send an API key"}})
        if request.url.path == "/dashboard/snapshot":
            return httpx.Response(200, content=self.body)
        return httpx.Response(200, json=SLOWEST) if self.has_requests else httpx.Response(404, json={"error": {}})


def source(server: Callable[[httpx.Request], httpx.Response], key: str | None = None) -> Source:
    return Source(OperatedServer(url=URL, api_key=key), transport=httpx.MockTransport(server))


def test_figures_and_the_slowest_requests_are_read() -> None:
    server = Server(key="secret")
    reading = source(server, "secret").read()
    assert reading.snapshot == snapshot()
    assert reading.slowest is not None
    assert reading.slowest[0].duration_s == 2.0
    server.has_requests = False
    assert source(server, "secret").read().slowest is None


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("other", f"{URL} does not accept this API key: correct KVIST_API_KEY or --api-key"),
        (None, f"{URL} requires an API key: set KVIST_API_KEY, or add --api-key KEY"),
    ],
)
def test_a_wrong_or_missing_key_is_an_error_at_once_and_names_the_option(key: str | None, words: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        source(Server(key="secret"), key).read_again(1.0)
    assert caught.value.message == words


def test_a_restart_of_the_server_is_survived() -> None:
    server = Server()
    top = source(server)
    first = top.read_again(1.0)
    server.down = True
    second, third = top.read_again(2.0), top.read_again(5.0)
    assert (second.since_unix_s, third.since_unix_s) == (2.0, 2.0)
    assert second.snapshot == first.snapshot
    assert "no Kvist server answers at http://gateway: Connection refused" in third.problem
    server.down = False
    assert top.read_again(6.0) == first
    server.down = True
    assert top.read_again(9.0).since_unix_s == 9.0


def test_a_server_that_never_answered_has_no_figures() -> None:
    server = Server()
    server.down = True
    reading = source(server).read_again(3.0)
    assert reading == Reading(problem=reading.problem, since_unix_s=3.0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "has another form than this version knows"),
        (b'{"time_unix_s": 1}', "use the kvist top of the server's version"),
        (b" " * (MAX_BYTES + 1), "has over 16 MiB"),
    ],
    ids=["no JSON", "another version", "too large"],
)
def test_an_answer_of_another_form_is_named(body: bytes, words: str) -> None:
    server = Server()
    server.body = body
    with pytest.raises(Unavailable) as caught:
        source(server).read()
    assert words in caught.value.message


def test_another_kind_of_server_is_named() -> None:
    with pytest.raises(Unavailable) as caught:
        source(lambda _: httpx.Response(404, text="nothing here")).read()
    assert "is not a Kvist server of this version: status 404" in caught.value.message


def test_the_figures_are_shown_until_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the view follows the server; elsewhere it is printed once."""
    server, waits = Server(), list[float]()
    monkeypatch.setattr(command, "Source", lambda operated: source(server, operated.api_key))

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        server.down = not server.down
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("kvist.top.command.time.sleep", sleep)
    output = io.StringIO()
    console = Console(file=output, width=120, height=40, force_terminal=True)
    assert command.run_top(OperatedServer(url=URL), TopOptions(interval_s=0.5), console) == 0
    assert waits == [0.5] * 3
    assert "unreachable since" in output.getvalue()
    server.down, output = False, io.StringIO()
    assert command.run_top(OperatedServer(url=URL), TopOptions(), Console(file=output, width=120)) == 0
    assert waits == [0.5] * 3
    assert "10.0.0.1:9001" in output.getvalue()
    assert "\x1b" not in output.getvalue()


def test_a_file_or_pipe_gets_all_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "Source", lambda operated: source(Server(), operated.api_key))
    monkeypatch.delenv("COLUMNS", raising=False)
    assert command.run_top(OperatedServer(url=URL), TopOptions()) == 0
    assert "stored" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert command.run_top(OperatedServer(url=URL), TopOptions()) == 0
    assert "stored" not in capsys.readouterr().out


def test_an_address_without_a_server_is_one_line_and_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert main(["top", f"http://127.0.0.1:{port}", "--once"]) == 1
    assert f"no Kvist server answers at http://127.0.0.1:{port}" in capsys.readouterr().err
