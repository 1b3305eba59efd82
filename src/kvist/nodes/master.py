"""`kvist master`: the master of a Mooncake pool, a child process, watched and restarted, behind our HTTP.

    STARTING ──answers──► SERVING ──died──► WAITING ──backoff──► STARTING
        └──refused its flags, or died `MAX_DEATHS` times in a row──► run() raises

A new master knows only the pages on SSDs, which stores announce to it within about a second; what was in memory only is
computed and stored again. The master writes no snapshots, because restored ones have returned wrong bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import httpx
from prometheus_client.core import Metric
from starlette.types import Receive, Scope, Send

from kvist.clock import MonotonicClock
from kvist.cluster.listener import bound_socket
from kvist.cluster.ports import free_ports
from kvist.errors import Unavailable
from kvist.http.asgi import header, read_body
from kvist.http.encoding import BodyLimits
from kvist.http.work import BodyBudget
from kvist.nodes.config import MasterAddress, NodeKeyOptions, PoolOptions
from kvist.nodes.master_program import (
    check_program,
    die_with_parent,
    find_program,
    log_line,
    program_flags,
    to_words,
)
from kvist.nodes.node_metrics import master_families
from kvist.nodes.node_server import NodeProcess, Stop, run_node
from kvist.server.middleware import Endpoint
from kvist.supervisor.engine_process import BACKOFF_RESET_S, restart_wait_s

START_TIMEOUT_S = 30.0
STOP_GRACE_S = 5.0
PROXY_TIMEOUT_S = 10.0
CHECK_INTERVAL_S = 0.5  # between two questions whether the master answers
SILENT_RESTART_S = 30.0
MAX_DEATHS = 5
BODY_LIMITS = BodyLimits(max_bytes=64 << 10, timeout_s=10.0)
_MAX_LINE_BYTES = 1 << 16
_READ = ("/get_all_segments", "/get_segments_detail", "/get_all_keys", "/query_key", "/batch_query_keys")
_JOBS = ("/api/v1/drain_jobs/query", "/api/v1/drain_jobs/cancel")

logger = logging.getLogger(__name__)


class MasterNode:
    """The node. Owned by the event loop."""

    def __init__(self, program: Path, address: MasterAddress, pool: PoolOptions) -> None:
        self._program, self._address, self._pool = program, address, pool
        self._clock = MonotonicClock()
        self._process: asyncio.subprocess.Process | None = None
        self._http: httpx.AsyncClient | None = None
        self._problem = "the master starts"
        self._num_restarts = 0
        self._bodies = BodyBudget(limit_bytes=0, free_bytes=BODY_LIMITS.max_bytes)  # connections bound their number

    @property
    def pid(self) -> int | None:
        """Process id of the program; None while it does not run."""
        return None if self._process is None else self._process.pid

    def problem(self) -> str:
        return self._problem

    async def run(self, stop: Stop) -> None:
        deaths = 0
        stopping = asyncio.create_task(stop.requested.wait(), name="stop requested")
        try:
            while not stopping.done():
                started_s = self._clock.now_s()
                why = await self._run_once(stopping)
                if stopping.done():
                    return
                deaths = 1 if self._clock.now_s() - started_s > BACKOFF_RESET_S else deaths + 1
                if deaths >= MAX_DEATHS:
                    raise Unavailable(f"the master died {deaths} times in a row, last: {why}")
                wait_s = restart_wait_s(deaths)
                self._num_restarts += 1
                self._problem = f"the master {why}; the next start is in {wait_s:g} s"
                logger.warning("%s", self._problem)
                await asyncio.wait((stopping,), timeout=wait_s)
        finally:
            stopping.cancel()

    async def _run_once(self, stopping: asyncio.Task[bool]) -> str:
        """Run the program until it ends or a stop is requested. Returns why it ended."""
        [metrics_port] = free_ports(1)
        address = self._address
        flags = program_flags(self._pool, host=address.host, rpc_port=address.rpc_port, metrics_port=metrics_port)
        process = await asyncio.create_subprocess_exec(
            self._program,
            *to_words(flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_MAX_LINE_BYTES,
            preexec_fn=die_with_parent,
        )
        self._process = process
        reading = asyncio.create_task(_relay(process), name="lines of the master")
        ended = asyncio.create_task(process.wait(), name="end of the master")
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{metrics_port}", timeout=PROXY_TIMEOUT_S, trust_env=False
        ) as http:
            self._http = http
            watching = asyncio.create_task(self._watch(http), name="is the master silent")
            try:
                await asyncio.wait((ended, stopping, watching), return_when=asyncio.FIRST_COMPLETED)
                silent = watching.done() and not ended.done() and not stopping.done()
            finally:
                self._http = None
                watching.cancel()
                await _end(process)
                await asyncio.gather(reading, ended, watching, return_exceptions=True)
                self._process = None
        if silent:
            return "did not answer, and was killed"
        status = process.returncode or 0
        return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    async def _watch(self, http: httpx.AsyncClient) -> None:
        """Return when the program has not answered for too long."""
        answered_s, limit_s, was_ready = self._clock.now_s(), START_TIMEOUT_S, False
        while True:
            if await _is_serving(http):
                if not was_ready:
                    logger.info("the master serves at %s:%d", self._address.host, self._address.rpc_port)
                answered_s, limit_s, was_ready = self._clock.now_s(), SILENT_RESTART_S, True
                self._problem = ""
            elif (silent_s := self._clock.now_s() - answered_s) > limit_s:
                return
            elif was_ready:
                self._problem = f"the master has not answered for {silent_s:.0f} s"
            await asyncio.sleep(CHECK_INTERVAL_S if was_ready else CHECK_INTERVAL_S / 5)

    # ---- HTTP

    def metrics(self) -> Iterable[Metric]:
        return master_families(is_up=not self._problem, num_restarts=self._num_restarts)

    async def more_metrics(self) -> bytes:
        """Return the master's own metrics; nothing while it does not answer."""
        if self._http is None:
            return b""
        try:
            response = await self._http.get("/metrics")
        except httpx.HTTPError:
            return b""
        return bytes(response.content) if response.status_code == httpx.codes.OK else b""

    def endpoints(self) -> Sequence[tuple[str, Endpoint, list[str]]]:
        read = [(path, self._pass_on, ["GET"]) for path in (*_READ, *_JOBS[:1])]
        return [*read, ("/api/v1/drain_jobs", self._pass_on, ["POST"]), (_JOBS[1], self._pass_on, ["POST"])]

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on to the program, and its answer back."""
        if self._http is None:
            raise Unavailable(f"the master does not answer: {self._problem}")
        with self._bodies.open() as share:
            body = await read_body(scope, receive, share, BODY_LIMITS) if scope["method"] == "POST" else b""
        path = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
        kind = header(scope, b"content-type") or b"application/json"
        try:
            async with self._http.stream(
                scope["method"], path, content=body, headers={"content-type": kind.decode("latin-1")}
            ) as answer:
                found = answer.headers.get("content-type", "application/json").encode("latin-1")
                await send(
                    {"type": "http.response.start", "status": answer.status_code, "headers": [(b"content-type", found)]}
                )
                async for piece in answer.aiter_bytes():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except httpx.HTTPError as error:
            raise Unavailable(f"the master does not answer: {error or type(error).__name__}") from error


async def _is_serving(http: httpx.AsyncClient) -> bool:
    try:
        response = await http.get("/health", timeout=2.0)
        return response.status_code == httpx.codes.OK and response.json().get("service_ready") is True
    except (httpx.HTTPError, ValueError, AttributeError):
        return False


async def _relay(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    while True:
        try:
            line = await process.stdout.readline()
        except ValueError:  # a line that is too long
            continue
        if not line:
            return
        log_line(line.decode("utf-8", "replace").rstrip())


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the program: SIGTERM, and after `STOP_GRACE_S` SIGKILL."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_GRACE_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def run_master(
    *, address: MasterAddress, keys: NodeKeyOptions, pool: PoolOptions, instance_id: str | None, stop_with_stdin: bool
) -> int:
    """Run the master until a stop is requested, then return 0. Raises `KvistError`."""
    program = find_program(address.mooncake_master_path)
    check_program(program, program_flags(pool, host=address.host, rpc_port=address.rpc_port, metrics_port=0))
    with bound_socket(address.host, address.rpc_port, flag="rpc-port"):
        pass  # a port in use is an error now, and not the death of the program later
    process = NodeProcess(
        server=keys.server(address.host, address.port),
        instance_id=instance_id,
        stop_with_stdin=stop_with_stdin,
        stop_s=STOP_GRACE_S,
    )
    return run_node(process, lambda _port: MasterNode(program, address, pool))
