"""An engine without a model: uses the real protocol over real sockets and answers at once.

    engine = FakeEngine().start()          # its own thread; engine.channel.endpoint is its address
    engine.hold = True                     # requests are taken and not answered
    engine.stop()                          # as if the process died

One message a step goes to each gateway, with the next tokens of all its streams. Run as a module to measure a gateway
alone:

    python -m kvist.testing.fake_engine --port 31000 --tokens-per-message 4
"""

from __future__ import annotations

import argparse
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack, get_args

import msgspec

from kvist import wire
from kvist.channel import ChannelConfig, EngineChannel, Member
from kvist.clock import MonotonicClock
from kvist.request import EngineRequest, FinishReason, Mode, Outcome, RequestId, Role, WorkerId
from kvist.router.sent_together import submits_of
from kvist.testing.specs import LoadFields, make_load, make_roomy_spec

RECV_TIMEOUT_S = 0.05
CLUSTER_KEY = "the key of the fake engines"


TokenAt = Callable[[EngineRequest, int], int]  # request, position of the output token → its id


def counting_up(request: EngineRequest, position: int) -> int:
    """Return the first prompt token plus the position, so that each token shows its request and position."""
    return request.prompt_token_ids[0] + position


@dataclass
class _Stream:
    gateway: bytes
    submit: wire.Submit
    position: int
    end: int  # output tokens [position, end) are still to send

    def chunk(self, num_tokens: int, token_at: TokenAt) -> wire.TokenChunk:
        request = self.submit.request
        stop = min(self.end, self.position + num_tokens)
        chunk = wire.TokenChunk(
            request_id=request.request_id,
            position=self.position,
            token_ids=tuple(token_at(request, position) for position in range(self.position, stop)),
            finish_reason=FinishReason.LENGTH if stop == request.sampling.max_tokens else None,
            num_cached_tokens=0 if self.position == 0 else None,
        )
        self.position = stop
        return chunk


class _Pace:
    """Limits the steps to a number of tokens a second. After a pause, at most 50 ms of steps follow at once."""

    def __init__(self, max_tokens_per_s: float | None) -> None:
        self._max_tokens_per_s = max_tokens_per_s
        self._clock = MonotonicClock()
        self._next_step_s = self._clock.now_s()

    def wait_s(self) -> float:
        return 0.0 if self._max_tokens_per_s is None else max(0.0, self._next_step_s - self._clock.now_s())

    def begin(self, num_tokens: int) -> None:
        if self._max_tokens_per_s is not None:
            start_s = max(self._next_step_s, self._clock.now_s() - 0.05)
            self._next_step_s = start_s + num_tokens / self._max_tokens_per_s


_NO_PAGES = tuple(
    wire.TierSum(tier=tier, num_pages=0, xor=bytes(wire.DIGEST_BYTES)) for tier in get_args(wire.PageTier)
)


class FakeEngine:
    """Serves from its own thread between `start` and `stop`. A test may set the public fields meanwhile: `hold` leaves
    requests unanswered, `refusal` fails them, `silent` reads without answering, `stop_after` lets streams hang."""

    def __init__(
        self,
        *,
        spec: wire.EngineSpec | None = None,
        bind: str = "tcp://127.0.0.1:0",
        config: ChannelConfig | None = None,
        cluster_key: str = CLUSTER_KEY,
        tokens_per_message: int = 1,
        token_at: TokenAt = counting_up,
        max_tokens_per_s: float | None = None,
    ) -> None:
        """`tokens_per_message` is for each stream; `max_tokens_per_s` for all streams together."""
        spec = spec or make_roomy_spec()
        self.channel = EngineChannel(bind, member=Member(cluster_key), config=config)
        self.spec = msgspec.structs.replace(spec, endpoint=self.channel.endpoint)
        self.tokens_per_message = tokens_per_message
        self._token_at = token_at
        self._pace = _Pace(max_tokens_per_s)
        self.hold = False
        self.silent = False  # reads messages, sends none
        self.stop_after: int | None = None  # output tokens, then the stream hangs
        self.refusal: wire.Ended | None = None  # request_id is filled in
        self.submitted: list[wire.Submit] = []
        self.aborted: list[RequestId] = []
        self.num_listings = 0  # requests for all pages, which are answered with none
        self.gateways: dict[bytes, int] = {}  # address → sequence of the next page events
        self._streams: deque[_Stream] = deque()
        self._streams_that_hang: deque[_Stream] = deque()
        self._held: dict[RequestId, bytes] = {}
        self._reports: deque[wire.LoadReport] = deque()
        self._changes: deque[tuple[int, wire.TierChanges]] = deque()  # with the number of lost messages before it
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.run, daemon=True)

    def start(self) -> FakeEngine:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop as if the process died: without a last message."""
        self._stopping.set()
        self.channel.wakeup()
        if self._thread.is_alive():
            self._thread.join()
        self.channel.close()

    def report(self, **changes: Unpack[LoadFields]) -> None:
        """Send a load report to every gateway."""
        self._reports.append(make_load(**changes))
        self.channel.wakeup()

    def change_pages(self, changes: wire.TierChanges, *, num_lost: int = 0) -> None:
        """Send page events to every gateway, after messages that are lost."""
        self._changes.append((num_lost, changes))
        self.channel.wakeup()

    @property
    def num_hanging(self) -> int:
        """Number of streams that hang after `stop_after` tokens."""
        return len(self._streams_that_hang)

    def finish_streams(self) -> None:
        """Continue the streams that hang after `stop_after` tokens to their end."""
        self.stop_after = None
        for stream in self._streams_that_hang:
            stream.end = stream.submit.request.sampling.max_tokens
        self._streams.extend(self._streams_that_hang)
        self._streams_that_hang.clear()
        self.channel.wakeup()

    def run(self) -> None:
        while not self._stopping.is_set():
            for sender, message in self.channel.recv(self._pace.wait_s() if self._streams else RECV_TIMEOUT_S):
                self._handle(sender, message)
            while self._reports:
                report = self._reports.popleft()
                for gateway in list(self.gateways):
                    self._send_load(gateway, report)
            while self._changes:
                self._send_changes(*self._changes.popleft())
            if self._streams and not self._pace.wait_s():
                self._pace.begin(len(self._streams) * self.tokens_per_message)
                self._step()

    def _handle(self, sender: bytes, message: object) -> None:
        if self.silent:
            return
        if isinstance(message, wire.Hello):
            self.gateways.setdefault(sender, 0)
            self.channel.send(sender, wire.Welcome(spec=self.spec))
            self._send_load(sender, make_load())
        elif isinstance(message, wire.ListPages):
            self.num_listings += 1
            nothing = wire.ListedPages(tier="device", first_piece=message.first_piece)
            self._send_events(sender, wire.PageEvents(sequence=0, listed=(nothing,), sums=_NO_PAGES))
        elif isinstance(message, wire.Submit | wire.SubmitTogether):
            for submit in submits_of(message):
                self._take(sender, submit)
        elif isinstance(message, wire.Abort):
            self.aborted.append(message.request_id)
            self._streams = deque(s for s in self._streams if s.submit.request.request_id != message.request_id)
            if self._held.pop(message.request_id, None) is not None:
                ended = wire.Ended(request_id=message.request_id, outcome=Outcome.ABORTED)
                self.channel.send(sender, wire.StepOutputs(ended=(ended,)))
        elif isinstance(message, wire.FlushCache):
            self.channel.send(sender, wire.Flushed(call_id=message.call_id, num_pages=7))

    def _take(self, sender: bytes, submit: wire.Submit) -> None:
        self.submitted.append(submit)
        request = submit.request
        if self.refusal is not None:
            ended = msgspec.structs.replace(self.refusal, request_id=request.request_id)
            self.channel.send(sender, wire.StepOutputs(ended=(ended,)))
            return
        self._held[request.request_id] = sender
        if self.hold:
            return
        first = len(request.output_token_ids) + (submit.mode is Mode.DECODE)
        end = first + 1 if submit.mode is Mode.PREFILL else request.sampling.max_tokens
        self._streams.append(_Stream(sender, submit, first, end if self.stop_after is None else self.stop_after))

    def _step(self) -> None:
        """Send one message to each gateway, with the next tokens of each of its streams."""
        chunks: dict[bytes, list[wire.TokenChunk]] = {}
        ended: dict[bytes, list[wire.Ended]] = {}
        for stream in list(self._streams):
            if stream.position < stream.end:
                chunks.setdefault(stream.gateway, []).append(stream.chunk(self.tokens_per_message, self._token_at))
        for stream in [s for s in self._streams if s.position >= s.end]:
            self._streams.remove(stream)
            request_id = stream.submit.request.request_id
            if self.stop_after is not None:
                self._streams_that_hang.append(stream)
            else:
                self._held.pop(request_id, None)
                end = wire.Ended(request_id=request_id, outcome=Outcome.FINISHED)
                ended.setdefault(stream.gateway, []).append(end)
        for gateway in chunks.keys() | ended.keys():
            outputs = wire.StepOutputs(chunks=tuple(chunks.get(gateway, ())), ended=tuple(ended.get(gateway, ())))
            self._send(gateway, outputs)

    def _send(self, gateway: bytes, outputs: wire.StepOutputs) -> None:
        """Send, waiting for room in the queue, the only flow control here. Drop a gateway that stays full or is
        gone."""
        for _ in range(2_000):
            if self.channel.send(gateway, outputs):
                return
            if self._stopping.wait(0.001) or gateway not in self.gateways:
                break
        self.gateways.pop(gateway, None)
        self._streams = deque(s for s in self._streams if s.gateway != gateway)

    def _send_changes(self, num_lost: int, changes: wire.TierChanges) -> None:
        for gateway in list(self.gateways):
            self.gateways[gateway] += num_lost
            self._send_events(gateway, wire.PageEvents(sequence=0, changes=(changes,)))

    def _send_events(self, gateway: bytes, events: wire.PageEvents) -> None:
        """Send page events with the gateway's next sequence number."""
        self.channel.send(gateway, msgspec.structs.replace(events, sequence=self.gateways[gateway]))
        self.gateways[gateway] += 1

    def _send_load(self, gateway: bytes, report: wire.LoadReport) -> None:
        if not self.channel.send(gateway, report):
            del self.gateways[gateway]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="of the engine socket on 127.0.0.1; 0 chooses a free port")
    parser.add_argument("--role", type=Role, default=Role.UNIFIED, choices=tuple(Role))
    parser.add_argument("--tokens-per-message", type=int, default=1, help="tokens of one stream in one message")
    args = parser.parse_args()
    worker_id = WorkerId(f"fake:{args.port}")
    engine = FakeEngine(
        spec=make_roomy_spec(worker_id=worker_id, role=args.role),
        bind=f"tcp://127.0.0.1:{args.port}",
        tokens_per_message=args.tokens_per_message,
    )
    print(engine.channel.endpoint, flush=True)
    try:
        engine.run()
    except KeyboardInterrupt:
        engine.channel.close()


if __name__ == "__main__":
    main()
