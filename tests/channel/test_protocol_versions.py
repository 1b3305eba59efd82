"""Processes of neighbouring protocol versions understand each other's messages."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import pytest

from kvist import protocol, wire
from kvist.request import EpochId, HandoffId, RequestId, SampledToken
from kvist.testing.specs import make_load, make_peer, make_peer_spec, make_request, make_spec, submit_decode

DONE = wire.Done(
    handoff_id=HandoffId("h"),
    target_epoch=EpochId("d"),
    source_epoch=EpochId("p"),
    num_pages=1,
    checksum="c",
    first_token=SampledToken(token_id=1),
    transport="shm",
)
GRANT = wire.Grant(
    handoff_id=HandoffId("h"),
    request_id=RequestId("r"),
    target_epoch=EpochId("d"),
    source_epoch=EpochId("p"),
    target=make_peer_spec(),
    first_page=0,
    page_ids=(1, 2),
)
SUBMIT = submit_decode(make_request(), handoff_id="h", prefill=make_peer("p", spec=make_peer_spec()))
WELCOME = wire.Welcome(spec=make_spec())
MESSAGES = (
    wire.Hello(gateway_id="g"),
    SUBMIT,
    GRANT,
    DONE,
    WELCOME,
    make_load(storage=None),
    wire.StepOutputs(chunks=(wire.TokenChunk(request_id=RequestId("r"), position=0, token_ids=(1,)),)),
)


def decoder_of(message: object) -> wire.Decoder:
    unions = (wire.ToEngine, wire.EngineToGateway, wire.SourceToTarget)
    [union] = [each for each in unions if type(message) in typing.get_args(each)]
    return wire.Decoder(union)


def with_new_fields(value: Any) -> Any:
    """Add a field that no version has to every object of an encoded message."""
    if isinstance(value, dict):
        return {
            **{key: with_new_fields(each) for key, each in value.items()},
            "field_of_a_newer_version": [1, {"a": 2}],
        }
    return [with_new_fields(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_fields_of_a_newer_version_are_ignored(message: Any) -> None:
    plain = msgspec.msgpack.decode(wire.encode(message))
    for key in ("num_host_pages", "totals"):  # maps, not objects
        plain.pop(key, None)
    newer = msgspec.msgpack.encode(with_new_fields(plain))
    assert decoder_of(message).decode(newer) == message


@pytest.mark.parametrize(
    ("message", "path", "missing"),
    [
        (DONE, (), "transport"),
        (SUBMIT, ("prefill",), "spec"),
        (WELCOME, ("spec",), "tokenizer_fingerprint"),
        (GRANT, ("target", "transports", 0), "same_host"),
    ],
)
def test_a_field_that_an_older_version_does_not_send_has_its_default(
    message: Any, path: tuple[str | int, ...], missing: str
) -> None:
    older = msgspec.msgpack.decode(wire.encode(message))
    holder = older
    for step in path:
        holder = holder[step]
    del holder[missing]
    decoded: Any = decoder_of(message).decode(msgspec.msgpack.encode(older))
    for step in path:
        decoded = decoded[step] if isinstance(step, int) else getattr(decoded, step)
    default = {field.name: field.default for field in msgspec.structs.fields(decoded)}[missing]
    assert getattr(decoded, missing) == default


def test_only_neighbouring_versions_work_together() -> None:
    first = protocol.OLDEST_PROTOCOL_VERSION
    assert protocol.interworks(first, first)
    assert protocol.interworks(first, first + 1)
    assert protocol.interworks(first + 2, first + 1)
    assert not protocol.interworks(first, first + 2)
    assert not protocol.interworks(first - 1, first)
