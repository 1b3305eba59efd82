"""Turns what arrived on the socket into events for the scheduler, and answers at once what needs no scheduler."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvist import wire
from kvist.channel.engine import Inbound
from kvist.errors import KvistError, Overloaded, RequestError, Unavailable
from kvist.request import Outcome, RequestId
from kvist.scheduler.events import Event
from kvist.worker.gateways import MAX_GATEWAYS, Gateway, Gateways

MAX_OPEN_FLUSHES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    identity: bytes
    message: wire.Welcome | wire.StepOutputs | wire.StorageAnswer


class Inbox:
    """Mutable; owned by the engine loop."""

    def __init__(
        self,
        *,
        spec: wire.EngineSpec,
        gateways: Gateways,
        ask_storage: Callable[[bytes, wire.AskStorage], None] | None,  # None: there is no host tier
    ) -> None:
        self._spec = spec
        self._ask_storage = ask_storage
        self._gateways = gateways
        self._flushes: OrderedDict[str, bytes] = OrderedDict()  # call id → who asked
        self.draining = False  # new requests are refused

    def open(self, received: Iterable[tuple[bytes, Inbound]], now_s: float) -> tuple[list[Event], list[Reply]]:
        events: list[Event] = []
        replies: list[Reply] = []
        for identity, message in received:
            opened = self._open_one(identity, message, now_s)
            if isinstance(opened, Reply):
                replies.append(opened)
            elif opened is not None:
                events.append(opened)
        return events, replies

    def take_flush(self, call_id: str) -> bytes | None:
        """Who asked for this flush; once."""
        return self._flushes.pop(call_id, None)

    def _open_one(self, identity: bytes, message: Inbound, now_s: float) -> Event | Reply | None:
        match message:
            case wire.Hello() | wire.Submit() | wire.Abort() | wire.FlushCache() | wire.AskStorage():
                gateway = self._gateways.heard(identity, now_s)
                if gateway is not None:
                    return self._from_gateway(gateway, message)
                if isinstance(message, wire.Submit):
                    error = Overloaded(f"this engine serves {MAX_GATEWAYS} gateways already")
                    return refusal(identity, message.request.request_id, error)
                return None
            case _:
                return message  # between engines: the scheduler's as it is

    def _from_gateway(self, gateway: Gateway, message: wire.GatewayToEngine) -> Event | Reply | None:
        match message:
            case wire.Hello():
                gateway.wants_snapshot = gateway.wants_snapshot or message.resync
                return Reply(identity=gateway.identity, message=wire.Welcome(spec=self._spec))
            case wire.Submit():
                return self._submitted(gateway, message)
            case wire.Abort():
                return message if self._gateways.owner(message.request_id) == gateway.identity else None
            case wire.FlushCache():
                while len(self._flushes) >= MAX_OPEN_FLUSHES:
                    self._flushes.popitem(last=False)
                self._flushes[message.call_id] = gateway.identity
                return message
            case wire.AskStorage():
                if self._ask_storage is None:
                    return Reply(identity=gateway.identity, message=_no_host_tier(message))
                self._ask_storage(gateway.identity, message)
                return None

    def _submitted(self, gateway: Gateway, submit: wire.Submit) -> Event | Reply:
        request = submit.request
        if self.draining:
            error: KvistError = Unavailable("this worker is stopping: send the request to another", retry_after_s=1.0)
            return refusal(gateway.identity, request.request_id, error)
        for token_ids in (request.prompt_token_ids, request.output_token_ids, request.sampling.stop_token_ids):
            # One id outside the vocabulary would fail the whole batch it is computed in.
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._spec.vocab_size:
                error = RequestError(f"a token id is outside the vocabulary of {self._spec.vocab_size}")
                return refusal(gateway.identity, request.request_id, error)
        if not self._gateways.add_request(gateway, request.request_id):
            error = RequestError(f"the request id {request.request_id} is in use at this engine")
            return refusal(gateway.identity, request.request_id, error)
        return submit


def _no_host_tier(call: wire.AskStorage) -> wire.StorageAnswer:
    error = RequestError("this worker has no host tier for a store to stand behind: add --enable-hierarchical-cache")
    return wire.StorageAnswer(call_id=call.call_id, error_code=error.code, message=error.message)


def refusal(identity: bytes, request_id: RequestId, error: KvistError) -> Reply:
    ended = wire.Ended(
        request_id=request_id,
        outcome=Outcome.FAILED,
        error_code=error.code,
        message=error.message,
        retry_after_s=error.retry_after_s,
    )
    return Reply(identity=identity, message=wire.StepOutputs(ended=(ended,)))
