"""Bad messages end neither an engine nor the link of a gateway."""

from __future__ import annotations

import logging
import math

import httpx
import msgspec
import pytest

from kvist import wire
from kvist.bounded_log import BoundedLog
from kvist.engine.gateways import Gateways
from kvist.engine.inbox import Inbox, Reply
from kvist.engine.messages import decode_line
from kvist.engine.roles import RoleSwitch
from kvist.errors import Unavailable, WireError
from kvist.kv.cache import PageCache
from kvist.request import (
    EpochId,
    HandoffId,
    Outcome,
    RequestId,
    Role,
    SampledToken,
)
from kvist.router.discovery import find_engine
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import make_peer_spec, make_pool, make_request, make_spec, submit_full

SPEC = make_spec()
HANDOFF, DECODE_EPOCH, PREFILL_EPOCH = HandoffId("h"), EpochId("d"), EpochId("p")
GRANT = wire.Grant(
    handoff_id=HANDOFF,
    request_id=RequestId("r"),
    target_epoch=DECODE_EPOCH,
    source_epoch=PREFILL_EPOCH,
    target=make_peer_spec(make_pool()),
    first_page=0,
    page_ids=(1,),
)
ACK = wire.Ack(handoff_id=HANDOFF, target_epoch=DECODE_EPOCH)
REVOKE = wire.Revoke(handoff_id=HANDOFF, target_epoch=DECODE_EPOCH, reason="")
CLOSED = wire.Closed(handoff_id=HANDOFF, target_epoch=DECODE_EPOCH, source_epoch=PREFILL_EPOCH)
DONE = wire.Done(
    handoff_id=HANDOFF,
    target_epoch=DECODE_EPOCH,
    source_epoch=PREFILL_EPOCH,
    num_pages=1,
    checksum="s",
    first_token=SampledToken(token_id=7),
)


def inbox_of(role: Role) -> Inbox:
    spec = msgspec.structs.replace(SPEC, role=role)
    return Inbox(
        spec=spec,
        gateways=Gateways(timeout_s=10.0, role=spec.role),
        roles=RoleSwitch(spec.role),
        on_storage_command=None,
    )


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\x82\xa4type\xa5Hello\xaagateway_id\xa1\xff", marks=pytest.mark.case("message-bad-utf8")),
        pytest.param(b"\x82\xa4type\xa5Hello\xa1x" + b"\x81\xa1a" * 1000, marks=pytest.mark.case("message-deep")),
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # a list of 4,294,967,295 items
        b"\x91" * 5000,
        b"\x82\xa4type\xa5Abort\xaarequest_id\xcf" + b"\xff" * 8,
        b"\x82\xa4type\xa7Unheard\xa1x\x01",
        msgspec.msgpack.encode({"type": "Hello", "gateway_id": 1}),
        msgspec.msgpack.encode({"type": "Submit", "request": [["request_id"]], "mode": "full"}),
    ],
)
def test_the_engine_drops_and_counts_undecodable_messages(payload: bytes) -> None:
    with pytest.raises(WireError, match="cannot decode"):  # both kinds of sockets count it
        wire.Decoder(wire.ToEngine).decode(payload)


@pytest.mark.parametrize("content", [b'{"engine": "\xff"}', b'{"x": ' + b"[" * 100_000, b"x" * ((16 << 20) + 1), b"{}"])
async def test_a_worker_url_with_an_invalid_answer_is_reported_and_retried(content: bytes) -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=content))
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(Unavailable, match="http://w:1"):
            await find_engine(client, "http://w:1", api_key=None, timeout_s=60.0, stalled_s=60.0)


async def test_the_error_of_a_gateway_named_as_a_worker_says_so() -> None:
    content = b'{"engine": null, "engine_health": null, "workers": [], "pairs": []}'
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=content))
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(Unavailable, match="http://w:1 has no engine: it is a gateway, not a worker"):
            await find_engine(client, "http://w:1", api_key=None, timeout_s=60.0, stalled_s=60.0)


@pytest.mark.parametrize(
    "line", [b'{"type": "Progress", "text": "\xff"}\n', b'{"type": "Ready", "x": ' + b"[" * 100_000]
)
def test_a_line_printed_by_a_library_is_not_parsed_as_an_engine_message(line: bytes) -> None:
    assert decode_line(line) is None


@pytest.mark.case("message-other-role")
@pytest.mark.parametrize("role", list(Role))
def test_an_engine_of_any_role_answers_for_a_handoff_that_it_does_not_know(role: Role) -> None:
    inbox = inbox_of(role)
    events, replies = inbox.translate([(b"peer", message) for message in (ACK, REVOKE, DONE, CLOSED)], 1.0)
    assert (len(events), replies, inbox.num_unexpected) == (4, [], 0)
    config = SchedulerConfig(max_running_requests=4, chunked_prefill_size=8, max_prefill_tokens=8, grant_timeout_s=5.0)
    pool = wire.PoolAddress(transport="t", location="p", num_pages=8, page_bytes=64, layout="l")
    cache = PageCache(num_pages=8, page_size=4, namespace="n")
    scheduler = build_scheduler(role, config, cache, PREFILL_EPOCH, make_peer_spec(pool))
    (sent,) = scheduler.step(1.0, events).messages
    assert isinstance(sent.message, wire.Closed)  # in answer to Revoke; the others need no answer
    grant = msgspec.structs.replace(GRANT, handoff_id=HandoffId("another"))
    assert scheduler.step(2.0, [grant]).messages == ()  # its request may still arrive
    (sent,) = scheduler.step(7.5, []).messages
    assert isinstance(sent.message, wire.Closed)
    assert sent.message.error_code == "handoff_failed"
    assert not scheduler.has_work()


@pytest.mark.case("message-bad-values")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("num_logprobs", -1),
        ("num_logprobs", 101),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 101),
        ("prompt_logprobs_start", -1),
        ("max_tokens", -1),
        ("logprob_token_ids", (100,)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 1.0), (2, math.nan))),
        ("frequency_penalty", math.nan),
        ("presence_penalty", 2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e300),
        ("temperature", 1e300),
        ("allowed_token_ids", (100,)),
        ("bad_words", ((1,), (2, 100))),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.5),
        ("top_k", -2),
        ("top_p", math.nan),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("min_tokens", -1),
        ("stop_token_ids", (100,)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_a_request_with_a_value_that_cannot_be_computed_is_refused_alone(name: str, value: object) -> None:
    good = make_request("good", (1, 2), max_tokens=2)
    sampling = msgspec.structs.replace(good.sampling, **{name: value})
    bad = msgspec.structs.replace(good, request_id=RequestId("bad"), sampling=sampling)
    sent = [submit_full(request) for request in (bad, good)]
    arrived = [wire.Decoder(wire.ToEngine).decode(wire.encode(submit)) for submit in sent]
    events, replies = inbox_of(Role.UNIFIED).translate([(b"gateway", message) for message in arrived], 1.0)  # type: ignore[misc]
    assert events == [sent[1]]
    (reply,) = replies
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, wire.StepOutputs)
    (ended,) = reply.message.ended
    assert (ended.request_id, ended.outcome, ended.error_code) == ("bad", Outcome.FAILED, "invalid_request")
    assert "token id" in ended.message or name in ended.message


@pytest.mark.parametrize("num_tokens", [-1, 4, 2**40])
def test_a_request_with_an_impossible_number_of_uncomputed_tokens_is_refused(num_tokens: int) -> None:
    """Such a number would make the queue look endless, or empty."""
    good = submit_full(make_request("r", (1, 2), max_tokens=2, output_token_ids=(3,)))
    inbox = inbox_of(Role.UNIFIED)
    bad = msgspec.structs.replace(good, num_uncomputed_tokens=num_tokens)
    events, (reply,) = inbox.translate([(b"gateway", bad)], 1.0)
    assert events == []
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, wire.StepOutputs)
    assert f"num_uncomputed_tokens is {num_tokens}, which a gateway must not send" in reply.message.ended[0].message
    most = msgspec.structs.replace(good, num_uncomputed_tokens=3)
    assert inbox.translate([(b"gateway", most)], 1.0)[0] == [most]


@pytest.mark.parametrize("token_id", [-1, 100, 2**40])
def test_a_first_token_outside_the_vocabulary_fails_its_handoff_alone(token_id: int) -> None:
    inbox = inbox_of(Role.DECODE)
    done = msgspec.structs.replace(DONE, first_token=SampledToken(token_id=token_id))
    (event,), _replies = inbox.translate([(b"tcp://p", done)], 1.0)
    assert isinstance(event, wire.Closed)  # as if prefill had closed the handoff: the request fails
    assert (event.handoff_id, event.source_epoch, event.error_code) == (HANDOFF, PREFILL_EPOCH, "handoff_failed")
    assert inbox.num_unexpected == 1


def test_the_bounded_log_limits_lines_per_period_and_counts_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock(100.0)
    log = BoundedLog(logging.getLogger("kvist.test"), max_lines=3, period_s=10.0, clock=clock)
    for number in range(1000):
        log.warning("bad message %d", number)
    assert [record.getMessage() for record in caplog.records] == [f"bad message {number}" for number in range(3)]
    caplog.clear()
    clock.advance(10.0)
    log.warning("one more")
    assert [record.getMessage() for record in caplog.records] == [
        "997 log lines like the next one were omitted",
        "one more",
    ]
