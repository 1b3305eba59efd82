"""Switches workers to the roles that balance.py decides (`--auto-balance`). One task beside the dispatcher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Protocol

from kvist import wire
from kvist.clock import Clock
from kvist.errors import KvistError
from kvist.request import WorkerId
from kvist.router.balance import BalancedWorker, BalanceRules, BalanceState, Shift, balance
from kvist.router.calls import FIRST_VERSIONS
from kvist.router.registry import Registry, WorkerState

CHECK_S = 0.5

logger = logging.getLogger(__name__)


class Switches(Protocol):
    """The dispatcher."""

    async def ask_worker(
        self, name: str | None, command: wire.Command, answer_type: type[wire.AnswerT]
    ) -> wire.AnswerT: ...


class Balancer:
    """Mutable; used in the gateway's event loop."""

    def __init__(self, registry: Registry, switches: Switches, rules: BalanceRules, clock: Clock) -> None:
        self._registry = registry
        self._switches = switches
        self._rules = rules
        self._clock = clock
        self._state = BalanceState()
        self._fixed: set[str] = set()  # epochs of workers that have refused a switch
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="balance of roles")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def check(self) -> None:
        """Decide once, and carry it out."""
        workers = list(self._workers())
        self._state, shift = balance(workers, self._state, self._rules, self._clock.now_s())
        if shift is not None:
            await self._carry_out(shift)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            await self.check()

    def _workers(self) -> Iterator[BalancedWorker]:
        for worker in self._registry.workers:
            spec, load, role = worker.spec, worker.load, worker.role
            if worker.state is not WorkerState.READY or spec is None or load is None:
                continue
            if role is None or spec.protocol_version < FIRST_VERSIONS[wire.SetRole] or spec.epoch in self._fixed:
                continue
            yield BalancedWorker(
                worker_id=spec.worker_id,
                role=role,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                queue_wait_s=load.queue_wait_s,
            )

    async def _carry_out(self, shift: Shift) -> None:
        logger.info(
            "requests wait %.1f s for %s: worker %s is switched to it", shift.wait_s, shift.role, shift.worker_id
        )
        try:
            answer = await self._switches.ask_worker(
                shift.worker_id, wire.SetRole(call_id="", role=shift.role), wire.RoleAnswer
            )
        except KvistError as error:  # lost or slow: the next decision is made from the reports
            logger.warning("worker %s was not switched: %s", shift.worker_id, error.message)
            return
        if answer.error_code is not None:
            logger.warning("worker %s keeps its role: %s", shift.worker_id, answer.message)
            self._fixed.update(self._epoch_of(shift.worker_id))

    def _epoch_of(self, worker_id: WorkerId) -> Iterator[str]:
        for worker in self._registry.workers:
            if worker.spec is not None and worker.spec.worker_id == worker_id:
                yield worker.spec.epoch
