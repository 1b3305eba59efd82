"""Turns messages from the socket into events for the scheduler, and answers messages that need no scheduler.

No message may end the engine: a request that cannot be computed is refused before it is in a batch with other requests.
At an engine of any role, the messages of both sides of a handoff become events: the scheduler also answers for a
handoff that it does not know.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvist import wire
from kvist.bounded_log import BoundedLog
from kvist.channel.engine import Inbound
from kvist.engine.gateways import MAX_GATEWAYS, ConnectedGateway, Gateways, PageReader
from kvist.engine.roles import RoleSwitch
from kvist.errors import HandoffFailed, KvistError, Overloaded, RequestError, Unavailable
from kvist.lease_messages import LeaseCommand
from kvist.plan.events import Event
from kvist.request import (
    CONSTRAINT_KINDS,
    MAX_BAD_WORDS,
    MAX_LEASE_TTL_S,
    MAX_LOGIT_BIAS,
    Outcome,
    RequestId,
    SamplingParams,
)
from kvist.scheduler.budget import MAX_STEP_LOGPROBS, num_logprobs_of

MAX_OPEN_CALLS = 1024
MAX_REQUEST_ID_CHARS = 1024
_MAX_SEED = 2**63 - 1
_MAX_FACTOR = 1e6  # logits multiplied or divided by a larger number leave the range of float32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    identity: bytes
    message: wire.Welcome | wire.StepOutputs | wire.StorageAnswer | wire.RoleAnswer


class Inbox:
    """Mutable; owned by the engine loop."""

    def __init__(
        self,
        *,
        spec: wire.EngineSpec,
        gateways: Gateways,
        roles: RoleSwitch,
        on_storage_command: Callable[[bytes, wire.StorageCommand], None] | None,  # None: no host tier
    ) -> None:
        self._spec = spec
        self._on_storage_command = on_storage_command
        self._gateways = gateways
        self._roles = roles
        self._calls: OrderedDict[str, bytes] = OrderedDict()  # that the scheduler answers: call id → gateway
        self._log = BoundedLog(logger)
        self.num_unexpected = 0  # messages with values that no engine may send
        self.draining = False  # new requests are refused

    def translate(self, received: Iterable[tuple[bytes, Inbound]], now_s: float) -> tuple[list[Event], list[Reply]]:
        """Return the events and the replies for the received messages, each from (identity, message)."""
        events: list[Event] = []
        replies: list[Reply] = []
        for identity, message in received:
            for part in message.submits if isinstance(message, wire.SubmitTogether) else (message,):
                translated = self._translate_one(identity, part, now_s)
                if isinstance(translated, Reply):
                    replies.append(translated)
                elif translated is not None:
                    events.append(translated)
        return events, replies

    def take_call(self, call_id: str) -> bytes | None:
        """Return the gateway that sent this call to the scheduler, and forget the call."""
        return self._calls.pop(call_id, None)

    def _translate_one(self, identity: bytes, message: Inbound, now_s: float) -> Event | Reply | None:
        match message:
            case (
                wire.Hello()
                | wire.ListPages()
                | wire.Submit()
                | wire.Abort()
                | wire.FlushCache()
                | wire.StorageCommand()
                | wire.SetRole()
                | LeaseCommand()
            ):
                gateway = self._gateways.note_contact(identity, now_s)
                if gateway is not None:
                    return self._from_gateway(gateway, message)
                if isinstance(message, wire.Submit):
                    error = Overloaded(f"this engine serves {MAX_GATEWAYS} gateways already")
                    return refusal(identity, message.request.request_id, error)
                return None
            case wire.Grant() | wire.Ack() | wire.Revoke():
                return message
            case wire.Done() | wire.Closed():
                return self._from_prefill(message)
            case wire.Ping() | wire.Pong() | wire.SubmitTogether():
                return None  # the loop answers a ping; `translate` has divided the others

    def _from_prefill(self, message: wire.SourceToTarget) -> Event:
        if isinstance(message, wire.Done) and not 0 <= message.first_token.token_id < self._spec.vocab_size:
            self.num_unexpected += 1
            # Closed, because no byte is written after Done either; the invalid token would fail a whole batch.
            return wire.Closed(
                handoff_id=message.handoff_id,
                target_epoch=message.target_epoch,
                source_epoch=message.source_epoch,
                error_code=HandoffFailed.code,
                message=f"prefill sent a first token outside the vocabulary of {self._spec.vocab_size}",
            )
        return message

    def _from_gateway(self, gateway: ConnectedGateway, message: wire.GatewayToEngine) -> Event | Reply | None:
        match message:
            case wire.Hello():
                gateway.known_role = message.known_role or self._spec.role
                return Reply(identity=gateway.identity, message=wire.Welcome(spec=self._spec))
            case wire.ListPages():
                gateway.pages = gateway.pages or PageReader()
                gateway.pages.wanted = message if message.first_piece >= 0 else None
                return None
            case wire.Submit():
                return self._submitted(gateway, message)
            case wire.Abort():
                return message if self._gateways.owner(message.request_id) == gateway.identity else None
            case wire.FlushCache() | LeaseCommand():
                if isinstance(message, LeaseCommand) and not is_lease_ttl(message.ttl_s):
                    self.num_unexpected += 1
                    return None
                while len(self._calls) >= MAX_OPEN_CALLS:
                    self._calls.popitem(last=False)
                self._calls[message.call_id] = gateway.identity
                return message
            case wire.StorageCommand():
                if self._on_storage_command is None:
                    return Reply(identity=gateway.identity, message=_no_host_tier(message))
                self._on_storage_command(gateway.identity, message)
                return None
            case wire.SubmitTogether():
                return None  # `translate` has divided it
            case wire.SetRole():
                return Reply(identity=gateway.identity, message=self._switched(message))

    def _switched(self, call: wire.SetRole) -> wire.RoleAnswer:
        try:
            self._roles.request(call.role)
        except KvistError as error:
            return wire.RoleAnswer(call_id=call.call_id, error_code=error.code, message=error.message)
        return wire.RoleAnswer(call_id=call.call_id)

    def _submitted(self, gateway: ConnectedGateway, submit: wire.Submit) -> Event | Reply:
        request = submit.request
        if self.draining:
            error: KvistError = Unavailable(
                "this worker is stopping: send the request to another worker", retry_after_s=1.0
            )
            return refusal(gateway.identity, request.request_id, error)
        problem = _find_invalid_field(submit, self._spec.vocab_size)
        if problem is not None:
            return refusal(gateway.identity, request.request_id, RequestError(problem))
        if not self._gateways.add_request(gateway, request.request_id):
            error = RequestError(f"the request id {request.request_id} is in use at this engine")
            return refusal(gateway.identity, request.request_id, error)
        return submit


def _find_invalid_field(submit: wire.Submit, vocab_size: int) -> str | None:
    """Return why the request would fail its whole batch; None if it would not. Gateways check each field first, under
    the name that the client uses."""
    request, sampling = submit.request, submit.request.sampling
    for token_ids in (request.prompt_token_ids, request.output_token_ids, *_named_token_ids(sampling)):
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            return f"a token id is outside the vocabulary of {vocab_size}"
    if sampling.constraint is not None and sampling.constraint.kind not in CONSTRAINT_KINDS:
        return (
            f"the kind of constraint {sampling.constraint.kind!r} is unknown: run the same version of Kvist everywhere"
        )
    if len(request.request_id) > MAX_REQUEST_ID_CHARS:
        return f"the request id has {len(request.request_id)} characters; at most {MAX_REQUEST_ID_CHARS} are allowed"
    num_logprobs, prompt_logprobs = sampling.num_logprobs, sampling.prompt_logprobs
    repetition = sampling.repetition_penalty
    wrong_bias = next((value for _, value in sampling.logit_bias if not -100 <= value <= 100), None)  # perhaps NaN
    kind = None if sampling.constraint is None else sampling.constraint.kind
    lease_id, ttl_s = ("", None) if request.lease is None else (request.lease.lease_id, request.lease.ttl_s)
    shortest = min(map(len, sampling.bad_words), default=1)
    num_tokens, num_left = request.num_prompt_tokens + len(request.output_token_ids), submit.num_uncomputed_tokens
    for name, value, allowed in (
        ("temperature", sampling.temperature, 0 <= sampling.temperature <= _MAX_FACTOR),
        ("top_k", sampling.top_k, 0 <= sampling.top_k < 2**31),
        ("top_p", sampling.top_p, 0 <= sampling.top_p <= 1),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1),
        ("seed", sampling.seed, 0 <= sampling.seed <= _MAX_SEED),
        ("min_tokens", sampling.min_tokens, sampling.min_tokens >= 0),
        ("max_tokens", sampling.max_tokens, sampling.max_tokens >= 0),
        ("num_logprobs", num_logprobs, num_logprobs is None or 0 <= num_logprobs <= vocab_size),
        ("prompt_logprobs", prompt_logprobs, prompt_logprobs is None or 0 <= prompt_logprobs <= vocab_size),
        ("prompt_logprobs_start", sampling.prompt_logprobs_start, sampling.prompt_logprobs_start >= 0),
        ("logprobs of a token", num_logprobs_of(sampling), num_logprobs_of(sampling) <= MAX_STEP_LOGPROBS),
        ("frequency_penalty", sampling.frequency_penalty, abs(sampling.frequency_penalty) <= 2),
        ("presence_penalty", sampling.presence_penalty, abs(sampling.presence_penalty) <= 2),
        ("repetition_penalty", repetition, 1 / _MAX_FACTOR <= repetition <= _MAX_FACTOR),
        ("the length of logit_bias", len(sampling.logit_bias), len(sampling.logit_bias) <= MAX_LOGIT_BIAS),
        ("a value of logit_bias", wrong_bias, wrong_bias is None),
        ("the number of bad_words", len(sampling.bad_words), len(sampling.bad_words) <= MAX_BAD_WORDS),
        ("num_shared_tokens", request.num_shared_tokens, request.num_shared_tokens >= 0),
        ("num_uncomputed_tokens", num_left, num_left is None or 0 <= num_left <= num_tokens),
        ("the length of a lease's id", len(lease_id), len(lease_id) <= MAX_REQUEST_ID_CHARS),
        ("the time of a lease", ttl_s, ttl_s is None or is_lease_ttl(ttl_s)),
        ("the kind of constraint", kind, kind is None or kind in CONSTRAINT_KINDS),
        ("the shortest of bad_words", shortest, shortest > 0),
    ):
        if not allowed:
            return f"{name} is {value}, which a gateway must not send: run the same version of Kvist everywhere"
    return None


def is_lease_ttl(ttl_s: float) -> bool:
    """Return whether a lease may have this time; False for NaN."""
    return 0.0 <= ttl_s <= MAX_LEASE_TTL_S


def _named_token_ids(sampling: SamplingParams) -> Iterator[Sequence[int]]:
    """Yield the token ids that the parameters name."""
    yield sampling.stop_token_ids
    yield sampling.allowed_token_ids
    yield sampling.logprob_token_ids
    yield [token_id for token_id, _ in sampling.logit_bias]
    yield from sampling.bad_words


def _no_host_tier(call: wire.StorageCommand) -> wire.StorageAnswer:
    error = RequestError(
        "a store needs a host tier, and this worker has none: start the worker with --enable-hierarchical-cache"
    )
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
