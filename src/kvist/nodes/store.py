"""`kvist store`: one store of a Mooncake pool, with memory for pages and, with --ssd-path, an SSD that keeps them.

    WAITING for the master ─► FORGETTING: until the master has forgotten a run that crashed ─► OPENING ─► SERVING
    SERVING ──POST /drain──► DRAINING ─► DRAINED          (emptying.py; only a restart fills the store again)
    a stop, from any state ─► FLUSHING ─► LEAVING ─► STOPPED

FLUSHING waits until the pages in memory are on the SSD too; LEAVING takes no new pages, stays readable for a moment,
and removes the store from the pool. A store that stops in order and starts again therefore loses no page, and a pool
whose stores do that one after the other does not either.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from prometheus_client.core import Metric
from starlette.types import Receive, Scope, Send

from kvist.channel import bracketed
from kvist.clock import MonotonicClock
from kvist.errors import ConfigError, Conflict, KvistError, Unavailable
from kvist.http.asgi import send_json
from kvist.mooncake.master_admin import HeldPage, MasterAdmin
from kvist.mooncake.master_admin import Segment as ListedSegment
from kvist.mooncake.requirements import Network, User, obstacle
from kvist.nodes.config import STOP_MARGIN_S, JoinPoolOptions, NodeKeyOptions, SegmentOptions, StoreAddress
from kvist.nodes.emptying import Emptying, check_room
from kvist.nodes.node_metrics import StoreFigures, store_families
from kvist.nodes.node_server import NodeProcess, Stop, run_node
from kvist.nodes.segment import HEARTBEAT_S, UNIT_BYTES, NativeThread, Segment, SegmentPlan
from kvist.nodes.ssd_folder import Contents, RunNote, SsdFolder
from kvist.nodes.ssd_limit import SsdLimit
from kvist.output import output_to
from kvist.server.middleware import Endpoint

USER = User(
    title="the store",
    protocol_flag="--hicache-mooncake-protocol",
    devices_flag="--hicache-mooncake-device",
    host_flag="--advertise-host",
)
OPEN_TIMEOUT_S = 600.0  # to allocate the memory
CALL_TIMEOUT_S = 10.0
CHECK_INTERVAL_S = 1.0
CONNECT_TIMEOUT_S = 2.0
PAUSE_S = 0.6 * HEARTBEAT_S  # without a new file: the SSD keeps up with the pages that come at every heartbeat
GRACE_S = 2 * HEARTBEAT_S  # of a stop: pages put just before are written meanwhile
assert GRACE_S + 3 * CALL_TIMEOUT_S <= STOP_MARGIN_S
_GB, _MIB = 10**9, 1 << 20
T = TypeVar("T")

logger = logging.getLogger(__name__)


class StoreState(enum.Enum):
    WAITING = "waiting for the master"
    FORGETTING = "waiting until the master has forgotten the earlier run"
    OPENING = "joining the pool"
    SERVING = "serving"
    DRAINING = "draining"
    DRAINED = "drained"
    FLUSHING = "writing pages to the SSD"
    LEAVING = "leaving the pool"
    STOPPED = "stopped"


class StoreNode:
    """The node. Owned by the event loop; the library's calls run on a thread of their own."""

    def __init__(self, *, plan: SegmentPlan, ssd: SsdFolder | None, join: JoinPoolOptions, api_key: str | None) -> None:
        self.state = StoreState.WAITING
        self._plan, self._ssd, self._join = plan, ssd, join
        self._admin = MasterAdmin(join.master_url, api_key=api_key, timeout_s=CONNECT_TIMEOUT_S)
        self._native = NativeThread()
        self._segment = Segment(plan)
        self._clock = MonotonicClock()
        self._listed: ListedSegment | None = None  # as the master lists us
        self._problem = ""
        self._emptying: Emptying | None = None
        self._contents = Contents(num_pages=0, num_bytes=0)
        self.has_joined = False
        self._limit: SsdLimit | None = None
        if ssd is not None:
            self._limit = SsdLimit(
                ssd,
                plan.ssd_bytes,
                alone=self._alone,
                forget=lambda keys: self._call(lambda: self._segment.remove(keys), "removing pages"),
                clock=self._clock,
            )

    # ---- life

    async def run(self, stop: Stop) -> None:
        stopping = asyncio.create_task(stop.requested.wait(), name="stop requested")
        working = asyncio.create_task(self._work(), name="store")
        try:
            await asyncio.wait((stopping, working), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()  # raises its error
        finally:
            for task in (stopping, working):
                task.cancel()
            await asyncio.gather(stopping, working, return_exceptions=True)
            if self._emptying is not None:
                await self._emptying.cancel()
            await self._leave(stop.hurried)
            self._admin.close()
            if self._ssd is not None:
                self._ssd.close()

    async def _work(self) -> None:
        await self._wait_for_master()
        await self._wait_until_forgotten()
        self.state, self.has_joined = StoreState.OPENING, True
        started_s = self._clock.now_s()
        await self._native.run(self._segment.open, timeout_s=OPEN_TIMEOUT_S, doing="joining the pool")
        await self._wait_until_listed()
        self._warn_or_tell(self._clock.now_s() - started_s)
        self.state = StoreState.SERVING
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_checking(), name="is the store listed")
            if self._limit is not None:
                tasks.create_task(self._limit.run(), name="limit of the SSD")

    async def _keep_checking(self) -> None:
        while True:
            await self._check()
            await asyncio.sleep(CHECK_INTERVAL_S)

    def _alone(self, keys: Sequence[str]) -> set[str]:
        """Return the keys that have no copy but those on our SSD. Blocks."""
        listed = self._listed
        return set() if listed is None else {page.key for page in self._admin.only_on_disk_of(listed.client_id, keys)}

    def _warn_or_tell(self, took_s: float) -> None:
        logger.info(
            "%s has joined the pool of %s with %.3g GB within %.2f s; its SSD has %d pages (%.3g GB)",
            self._plan.name,
            self._plan.master_addr,
            self._plan.num_bytes / _GB,
            took_s,
            self._contents.num_pages,
            self._contents.num_bytes / _GB,
        )
        if self._ssd is None:
            logger.warning("the pages of this store are lost when it stops: set --ssd-path to keep them")

    async def _wait_for_master(self) -> None:
        """Wait until both ports of the master answer. Raises `Unavailable` after --master-timeout-s."""
        host, port = self._join.master()
        deadline_s = self._clock.now_s() + self._join.master_timeout_s
        while True:
            try:
                await _connect(host, port)
                await self._ask(self._admin.segments)
            except OSError as error:
                reason, flag = f"{error}", "--hicache-mooncake-master-addr"
            except KvistError as error:
                reason, flag = error.message, "--hicache-mooncake-master-url"
            else:
                self._problem = ""
                return
            problem = f"no Mooncake master at {host}:{port} ({reason}): start kvist master there, or set {flag}"
            if problem != self._problem:
                self._problem = problem
                logger.info("waiting: %s", problem)
            if self._clock.now_s() > deadline_s:
                raise Unavailable(problem)
            await asyncio.sleep(CHECK_INTERVAL_S / 4)

    async def _wait_until_forgotten(self) -> None:
        """Wait until the master knows no earlier run of this store. Raises `Unavailable` after --forget-timeout-s."""
        note = None if self._ssd is None else self._ssd.note()
        deadline_s = self._clock.now_s() + self._join.forget_timeout_s
        while True:
            with contextlib.suppress(KvistError):  # a master that restarts has forgotten every run
                earlier = [one for one in await self._ask(self._admin.segments) if self._is_ours(one, note)]
                if not earlier:
                    return
                if self.state is not StoreState.FORGETTING:
                    self.state = StoreState.FORGETTING
                    logger.info("waiting until the master has forgotten the earlier run of %s", earlier[0].segment_name)
            if self._clock.now_s() > deadline_s:
                raise Unavailable(
                    f"the master lists a store {self._plan.name} that is alive: stop it, or give this store another "
                    "--port or --advertise-host"
                )
            await asyncio.sleep(CHECK_INTERVAL_S / 10)

    def _is_ours(self, listed: ListedSegment, note: RunNote | None) -> bool:
        return listed.segment_name == self._plan.name or (note is not None and listed.client_id == note.client_id)

    async def _wait_until_listed(self) -> None:
        deadline_s = self._clock.now_s() + CALL_TIMEOUT_S
        while True:
            await self._check()
            if self._listed is not None:
                break
            if self._clock.now_s() > deadline_s:
                raise Unavailable(f"the master at {self._join.master_url} does not list this store: {self._problem}")
            await asyncio.sleep(CHECK_INTERVAL_S / 10)
        if self._ssd is not None:
            self._ssd.write_note(RunNote(client_id=self._listed.client_id, segment_name=self._plan.name))
            self._contents = await asyncio.to_thread(self._ssd.contents)

    async def _check(self) -> None:
        """Read how the master lists this store."""
        try:
            listed = [one for one in await self._ask(self._admin.segments) if one.segment_name == self._plan.name]
        except KvistError as error:
            self._problem = error.message
            return
        self._listed = listed[0] if listed else None
        self._problem = "" if listed else "the master does not list this store; the library joins again by itself"

    # ---- the end

    async def _leave(self, hurried: asyncio.Event) -> None:
        """Leave the pool in order, in a bounded time. Never raises: the process ends in any case."""
        if self.state not in (StoreState.SERVING, StoreState.DRAINING, StoreState.DRAINED):
            self.state = StoreState.STOPPED
            return
        try:
            if self._ssd is None:
                await self._call(lambda: self._segment.leave(0), "leaving the pool")
            else:
                await self._leave_with_ssd(self._ssd, hurried)
        except KvistError as error:
            logger.warning("the store did not leave the pool in order: %s", error.message)
        self.state = StoreState.STOPPED

    async def _leave_with_ssd(self, ssd: SsdFolder, hurried: asyncio.Event) -> None:
        self.state = StoreState.FLUSHING
        grace_s = GRACE_S
        if not hurried.is_set() and not await self._keeps_up(ssd, hurried, self._join.flush_timeout_s / 2):
            grace_s = max(GRACE_S, int(self._join.flush_timeout_s / 2))  # the rest is written during the grace
        self.state = StoreState.LEAVING
        await self._call(lambda: self._segment.leave(0 if hurried.is_set() else grace_s), "leaving the pool")
        if not hurried.is_set():
            await self._wait_until_left(hurried, grace_s)
        await self._call(self._segment.forget_ssd, "leaving the pool")
        ssd.remove_note()
        contents = await asyncio.to_thread(ssd.contents)
        logger.info("left the pool; the SSD has %d pages (%.3g GB)", contents.num_pages, contents.num_bytes / _GB)

    async def _keeps_up(self, ssd: SsdFolder, hurried: asyncio.Event, timeout_s: float) -> bool:
        """Wait until the SSD writes with pauses: then it holds all pages but those of the last heartbeat. Returns False
        if it has written without a pause until now."""
        deadline_s = self._clock.now_s() + timeout_s
        seen, since_s = await asyncio.to_thread(ssd.contents), self._clock.now_s()
        while self._clock.now_s() < deadline_s and not hurried.is_set():
            await _sleep(hurried, PAUSE_S / 6)
            now = await asyncio.to_thread(ssd.contents)
            if now != seen:
                seen, since_s = now, self._clock.now_s()
            elif self._clock.now_s() - since_s > PAUSE_S:
                return True
        return False

    async def _wait_until_left(self, hurried: asyncio.Event, grace_s: float) -> None:
        """Wait until the master has ended the grace."""
        deadline_s = self._clock.now_s() + grace_s + CALL_TIMEOUT_S
        while self._clock.now_s() < deadline_s and not hurried.is_set():
            await self._check()
            if self._listed is None:
                return
            await _sleep(hurried, CHECK_INTERVAL_S / 10)

    async def _ask(self, question: Callable[[], T]) -> T:
        return await asyncio.to_thread(question)

    async def _call(self, call: Callable[[], T], doing: str) -> T:
        return await self._native.run(call, timeout_s=CALL_TIMEOUT_S, doing=doing)

    # ---- HTTP

    def problem(self) -> str:
        if self.state is StoreState.SERVING:
            return self._problem
        return f"{self.state.value}: {self._problem}" if self._problem else self.state.value

    def metrics(self) -> Iterable[Metric]:
        return store_families(
            StoreFigures(
                state=self.state.name.lower(),
                states=[one.name.lower() for one in StoreState],
                is_listed=self._listed is not None,
                memory_bytes=self._plan.num_bytes,
                memory_used_bytes=0 if self._listed is None else self._listed.allocator_used_bytes,
                ssd_limit_bytes=self._plan.ssd_bytes,
                ssd_bytes=self._contents.num_bytes,
                num_ssd_pages=self._contents.num_pages,
                num_removed_pages=0 if self._limit is None else self._limit.num_removed,
            )
        )

    async def more_metrics(self) -> bytes:
        if self._ssd is not None:
            self._contents = await asyncio.to_thread(self._ssd.contents)
        return b""

    def endpoints(self) -> Sequence[tuple[str, Endpoint, list[str]]]:
        return [("/drain", self._drain, ["GET"]), ("/drain", self._drain, ["POST", "DELETE"])]

    async def _drain(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST empties the store, GET returns the progress, DELETE ends the attempt: the store serves again."""
        del receive
        if scope["method"] == "DELETE" and self._emptying is not None:
            await self._emptying.cancel()
        if scope["method"] == "POST" and (self._emptying is None or self._emptying.has_failed):
            if self.state is not StoreState.SERVING or self._listed is None:
                raise Conflict(f"the store cannot be drained now: {self.problem()}")
            check_room(self._listed, await self._ask(self._admin.segments))
            self.state = StoreState.DRAINING
            self._emptying = Emptying(
                self._admin,
                self._listed,
                session=self._segment.session,
                move=self._moved,
                on_end=self._end_emptying,
                clock=self._clock,
            )
        progress = {} if self._emptying is None else self._emptying.progress()
        await send_json(send, {"state": self.state.name.lower(), "store": self._plan.name, **progress})

    async def _moved(self, pages: Sequence[HeldPage]) -> int:
        return await self._call(lambda: self._segment.move(pages), "moving pages")

    def _end_emptying(self, *, succeeded: bool) -> None:
        if self.state is StoreState.DRAINING:
            self.state = StoreState.DRAINED if succeeded else StoreState.SERVING


async def _connect(host: str, port: int) -> None:
    """Raises `OSError` unless something listens there."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError as error:
        raise ConnectionError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
    writer.close()


async def _sleep(hurried: asyncio.Event, duration_s: float) -> None:
    """Sleep, and end at once when hurried."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(duration_s):
            await hurried.wait()


def run_store(
    *,
    address: StoreAddress,
    keys: NodeKeyOptions,
    segment: SegmentOptions,
    join: JoinPoolOptions,
    instance_id: str | None,
    stop_with_stdin: bool,
) -> int:
    """Run the store until a stop is requested, then return 0. Raises `KvistError`."""
    network = Network(host=address.reachable_host, protocol=join.hicache_mooncake_protocol, devices=join.devices)
    if reason := obstacle(network, USER):
        raise ConfigError(reason)
    ssd = None if segment.ssd_path is None else SsdFolder(Path(segment.ssd_path))
    process = NodeProcess(
        server=keys.server(address.host, address.port),
        instance_id=instance_id,
        stop_with_stdin=stop_with_stdin,
        stop_s=join.flush_timeout_s + STOP_MARGIN_S,
    )

    made: list[StoreNode] = []

    def node_at(port: int) -> StoreNode:
        host, master_port = join.master()
        plan = SegmentPlan(
            name=f"{bracketed(network.host)}:{port}",
            network=network,
            master_addr=f"{bracketed(host)}:{master_port}",
            num_bytes=max(UNIT_BYTES, int(segment.segment_size * _GB) // UNIT_BYTES * UNIT_BYTES),
            ssd_path=segment.ssd_path,
            ssd_bytes=0 if ssd is None else ssd.capacity_bytes(segment.ssd_size),
            ssd_buffer_bytes=int(segment.ssd_buffer_size * _GB) // _MIB * _MIB,
        )
        made.append(StoreNode(plan=plan, ssd=ssd, join=join, api_key=keys.first_key))
        return made[0]

    status = run_node(process, node_at)
    if any(node.has_joined for node in made):
        # the library's threads take seconds to end, and have nothing left to do: a restart must not wait for them
        output_to(sys.stderr.fileno()).flush()
        os._exit(status)
    return status
