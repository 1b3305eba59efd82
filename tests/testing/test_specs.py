"""The builders of specs, reports and requests know every field, and refuse the others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvist import wire
from kvist.request import EngineRequest, Mode, Role, SamplingParams
from kvist.scheduler import SchedulerConfig
from kvist.simulation import engine as sim_engine
from kvist.testing import memory_cluster, memory_engine
from kvist.testing.specs import (
    LoadFields,
    PoolFields,
    RequestFields,
    SamplingFields,
    SpecFields,
    make_load,
    make_peer,
    make_pool,
    make_request,
    make_spec,
    submit_decode,
    submit_full,
    submit_prefill,
)


@pytest.mark.parametrize(
    ("fields", "struct"),
    [
        (SpecFields, wire.EngineSpec),
        (LoadFields, wire.LoadReport),
        (PoolFields, wire.PoolAddress),
        (SamplingFields, SamplingParams),
    ],
)
def test_a_builder_takes_every_field_of_its_struct(fields: type, struct: type) -> None:
    assert list(fields.__annotations__) == list(struct.__struct_fields__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "dataclass"),
    [
        (sim_engine.SchedulerFields, SchedulerConfig),
        (sim_engine.ShapeFields, sim_engine.SimShape),
        (memory_cluster.ShapeFields, memory_engine.EngineShape),
    ],
)
def test_an_engine_in_memory_takes_every_field_of_its_shape(fields: type, dataclass: Any) -> None:
    assert set(fields.__annotations__) == {field.name for field in dataclasses.fields(dataclass)}


def test_the_builder_of_requests_takes_every_field_of_a_request_and_of_its_sampling() -> None:
    own = set(EngineRequest.__struct_fields__) - {"request_id", "prompt_token_ids", "sampling"}
    assert set(RequestFields.__annotations__) == own | set(SamplingParams.__struct_fields__)


def test_values_of_a_builder_differ_from_the_defaults_in_the_given_fields_only() -> None:
    assert make_spec(role=Role.DECODE).role is Role.DECODE
    assert make_spec(role=Role.UNIFIED) == make_spec()
    assert make_load(num_running=3).num_running == 3
    assert make_pool(num_pages=9).num_pages == 9


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="no_such_field"):
        make_spec(no_such_field=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no_such_field"):
        make_request(no_such_field=1)  # type: ignore[call-arg]


def test_sampling_fields_reach_the_sampling_parameters_of_a_request() -> None:
    request = make_request("a", [1, 2], temperature=0.0, seed=5, client="k/h/1")
    assert request == EngineRequest(
        request_id=request.request_id,
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(max_tokens=4, temperature=0.0, seed=5),
        client="k/h/1",
    )


def test_the_submits_of_a_pair_name_the_same_handoff_and_each_other() -> None:
    request = make_request()
    prefill = submit_prefill(request, handoff_id="h", target_epoch="D")
    decode = submit_decode(request, handoff_id="h", prefill=make_peer("P"))
    assert submit_full(request).mode is Mode.FULL
    assert (prefill.mode, decode.mode) == (Mode.PREFILL, Mode.DECODE)
    assert prefill.handoff_id == decode.handoff_id
    assert prefill.target_epoch == "D"
    assert decode.prefill is not None
    assert decode.prefill.epoch == "P"
