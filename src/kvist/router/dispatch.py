"""Sends requests to engines and returns one ordered stream of tokens for each.

Life of a request: route (route.py) → Submit to one engine, or to a prefill and a decode engine → merged chunks to the
reader (attempt.py) → exactly one end: the chunk with the finish reason, or an error. After any end, every engine that
has not sent Ended gets an Abort, so that no engine computes tokens without a reader.

The dispatcher runs as callbacks on one asyncio loop, without a task per request or per token. Each attempt has its own
request id at the engines: a retry, or an equal id of another gateway's client, cannot collide with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from kvist import wire
from kvist.bounded_log import BoundedLog
from kvist.clock import Clock
from kvist.errors import EngineError, KvistError, RequestError, Timeout, Unavailable, WorkerLost, error_from_wire
from kvist.fairness import caller_path
from kvist.metrics import Histogram
from kvist.plan.compat import peer_spec
from kvist.request import EngineRequest, HandoffId, Mode, Outcome, RequestId, WorkerId
from kvist.router.attempt import Attempt
from kvist.router.checks import checked_retry_after_s, fault_of_chunk, fault_of_prompt_logprobs
from kvist.router.config import RouterConfig
from kvist.router.fleet import EngineEvents
from kvist.router.handoff_ways import Way, WayCause
from kvist.router.merge import ChunkMerger
from kvist.router.policy import Reason
from kvist.router.registry import Registry, Worker, WorkerState
from kvist.router.route import Route, Router
from kvist.router.stream import Cancelled, ClusterSnapshot, StreamPart

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 30.0  # time limit for Ended after an Abort, which an engine handles between two steps


MAX_WAITING_LOGPROBS = 1 << 16  # limit of one stream: 5 MB waiting for its client


def _slow_reader() -> KvistError:
    return RequestError(
        f"the client reads its stream too slowly: more than {MAX_WAITING_LOGPROBS} logprobs are waiting. Read faster, "
        "or request fewer top logprobs",
        param="logprobs",
    )


class Engines(Protocol):
    """Interface to fleet.py; tests pass an implementation without sockets."""

    def start(self, events: EngineEvents) -> None: ...

    def send(self, worker: Worker, message: wire.GatewayToEngine) -> bool: ...

    async def close(self) -> None: ...


class _Call:
    """A call to several workers, with the answers received so far."""

    def __init__(self, workers: set[Worker]) -> None:
        self.waiting = workers
        self.answers: dict[WorkerId, wire.Answer] = {}
        self.done = asyncio.Event()

    def settle(self, worker: Worker, answer: wire.Answer | None) -> None:
        """Record the worker's answer; None if the worker cannot answer any more."""
        if worker in self.waiting:
            self.waiting.discard(worker)
            if answer is not None:
                self.answers[worker.worker_id] = answer
            if not self.waiting:
                self.done.set()


class Dispatcher:
    def __init__(self, *, config: RouterConfig, registry: Registry, engines: Engines, clock: Clock) -> None:
        self._config = config
        self._registry = registry
        self._engines = engines
        self._clock = clock
        self._router = Router(config, registry)
        self._log = BoundedLog(logger)
        self._attempts: dict[RequestId, Attempt] = {}
        self._calls: dict[str, _Call] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._num_cancelled_held = 0
        self._num_handoffs: Counter[tuple[Way, WayCause]] = Counter()
        self._num_routes = dict.fromkeys(Reason, 0)
        self._release_s = Histogram()  # from the reader's disconnect to the end at every engine

    async def start(self) -> None:
        """Start to connect to the workers. Returns at once; see `ready`."""
        self._engines.start(self)
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep_forever(), name="attempt sweeper")

    async def close(self) -> None:
        self.fail_all(Unavailable("the gateway is shutting down"))
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await self._engines.close()

    def fail_all(self, error: KvistError) -> None:
        """Fail every open request with this error."""
        for attempt in list(self._attempts.values()):
            self._fail(attempt, error, None)

    @property
    def num_open(self) -> int:
        """Number of requests that some worker has not ended yet."""
        return len(self._attempts)

    def ready(self) -> bool:
        """Return whether a unified worker, or a prefill and a decode worker that can hand over, are READY."""
        return self._router.can_serve()

    def model(self) -> wire.EngineSpec | None:
        """Return the spec shared by all READY workers, with the limits of the best route; None if no worker is
        ready."""
        return self._registry.reference()

    def snapshot(self) -> ClusterSnapshot:
        cancelled = Cancelled(num_held=self._num_cancelled_held, release_s=self._release_s)
        index = self._registry.index
        return ClusterSnapshot(
            workers=self._registry.snapshot(),
            cancelled=cancelled,
            num_routes=self._num_routes.copy(),
            num_index_entries=index.num_entries,
            num_index_bytes=index.num_bytes,
            handoffs=dict(self._num_handoffs),
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[StreamPart, None]:
        """Yield the output of the request. Closing or cancelling the iterator aborts the request at every engine.

        Raises, before the first part: `PromptTooLong`, `Unavailable`, `Overloaded`; at any time: the error that an
        engine reported, `WorkerLost`, `HandoffFailed`, `Timeout`. A request that fails before its first token is
        retried once on other workers."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._config.links.request_timeout_s
        attempt = self._launch(request, self._router.choose(request))
        may_retry, delivered = True, False
        while True:
            timer = loop.call_at(deadline_s, self._time_out, attempt)
            try:
                while (part := await attempt.next_part()) is not None:
                    delivered = True
                    yield part
                return
            except KvistError as error:
                route = self._retry_route(request, attempt, error) if may_retry and not delivered else None
                if route is None:
                    raise
                may_retry = False
                logger.info("request %s is tried again elsewhere: %s", request.request_id, error.message)
            finally:
                timer.cancel()
                self._on_reader_gone(attempt)
            attempt = self._launch(request, route)

    async def ask_workers(self, command: wire.Command, answer_type: type[wire.AnswerT]) -> dict[WorkerId, wire.AnswerT]:
        """Send the command, with a new `call_id`, to every worker. Return the answers of the workers that are not lost.

        Raises `Unavailable` if no worker is ready, `Timeout` naming the workers that did not answer."""
        workers = {w for w in self._registry.workers if w.state is WorkerState.READY}
        if not workers:
            raise Unavailable("no worker is ready")
        links = self._config.links
        timeout_s = links.storage_timeout_s if isinstance(command, wire.StorageCommand) else links.flush_timeout_s
        command = msgspec.structs.replace(command, call_id=secrets.token_hex(8))
        call = self._calls[command.call_id] = _Call(set(workers))
        try:
            for worker in workers:
                if not self._engines.send(worker, command):
                    call.settle(worker, None)
            await asyncio.wait_for(call.done.wait(), timeout_s)
        except TimeoutError as error:
            silent = ", ".join(sorted(w.worker_id for w in call.waiting))
            raise Timeout(f"{silent} did not answer in time ({len(call.answers)} workers did)") from error
        finally:
            del self._calls[command.call_id]
        return {worker_id: answer for worker_id, answer in call.answers.items() if isinstance(answer, answer_type)}

    # ---------------------------------------------------------------- messages of engines (fleet.EngineEvents)

    def on_outputs(self, worker: Worker, outputs: wire.StepOutputs) -> None:
        attempts = self._attempts
        assert worker.spec is not None
        vocab_size = worker.spec.vocab_size
        for chunk in outputs.chunks:
            attempt = attempts.get(chunk.request_id)
            if attempt is None or worker not in (attempt.prefill, attempt.decode):
                continue
            fault = fault_of_chunk(chunk, attempt.request.sampling, vocab_size=vocab_size)
            if chunk.prompt_logprobs and fault is None:
                num_known = attempt.merger.num_prompt_logprobs
                fault = fault_of_prompt_logprobs(chunk, attempt.request, num_known=num_known, vocab_size=vocab_size)
            if fault is not None:
                self._reject(worker, fault)
                self._fail(
                    attempt, EngineError(f"worker {worker.worker_id} sent {fault}; this is a bug in the worker"), worker
                )
                continue
            if chunk.handoff is not None and worker is attempt.decode:
                worker.meter.on_handoff(chunk.handoff)
            if chunk.token_ids:
                worker.prompt_done(chunk.request_id)
            attempt.push(worker, chunk)
            if attempt.merger.num_logprobs > MAX_WAITING_LOGPROBS:
                self._fail(attempt, _slow_reader(), None)
        for ended in outputs.ended:
            attempt = attempts.get(ended.request_id)
            if attempt is not None and worker in attempt.open:
                self._on_ended(attempt, worker, ended)

    def _reject(self, worker: Worker, fault: str) -> None:
        worker.num_rejected_messages += 1
        self._log.warning("rejected a message of worker %s: %s", worker.worker_id, fault)

    def on_answer(self, worker: Worker, answer: wire.Answer) -> None:
        call = self._calls.get(answer.call_id)
        if call is not None:
            call.settle(worker, answer)

    def on_lost(self, worker: Worker, reason: str) -> None:
        for call in self._calls.values():
            call.settle(worker, None)
        for request_id in list(worker.in_flight):
            attempt = self._attempts.get(request_id)
            worker.release(request_id)
            if attempt is None:
                continue
            attempt.open.discard(worker)
            if not self._continue(attempt, worker) and (
                worker is not attempt.prefill or worker is attempt.decode or not attempt.decode_began
            ):
                error = WorkerLost(f"worker {worker.worker_id} was lost while it had the request: {reason}")
                error.retry_after_s = self._config.links.retry_after_s
                self._fail(attempt, error, worker)
            self._forget_if_ended(attempt)

    def _on_ended(self, attempt: Attempt, worker: Worker, ended: wire.Ended) -> None:
        attempt.open.discard(worker)
        worker.release(attempt.request_id)
        needed = worker is attempt.decode or not attempt.decode_began
        attempt.stored = ended.stored or attempt.stored
        if ended.outcome is Outcome.FAILED and needed:
            error = error_from_wire(ended.error_code or EngineError.code, ended.message)
            error.retry_after_s = checked_retry_after_s(ended.retry_after_s)
            is_final = worker is attempt.decode and not error.retryable
            if is_final or not self._continue(attempt, worker):
                self._fail(attempt, error, worker)
        elif self._continue(attempt, worker):
            pass
        elif ended.outcome is Outcome.ABORTED and needed and not attempt.aborted:
            self._fail(attempt, Unavailable(f"worker {worker.worker_id} aborted the request: {ended.message}"), worker)
        elif not attempt.open and not attempt.settled:
            self._fail(attempt, EngineError("every engine ended the request before its last token arrived"), worker)
        self._forget_if_ended(attempt)

    # ---------------------------------------------------------------- the life of an attempt

    def _launch(self, request: EngineRequest, route: Route) -> Attempt:
        request_id = RequestId(f"{request.request_id}.{secrets.token_hex(4)}")
        merger = ChunkMerger(request.request_id, len(request.output_token_ids))
        attempt = Attempt(
            request_id=request_id,
            prefill=route.prefill,
            decode=route.decode,
            merger=merger,
            request=request,
            handoff=route.handoff,
            reason=route.reason,
            cost_ms=route.cost_ms,
        )
        self._num_routes[route.reason] += 1
        self._attempts[request_id] = attempt
        sent = msgspec.structs.replace(request, request_id=request_id)
        if route.mode is Mode.FULL:
            self._submit(
                attempt, route.prefill, route.num_prompt_tokens_left, wire.Submit(request=sent, mode=Mode.FULL)
            )
            return attempt
        if route.handoff is not None and route.handoff.way is not None:
            self._num_handoffs[route.handoff.way, route.handoff.cause] += 1
        if attempt.through_store:
            submit = wire.Submit(request=sent, mode=Mode.PREFILL, handoff="store")
            self._submit(attempt, route.prefill, route.num_prompt_tokens_left, submit)
            return attempt
        spec, target = route.prefill.spec, route.decode.spec
        assert spec is not None
        assert target is not None
        handoff_id = HandoffId(secrets.token_hex(8))
        peer = wire.PrefillPeer(
            worker_id=spec.worker_id, endpoint=route.prefill.endpoint, epoch=spec.epoch, spec=peer_spec(spec)
        )
        submit_decode = wire.Submit(request=sent, mode=Mode.DECODE, handoff_id=handoff_id, prefill=peer)
        submit_prefill = wire.Submit(request=sent, mode=Mode.PREFILL, handoff_id=handoff_id, target_epoch=target.epoch)
        self._submit(attempt, route.prefill, route.num_prompt_tokens_left, submit_prefill)
        if attempt.error is None:
            self._submit(attempt, route.decode, 0, submit_decode)
        return attempt

    def _continue(self, attempt: Attempt, ended: Worker) -> bool:
        """Send a request that is handed over through the store to its decode worker, or to another one if that worker
        is not ready or has failed. `ended` has ended or lost the request. Return False if the request cannot continue:
        it is handed over directly, has no token yet or has begun at decode, or no worker is left."""
        if not attempt.may_continue:
            return False
        first_ids = attempt.request.output_token_ids + attempt.first_token_ids
        request = msgspec.structs.replace(attempt.request, request_id=attempt.request_id, output_token_ids=first_ids)
        is_ready = attempt.decode.state is WorkerState.READY and attempt.decode is not ended
        chosen = attempt.decode if is_ready else self._router.choose_next(request, frozenset({ended, attempt.decode}))
        if chosen is None:
            return False
        attempt.decode = chosen
        attempt.num_continued += 1
        num_stored = 0 if attempt.stored is None else attempt.stored.num_stored
        assert chosen.spec is not None
        num_left = max(1, request.num_prompt_tokens + len(first_ids) - num_stored * chosen.spec.page_size)
        self._submit(attempt, chosen, num_left, wire.Submit(request=request, mode=Mode.FULL, handoff="store"))
        return True

    def _submit(self, attempt: Attempt, worker: Worker, num_tokens: int, submit: wire.Submit) -> None:
        if self._engines.send(worker, submit):
            attempt.open.add(worker)
            worker.take(attempt.request_id, num_tokens, caller_path(submit.request.client))
            if submit.mode is not Mode.DECODE:
                worker.coming.add(attempt.request_id, submit.request.prompt_token_ids, submit.request.cache_salt)
        else:
            self._fail(attempt, WorkerLost(f"worker {worker.worker_id} cannot be reached"), worker)

    def _fail(self, attempt: Attempt, error: KvistError, failed_worker: Worker | None) -> None:
        if not attempt.settled:
            attempt.fail(error, failed_worker)
            self._abort(attempt)

    def _time_out(self, attempt: Attempt) -> None:
        self._fail(attempt, Timeout("the request took longer than --request-timeout-s allows"), None)

    def _abort(self, attempt: Attempt) -> None:
        """Send Abort to every engine that still has the request; each answers with Ended, or is lost."""
        attempt.aborted = True
        for worker in attempt.open:
            self._engines.send(worker, wire.Abort(request_id=attempt.request_id))

    def _on_reader_gone(self, attempt: Attempt) -> None:
        """Handle the end of the reader: after the last part, on an error, or by a disconnect."""
        if not attempt.settled:
            attempt.cancelled = True
            self._num_cancelled_held += 1
            self._abort(attempt)
        attempt.closed_at_s = self._clock.now_s()
        self._forget_if_ended(attempt)

    def _forget_if_ended(self, attempt: Attempt) -> None:
        if attempt.open or attempt.closed_at_s is None or self._attempts.pop(attempt.request_id, None) is None:
            return
        if attempt.cancelled:
            self._num_cancelled_held -= 1
            self._release_s.observe(self._clock.now_s() - attempt.closed_at_s)

    def _retry_route(self, request: EngineRequest, attempt: Attempt, error: KvistError) -> Route | None:
        """Choose other workers for a request without delivered output; None if the error should reach the client."""
        if not error.retryable or attempt.failed_worker is None:
            return None
        try:
            return self._router.choose(request, frozenset({attempt.failed_worker}))
        except KvistError:  # report the first error, which is more specific
            return None

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.links.keepalive_s)
            self.sweep()

    def sweep(self) -> None:
        """Give up requests whose engine has not sent Ended `END_TIMEOUT_S` after the reader's end: the message was
        lost."""
        oldest_s = self._clock.now_s() - END_TIMEOUT_S
        for attempt in list(self._attempts.values()):
            if attempt.closed_at_s is None or attempt.closed_at_s > oldest_s:
                continue
            for worker in list(attempt.open):
                logger.warning(
                    "given up: worker %s did not confirm the end of request %s", worker.worker_id, attempt.request_id
                )
                self._engines.send(worker, wire.Abort(request_id=attempt.request_id))
                worker.release(attempt.request_id)
            attempt.open.clear()
            self._forget_if_ended(attempt)
