"""A simulated cluster: engines (engine.py), a gateway that records what it gets, and wires with faults.

    world = SimCluster()
    prefill, decode = world.start("p", role=Role.PREFILL), world.start("d", role=Role.DECODE)
    world.submit_pair(sim_request("r", [1, 2, 3]), prefill, decode)
    world.settle()             # deliver, compute and copy until no work is left
    world.check_settled()      # every request has ended, with the tokens of an undisturbed engine; nothing leaks
    world.stream("r")          # its tokens and finish reason

A test that looks for faults delivers messages and advances engines itself, in any order, kills engines and breaks
connections, before it settles. There are no threads, sockets and clocks: `now_s` is a number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

from kvist.plan.events import Event
from kvist.plan.plan import Plan
from kvist.plan.transfers import ToSource
from kvist.request import EngineRequest, FinishReason, HandoffId, Mode, Outcome, RequestId, TokenLogprobs
from kvist.simulation.device import Page, reference_scores, reference_stream
from kvist.simulation.engine import ShapeFields, SimEngine, SimShape
from kvist.simulation.lossy_wires import LossyWires, Wire
from kvist.testing.specs import RequestFields, make_peer, make_request, submit_decode, submit_full, submit_prefill
from kvist.wire import Abort, Ack, Closed, Done, Ended, Grant, Revoke, Submit, TokenChunk

GATEWAY = "gateway"


@dataclass
class Submitted:
    request: EngineRequest
    engines: list[tuple[SimEngine, Mode]]
    aborted: bool = False


class SimCluster:
    """Engines, one gateway that records messages, and the wires between them. Mutable; owned by one test."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.engines: dict[str, SimEngine] = {}  # by name, also the endpoint
        self.by_epoch: dict[str, SimEngine] = {}  # alive
        self.stored: dict[bytes, Page] = {}  # by digest, in the shared store
        self.wires: LossyWires[Event] = LossyWires()
        self.chunks: dict[str, list[tuple[str, TokenChunk]]] = defaultdict(list)  # request → (epoch, chunk)
        self.ended: dict[tuple[str, str], list[Ended]] = defaultdict(list)  # (request, epoch)
        self.stages_s: defaultdict[tuple[str, str], float] = defaultdict(float)  # (request, epoch): the sum so far
        self.submitted: dict[str, Submitted] = {}
        self._lives: Counter[str] = Counter()

    # ---------------------------------------------------------------- processes

    def start(self, name: str, **shape: Unpack[ShapeFields]) -> SimEngine:
        """Start an engine process at the address `name`."""
        return self._start(name, SimShape(**shape))

    def _start(self, name: str, shape: SimShape) -> SimEngine:
        self._lives[name] += 1
        engine = SimEngine(self, name, self._lives[name], shape)
        self.engines[name] = engine
        self.by_epoch[engine.epoch] = engine
        return engine

    def forget(self, engine: SimEngine, *, host: bool) -> None:
        """Evict all cached pages from the device pool, and with `host` from the host tier too."""
        engine.cache.evict(engine.cache.counts().evictable)
        if host and engine.host is not None:
            engine.host.flush()

    def kill(self, engine: SimEngine) -> SimEngine:
        """Kill the engine and its unsent messages; start a new process at the same address."""
        del self.by_epoch[engine.epoch]
        self.wires.cut(engine.epoch)
        return self._start(engine.name, engine.shape)

    def break_connection(self, engine: SimEngine) -> None:
        """Lose the engine's messages on the way to other engines; both sides survive and reconnect."""
        self.wires.cut(engine.epoch, keep={GATEWAY})

    # ---------------------------------------------------------------- messages

    def submit(self, request: EngineRequest, engine: SimEngine) -> None:
        """Submit a whole request (FULL)."""
        self.submitted[request.request_id] = Submitted(request, [(engine, Mode.FULL)])
        self.wires.send(GATEWAY, engine.name, submit_full(request))

    def submit_pair(self, request: EngineRequest, prefill: SimEngine, decode: SimEngine) -> HandoffId:
        handoff_id = HandoffId(f"h-{request.request_id}")
        self.submitted[request.request_id] = Submitted(request, [(prefill, Mode.PREFILL), (decode, Mode.DECODE)])
        to_prefill = submit_prefill(request, handoff_id=handoff_id, target_epoch=decode.epoch)
        peer = make_peer(prefill.epoch, endpoint=prefill.name, spec=prefill.as_peer)
        self.wires.send(GATEWAY, prefill.name, to_prefill)
        self.wires.send(GATEWAY, decode.name, submit_decode(request, handoff_id=handoff_id, prefill=peer))
        return handoff_id

    def abort(self, request_id: str, only: SimEngine | None = None) -> None:
        submitted = self.submitted[request_id]
        submitted.aborted = True
        for engine, _ in submitted.engines:
            if only is None or engine is only:
                self.wires.send(GATEWAY, engine.name, Abort(request_id=RequestId(request_id)))

    def _check_stages(self, engine: SimEngine, chunk: TokenChunk) -> None:
        """Check that the stages of a request cover its time at the engine, up to this chunk."""
        key, request = (chunk.request_id, engine.epoch), engine.scheduler.requests.live.get(chunk.request_id)
        self.stages_s[key] += sum(part.duration_s for part in chunk.stages)
        if request is not None and (chunk.stages or not chunk.position):  # else it has ended, or decodes
            until_s = self.now_s if chunk.stages else request.arrived_s
            assert abs(self.stages_s[key] - (until_s - request.arrived_s)) < 1e-6, (chunk, request.arrived_s)

    def receive(self, engine: SimEngine, plan: Plan) -> None:
        for chunk in plan.chunks:
            from_below = chunk.num_cached_host_tokens + chunk.num_cached_storage_tokens
            assert 0 <= from_below <= (chunk.num_cached_tokens or 0)
            self.chunks[chunk.request_id].append((engine.epoch, chunk))
            self._check_stages(engine, chunk)
        for ended in plan.ended:
            self.ended[ended.request_id, engine.epoch].append(ended)
            assert len(self.ended[ended.request_id, engine.epoch]) == 1, "a request ends once at one engine"
            if ended.error_code in ("timeout", "overloaded"):
                began = any(chunk.token_ids for _, chunk in self.chunks[ended.request_id])
                assert not began, "a queue ended a stream that had begun"
        for sent in plan.messages:
            message = sent.message
            if isinstance(sent, ToSource):
                assert isinstance(message, Grant | Ack | Revoke)
                self.wires.send(engine.epoch, sent.endpoint, message)
            else:
                assert message.target_epoch == sent.target_epoch
                assert isinstance(message, Done | Closed)
                self.wires.send(engine.epoch, sent.target_epoch, message)

    def deliver(self, wire: Wire, *, twice: bool = False) -> None:
        """Deliver the oldest message of the wire: to the process that lives at the address, or to an epoch. With
        `twice`, a message between engines arrives once more: a Grant at once, since no wire that keeps the order could
        deliver it after a Revoke, and any other message after those that follow it."""
        event = self.wires.take(wire)
        if event is None:
            return
        if twice and wire[0] != GATEWAY:
            self.wires.repeat(wire, event, at_once=isinstance(event, Grant))
        target = self.engines.get(wire[1]) or self.by_epoch.get(wire[1])
        if target is None:
            return
        if isinstance(event, Submit):
            submitted = self.submitted[event.request.request_id]
            # A new process at the address received the message of the old one: the new process must answer.
            submitted.engines = [
                (target if engine.name == target.name else engine, mode) for engine, mode in submitted.engines
            ]
        target.events.append(event)

    # ---------------------------------------------------------------- time

    def settle(self, max_rounds: int = 4000, dt_s: float = 0.05) -> None:
        """Run all engines and wires until no work is left."""
        for _ in range(max_rounds):
            for wire in list(self.wires):
                while self.wires.num_waiting(wire):
                    self.deliver(wire)
            for engine in list(self.by_epoch.values()):
                engine.transport.advance()
                engine.mover.advance()
                if engine.store is not None:
                    engine.store.advance()
                if len(engine.under_way) == 1 and engine.config.overlap:
                    engine.step()  # like the engine's loop: start the next batch before the result of this one is read
                engine.finish_step()
                engine.step()
            self.now_s += dt_s
            if self.quiet():
                return
        raise AssertionError(
            f"not quiet after {max_rounds} rounds: {[e.scheduler.status() for e in self.by_epoch.values()]}"
        )

    def quiet(self) -> bool:
        return not self.wires.waiting() and not any(
            engine.scheduler.has_work()
            or engine.events
            or engine.under_way
            or engine.transport.busy
            or engine.mover.busy
            or (engine.store is not None and engine.store.busy)
            for engine in self.by_epoch.values()
        )

    # ---------------------------------------------------------------- promises

    def check_settled(self) -> None:
        for engine in self.by_epoch.values():
            counts = engine.scheduler.status().pages
            assert counts.owned == 0, f"{engine.epoch} leaks owned pages"
            assert counts.in_flight == 0, f"{engine.epoch} leaks pages in flight"
            num_leased = engine.scheduler.status().leases.num_pages
            assert counts.evictable + num_leased == counts.cached, f"{engine.epoch} leaks pins"
            host = engine.cache.host_counts()
            hung = [] if engine.store is None else engine.store.slots
            assert host is None or host.in_flight == len({slot for _, slot in hung}), f"{engine.epoch} leaks host pages"
            if (storage := engine.cache.storage) is not None:
                assert storage.num_reserved == sum(is_written for is_written, _ in hung), (
                    f"{engine.epoch} leaks its share"
                )
                assert not storage.open_prefetches, f"{engine.epoch} leaks prefetches"
            assert engine.scheduler.requests.slots.num_taken == 0, f"{engine.epoch} leaks slots"
            assert engine.scheduler.status().num_running == engine.scheduler.status().num_waiting == 0
        for request_id, submitted in self.submitted.items():
            for engine, _ in submitted.engines:
                if engine.epoch in self.by_epoch:
                    assert len(self.ended[request_id, engine.epoch]) == 1, f"{request_id} never ended at {engine.epoch}"
            self._check_stream(request_id, submitted)

    def outcome(self, request_id: str, engine: SimEngine) -> Outcome:
        (ended,) = self.ended[request_id, engine.epoch]
        return ended.outcome

    def stream(self, request_id: str) -> tuple[list[int], FinishReason | None]:
        """Merge the chunks by position, as the gateway does."""
        request = self.submitted[request_id].request
        tokens: dict[int, int] = {}
        finish = None
        for _, chunk in self.chunks[request_id]:
            for offset, token_id in enumerate(chunk.token_ids):
                position = chunk.position + offset
                assert tokens.setdefault(position, token_id) == token_id, f"{request_id}: two tokens at {position}"
            finish = finish or chunk.finish_reason
        first = len(request.output_token_ids)
        assert set(tokens) == set(range(first, first + len(tokens))), f"{request_id}: a gap in {sorted(tokens)}"
        return [*request.output_token_ids, *(tokens[position] for position in sorted(tokens))], finish

    def _check_stream(self, request_id: str, submitted: Submitted) -> None:
        engine = submitted.engines[-1][0]
        expected, reason = reference_stream(submitted.request, engine.config, engine.context_len)
        tokens, finish = self.stream(request_id)
        assert tokens == expected[: len(tokens)], f"{request_id}: {tokens} is not a prefix of {expected}"
        # each engine sends each position once
        sent = Counter((epoch, chunk.position) for epoch, chunk in self.chunks[request_id] if chunk.token_ids)
        assert all(times == 1 for times in sent.values()), f"{request_id}: sent twice: {sent}"
        finished = all(
            self.ended[request_id, other.epoch] and self.outcome(request_id, other) is Outcome.FINISHED
            for other, mode in submitted.engines
            if mode is not Mode.PREFILL
        )
        if finished:
            assert tokens == expected
            assert finish is reason
        self._check_scores(request_id, submitted.request, finished=finished)

    def _check_scores(self, request_id: str, request: EngineRequest, *, finished: bool) -> None:
        """Each engine reports each scored position once, in order, before its first token."""
        expected, first = reference_scores(request), max(1, request.sampling.prompt_logprobs_start)
        for epoch in {epoch for epoch, _ in self.chunks[request_id]}:
            chunks = [chunk for other, chunk in self.chunks[request_id] if other == epoch]
            found: list[TokenLogprobs] = []
            for chunk in chunks:
                if chunk.prompt_logprobs:
                    assert chunk.prompt_position == first + len(found), f"{request_id}: scores twice or out of order"
                    assert (chunk.token_ids, chunk.finish_reason) == ((), None)
                found += chunk.prompt_logprobs
                if chunk.position == 0 and (chunk.token_ids or chunk.finish_reason is not None):
                    assert len(found) == len(expected), f"{request_id}: a token before the scores"
            assert found == expected[: len(found)]
        num_sent = sum(len(chunk.prompt_logprobs) for _, chunk in self.chunks[request_id])
        assert num_sent >= len(expected) or not finished


def sim_request(request_id: str, prompt: Sequence[int], **fields: Unpack[RequestFields]) -> EngineRequest:
    """Return a request of six tokens with seed 1 and these changes."""
    chosen: RequestFields = {"max_tokens": 6, "seed": 1, **fields}
    return make_request(request_id, prompt, **chosen)
