"""The control socket of `kvist up`: a socket of this user in the runtime directory, on which an upgrade is asked for.

    client                                       kvist up
    Request (one line of JSON) ────────────────► checked; one upgrade at a time
            ◄──────────────── Progress, each as it happens
            ◄──────────────── Ended, with the rows of the report

The file is `up-PORT.sock`, mode 0600, in a folder of mode 0700: only this user, who may also signal the processes, can
connect. The file of a dead `kvist up` is replaced by the next one on its port, and ignored by clients. The upgrade goes
on if its client disconnects.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from kvist.errors import UNDECODABLE, ConfigError, KvistError, Unavailable, error_from_wire
from kvist.upgrade.order import Order
from kvist.upgrade.replacing import Outcome, Show, Successor
from kvist.upgrade.report import Row, table

logger = logging.getLogger(__name__)

_PREFIX, _SUFFIX = "up-", ".sock"
_MAX_LINE_BYTES = 1 << 20
_REQUEST_TIMEOUT_S = 10.0  # for the line of a client that has connected
_SEND_TIMEOUT_S = 10.0  # for a client to read a line; then the upgrade goes on without it
_CONNECT_TIMEOUT_S = 5.0
_VERSION_TIMEOUT_S = 120.0  # for the new version to print its number
_MAX_CLIENTS = 8


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    python: str
    order: str
    start_timeout_s: float


class Progress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    text: str


class Ended(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """`code`: of the error that kept the upgrade from starting. `problem`: why it did not reach the last process."""

    rows: tuple[Row, ...] = ()
    problem: str = ""
    code: str | None = None


_DECODE = msgspec.json.Decoder(Progress | Ended).decode
Upgrade = Callable[[Successor, Order, Show], Outcome]


def socket_path(folder: Path, port: int) -> Path:
    return folder / f"{_PREFIX}{port}{_SUFFIX}"


# ---------------------------------------------------------------- kvist up


@contextlib.contextmanager
def serving_control(folder: Path, port: int, upgrade: Upgrade) -> Iterator[None]:
    """Accept requests on threads while the body runs. `port`: of the router, which this process has bound. Without a
    socket, upgrades are not possible, and the log says why."""
    path = socket_path(folder, port)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            path.unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                listener.bind(os.fspath(path))
            finally:
                os.umask(before)
            listener.listen(_MAX_CLIENTS)
        except OSError as error:
            logger.warning("kvist upgrade cannot reach this cluster: no socket at %s (%s)", path, error)
            yield
            return
        control = _Control(upgrade)
        threading.Thread(target=control.accept, args=(listener,), name="control", daemon=True).start()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread


class _Control:
    def __init__(self, upgrade: Upgrade) -> None:
        self._upgrade = upgrade
        self._busy = threading.Lock()
        self._places = threading.BoundedSemaphore(_MAX_CLIENTS)

    def accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed
                return
            if not self._places.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), name="upgrade", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._places.release)
            stack.enter_context(client)
            try:
                client.settimeout(_REQUEST_TIMEOUT_S)
                ended = self._carry_out(read_request(client), _Reader(client))
            except KvistError as error:
                ended = Ended(problem=error.message, code=error.code)
            except OSError:
                return  # the client is gone
            _Reader(client).tell(ended)

    def _carry_out(self, request: Request, reader: _Reader) -> Ended:
        if not self._busy.acquire(blocking=False):
            raise Unavailable("another upgrade of this cluster is running: wait for its end")
        try:
            reader.tell(Progress(text=f"the new version is {version_of(request.python)} ({request.python})"))
            successor = Successor(python=request.python, start_timeout_s=request.start_timeout_s)
            outcome = self._upgrade(successor, Order(request.order), lambda text: reader.tell(Progress(text=text)))
        finally:
            self._busy.release()
        return Ended(rows=outcome.rows, problem=outcome.problem)


class _Reader:
    """The client of an upgrade; a client that is gone or does not read is left out."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._is_gone = False

    def tell(self, message: Progress | Ended) -> None:
        if self._is_gone:
            return
        try:
            self._client.settimeout(_SEND_TIMEOUT_S)
            self._client.sendall(msgspec.json.encode(message) + b"\n")
        except OSError:
            self._is_gone = True


def read_request(client: socket.socket) -> Request:
    """Read the line of a client. Raises `ConfigError` if the line is not a valid request, and `OSError`."""
    line = b""
    while not line.endswith(b"\n"):
        piece = client.recv(1 << 12)
        if not piece or len(line) > _MAX_LINE_BYTES:
            raise ConfigError("the request for an upgrade is incomplete or too long")
        line += piece
    try:
        request = msgspec.json.decode(line, type=Request)
        Order(request.order)
    except (*UNDECODABLE, ValueError) as error:
        raise ConfigError(
            f"this kvist up does not understand the request ({error}): use kvist upgrade of its version or the next"
        ) from error
    return request


def version_of(python: str) -> str:
    """Return the version of Kvist that this Python runs. Raises `ConfigError` if it runs none."""
    try:
        told = subprocess.run(
            [python, "-m", "kvist", "--version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise ConfigError(f"--python {python} cannot be run: {error}", param="python") from error
    name, _, version = told.stdout.strip().partition(" ")
    if told.returncode != 0 or name != "kvist" or not version:
        last = (told.stderr.strip() or told.stdout.strip()).rpartition("\n")[2]
        raise ConfigError(
            f"--python {python} does not run Kvist ({last or told.returncode}): install Kvist in its environment first",
            param="python",
        )
    return version


# ---------------------------------------------------------------- kvist upgrade


def find_cluster(folder: Path, port: int | None) -> Path:
    """Return the socket of the running cluster. Raises `ConfigError` if there is none, or more than one."""
    living = [path for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")) if _answers(path)]
    if port is not None:
        path = socket_path(folder, port)
        if path in living:
            return path
    elif len(living) == 1:
        return living[0]
    ports = ", ".join(path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for path in living)
    if port is None and living:
        raise ConfigError(f"several clusters run here; choose one by its port: --port {ports}", param="port")
    wanted = "" if port is None else f" with --port {port}"
    found = f" (found: {ports})" if ports else ""
    raise ConfigError(
        f"no cluster of kvist up{wanted} is ready to be upgraded: there is no control socket in {folder}{found}. Use "
        "the --runtime-dir of kvist up, and wait until the cluster is ready",
        param="port",
    )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


def ask_for_upgrade(path: Path, request: Request, show: Show) -> int:
    """Ask for the upgrade, show its progress and its report; return 0 if every process was replaced, else 1. Raises
    `KvistError` if it does not begin."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.settimeout(_CONNECT_TIMEOUT_S)
            server.connect(os.fspath(path))
            server.sendall(msgspec.json.encode(request) + b"\n")
            server.settimeout(None)  # a step may take long; kvist up closes the connection when it ends
            with server.makefile("rb") as lines:
                for line in lines:
                    message = _DECODE(line)
                    if isinstance(message, Progress):
                        show(message.text)
                        continue
                    return _show_end(message, show)
    except (OSError, *UNDECODABLE) as error:
        raise Unavailable(f"kvist up does not answer at {path}: {error}") from error
    raise Unavailable("kvist up ended during the upgrade")


def _show_end(ended: Ended, show: Show) -> int:
    if ended.code is not None:
        raise error_from_wire(ended.code, ended.problem)
    show(table(ended.rows))
    if ended.problem:
        show(f"the upgrade ended early: {ended.problem}")
        show("Processes that the table does not list still run the old version, and serve.")
    return 1 if ended.problem else 0
