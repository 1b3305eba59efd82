"""Builders of the values that a gateway and an engine exchange: valid defaults, and the fields that a test changes.

The fields of each builder are those of the struct that it returns; tests/testing/test_specs.py checks this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

import msgspec

from kvist import wire
from kvist.lease_messages import LeaseCounts
from kvist.plan.compat import peer_spec
from kvist.request import (
    Constraint,
    EngineRequest,
    EpochId,
    HandoffId,
    LeaseTerms,
    Mode,
    RequestId,
    Role,
    SamplingParams,
    WorkerId,
)


class SpecFields(TypedDict, total=False):
    """The fields of `wire.EngineSpec`."""

    worker_id: str
    epoch: str
    role: Role
    endpoint: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    model_name: str
    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    num_host_pages: int
    namespace: str
    dtype: str
    tp_size: int
    max_running_requests: int
    max_queued_requests: int
    writes_alone: bool
    scheduling_policy: str
    protocol_version: int
    request_fields: tuple[str, ...]
    layout: str
    page_bytes: int
    host_id: str
    transports: tuple[wire.PoolAddress, ...]


_POOL = wire.PoolAddress(transport="shm", location="/x", num_pages=4, page_bytes=64, layout="l")
_SPEC = wire.EngineSpec(
    worker_id=WorkerId("w"),
    epoch=EpochId("e"),
    role=Role.UNIFIED,
    endpoint="tcp://127.0.0.1:1",
    model_fingerprint="f",
    model_name="m",
    vocab_size=100,
    max_model_len=64,
    page_size=16,
    num_pages=4,
    num_host_pages=4,
    namespace="n",
    dtype="float32",
    tp_size=1,
    max_running_requests=4,
    max_queued_requests=4,
    layout="l",
    page_bytes=64,
    host_id="h",
    transports=(_POOL,),
)


def make_spec(**changes: Unpack[SpecFields]) -> wire.EngineSpec:
    """Return the spec of a small unified engine with these changes."""
    return msgspec.structs.replace(_SPEC, **changes)


_ROOMY_SPEC = make_spec(
    vocab_size=1 << 20,
    max_model_len=1 << 20,
    num_pages=1 << 16,
    num_host_pages=1 << 16,
    max_running_requests=1 << 16,
    max_queued_requests=1 << 16,
)


def make_roomy_spec(**changes: Unpack[SpecFields]) -> wire.EngineSpec:
    """Return the spec of an engine with limits that no test reaches, with these changes."""
    return msgspec.structs.replace(_ROOMY_SPEC, **changes)


class LoadFields(TypedDict, total=False):
    """The fields of `wire.LoadReport`."""

    num_running: int
    num_waiting: int
    num_free_pages: int
    num_cached_pages: int
    num_owned_pages: int
    num_in_flight_pages: int
    leases: LeaseCounts
    service_s: float | None
    queue_wait_s: float | None
    num_host_pages: dict[str, int]
    storage: wire.StorageStatus | None
    draining: bool
    role: Role | None
    earlier_roles: tuple[Role, ...]
    totals: dict[str, float]


_LOAD = wire.LoadReport(
    num_running=0,
    num_waiting=0,
    num_free_pages=0,
    num_cached_pages=0,
    num_owned_pages=0,
    num_in_flight_pages=0,
)


def make_load(**changes: Unpack[LoadFields]) -> wire.LoadReport:
    """Return the load report of an engine without requests and pages, with these changes."""
    return msgspec.structs.replace(_LOAD, **changes)


class PoolFields(TypedDict, total=False):
    """The fields of `wire.PoolAddress`."""

    transport: str
    location: str
    num_pages: int
    page_bytes: int
    layout: str
    device: str
    from_devices: tuple[str, ...]
    same_host: bool
    parts: tuple[wire.PoolPart, ...]


def make_pool(**changes: Unpack[PoolFields]) -> wire.PoolAddress:
    """Return the address of a pool of four small pages, with these changes."""
    return msgspec.structs.replace(_POOL, **changes)


def make_peer_spec(*pools: wire.PoolAddress, **changes: Unpack[SpecFields]) -> wire.PeerSpec:
    """Return the spec of an engine as its peers see it: with these pools, if any, and their layout."""
    found = make_spec(**changes)
    if pools:
        found = msgspec.structs.replace(found, transports=pools, layout=pools[0].layout, page_bytes=pools[0].page_bytes)
    return peer_spec(found)


class SamplingFields(TypedDict, total=False):
    """The fields of `request.SamplingParams`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    num_logprobs: int | None
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    prompt_logprobs: int | None
    prompt_logprobs_start: int
    logprob_token_ids: tuple[int, ...]
    constraint: Constraint | None


class RequestFields(SamplingFields, total=False):
    """The fields of `request.EngineRequest`, except the id and the prompt, and those of its sampling parameters."""

    output_token_ids: tuple[int, ...]
    cache_salt: str
    priority: int
    client: str
    background: bool
    num_shared_tokens: int
    lease: LeaseTerms | None


_SAMPLING = SamplingParams(max_tokens=4)
_REQUEST = EngineRequest(request_id=RequestId("r"), prompt_token_ids=(1, 2, 3), sampling=_SAMPLING)


def make_request(
    request_id: str = "r", prompt_token_ids: Sequence[int] = (1, 2, 3), **fields: Unpack[RequestFields]
) -> EngineRequest:
    """Return a request. `max_tokens` is 4 unless it is given; all other defaults are the request's own."""
    of_sampling = {name: value for name, value in fields.items() if name in SamplingFields.__annotations__}
    of_request = {name: value for name, value in fields.items() if name not in of_sampling}
    return msgspec.structs.replace(
        _REQUEST,
        request_id=RequestId(request_id),
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=msgspec.structs.replace(_SAMPLING, **of_sampling),
        **of_request,
    )


def submit_full(request: EngineRequest) -> wire.Submit:
    """Return the submit of a whole request to one engine."""
    return wire.Submit(request=request, mode=Mode.FULL)


def submit_prefill(request: EngineRequest, *, handoff_id: str, target_epoch: str) -> wire.Submit:
    """Return the submit to the prefill engine; the decode engine has the epoch `target_epoch`."""
    return wire.Submit(
        request=request,
        mode=Mode.PREFILL,
        handoff_id=HandoffId(handoff_id),
        target_epoch=EpochId(target_epoch),
    )


def submit_storing(request: EngineRequest) -> wire.Submit:
    """Return the submit to the prefill engine of a handoff through the store."""
    return wire.Submit(request=request, mode=Mode.PREFILL, handoff="store")


def submit_stored(request: EngineRequest) -> wire.Submit:
    """Return the submit to the decode engine of a handoff through the store; `request` has the first token."""
    return wire.Submit(request=request, mode=Mode.FULL, handoff="store")


def submit_decode(request: EngineRequest, *, handoff_id: str, prefill: wire.PrefillPeer) -> wire.Submit:
    """Return the submit to the decode engine."""
    return wire.Submit(request=request, mode=Mode.DECODE, handoff_id=HandoffId(handoff_id), prefill=prefill)


def make_peer(
    epoch: str, *, endpoint: str = "tcp://127.0.0.1:1", worker_id: str = "w", spec: wire.PeerSpec | None = None
) -> wire.PrefillPeer:
    """Return the address of a prefill engine, for `submit_decode`."""
    return wire.PrefillPeer(worker_id=WorkerId(worker_id), endpoint=endpoint, epoch=EpochId(epoch), spec=spec)
