"""`kvist up` identifies its own children, and reports once a fault that a restart cannot fix."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvist.supervisor.child import NO_ANSWER, READY
from kvist.supervisor.probe import probe_child

KVIST = (sys.executable, "-m", "kvist")


class _Ready(BaseHTTPRequestHandler):
    """A fake Kvist server with the instance id `ours`."""

    def do_GET(self) -> None:
        body = b'{"status":"ready","instance_id":"ours"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Ready)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.case("port-of-another")
def test_another_server_on_the_port_of_a_child_is_not_mistaken_for_the_child(url: str) -> None:
    assert probe_child(url, "ours") is READY
    assert probe_child(url, "another") is NO_ANSWER


def start_up(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVIST, "up", *options], capture_output=True, text=True, timeout=60)


@pytest.mark.case("port-of-another")
def test_up_on_a_port_in_use_prints_one_error_and_starts_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start_up(f"--port={port}")
    assert done.returncode == 2
    assert done.stderr.count(f"cannot listen on --host 127.0.0.1 --port {port}") == 1
    assert done.stdout == ""


@pytest.mark.case("port-of-another")
def test_up_with_a_missing_model_prints_one_error_and_starts_nothing() -> None:
    done = start_up("--port=0", "--model-path=/nowhere")
    assert done.returncode == 2
    assert (done.stderr + done.stdout).count("/nowhere") == 1
