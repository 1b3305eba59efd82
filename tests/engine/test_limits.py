"""Limits left to "auto" become numbers that fit the device, the role and the limits set by the user."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.engine.limits import resolve_limits
from kvist.errors import ConfigError
from kvist.request import PRIORITY, Role
from kvist.scheduler.config import SchedulerConfig, SchedulerOptions

PLACES = list(itertools.product(("cpu", "cuda"), (Role.UNIFIED, Role.PREFILL, Role.DECODE)))


def limits(config: SchedulerConfig) -> tuple[int, int, int]:
    return config.max_running_requests, config.chunked_prefill_size, config.max_prefill_tokens


def test_a_cpu_keeps_its_steps_short_in_every_role() -> None:
    for role in (Role.UNIFIED, Role.PREFILL, Role.DECODE):
        resolved = resolve_limits(SchedulerOptions(), device="cpu", role=role)
        assert limits(resolved) == (128, 512, 512)
        assert resolved.overlap is False


def test_a_gpu_that_only_prefills_takes_larger_steps_than_one_that_also_decodes() -> None:
    by_role = {
        role: resolve_limits(SchedulerOptions(), device="cuda", role=role) for role in (Role.UNIFIED, Role.PREFILL)
    }
    assert by_role[Role.PREFILL].chunked_prefill_size > by_role[Role.UNIFIED].chunked_prefill_size
    assert by_role[Role.PREFILL].max_prefill_tokens >= by_role[Role.UNIFIED].max_prefill_tokens
    assert all(config.overlap and config.max_running_requests == 256 for config in by_role.values())


@pytest.mark.parametrize(("device", "role"), PLACES)
def test_every_auto_budget_holds_the_running_requests_and_a_whole_chunk(device: str, role: Role) -> None:
    num_running, chunk, budget = limits(resolve_limits(SchedulerOptions(), device=device, role=role))
    assert max(num_running, chunk) <= budget
    assert budget % 128 == 0


def test_limits_set_by_the_user_are_kept_and_auto_limits_adapt() -> None:
    def resolve(**options: int | bool) -> SchedulerConfig:
        return resolve_limits(SchedulerOptions(**options), device="cpu", role=Role.UNIFIED)  # type: ignore[arg-type]

    assert limits(resolve(max_prefill_tokens=100)) == (100, 100, 100)
    assert limits(resolve(chunked_prefill_size=2000)) == (128, 2000, 2048)
    assert limits(resolve(max_running_requests=1500)) == (1500, 512, 1536)
    assert limits(resolve(chunked_prefill_size=700, max_prefill_tokens=300)) == (128, 700, 300)
    assert resolve(overlap=True).overlap is True


_SIZE = st.none() | st.integers(1, 20_000)


@given(st.sampled_from(PLACES), _SIZE, _SIZE, _SIZE)
def test_only_limits_set_by_the_user_can_contradict_each_other(
    place: tuple[str, str], num_running: int | None, chunk: int | None, budget: int | None
) -> None:
    given_by_user = {"max_running_requests": num_running, "chunked_prefill_size": chunk, "max_prefill_tokens": budget}
    if num_running is not None and budget is not None and budget < num_running:
        with pytest.raises(ConfigError, match="--max-prefill-tokens"):
            SchedulerOptions(**given_by_user)  # type: ignore[arg-type]
        return
    options = SchedulerOptions(**given_by_user)  # type: ignore[arg-type]
    resolved = resolve_limits(options, device=place[0], role=Role(place[1]))
    for name, value in given_by_user.items():
        assert getattr(resolved, name) == value or value is None
    assert resolved.max_running_requests <= resolved.max_prefill_tokens


def test_every_other_option_reaches_the_scheduler_as_it_was_set() -> None:
    autos = {"max_running_requests", "chunked_prefill_size", "max_prefill_tokens", "overlap"}
    defaults: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(SchedulerOptions)
        if field.name not in autos | {"context_length"}
    }
    others: dict[str, Any] = {
        name: PRIORITY if isinstance(value, str) else (value or 2) * 2 for name, value in defaults.items()
    }
    options = SchedulerOptions(**others)  # no option has its default
    resolved = resolve_limits(options, device="cuda", role=Role.DECODE)
    for name, value in others.items():
        assert getattr(resolved, name) == value, name
    assert all(getattr(resolved, name) is not None for name in autos)
