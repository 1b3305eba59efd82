"""Headers of strangers become a trace context, or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.flight.trace_context import MAX_TRACEPARENT_BYTES, MAX_TRACESTATE_BYTES, trace_context

TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
VALID = b"00-%s-%s-01" % (TRACE, SPAN)


def test_a_valid_header_names_the_trace_of_the_caller() -> None:
    found = trace_context(VALID, b"vendor=1")
    assert found is not None
    assert (found.trace_id, found.parent_id, found.is_sampled, found.state) == (
        TRACE.decode(), SPAN.decode(), True, "vendor=1",
    )  # fmt: skip
    not_sampled = trace_context(VALID[:-2] + b"02")
    assert not_sampled is not None
    assert not not_sampled.is_sampled


def test_a_later_version_may_have_further_fields() -> None:
    assert trace_context(b"01" + VALID[2:] + b"-more") is not None
    assert trace_context(b"01" + VALID[2:] + b"more") is None


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        VALID.upper(),
        VALID + b"-more",  # of version 00
        b"ff" + VALID[2:],
        VALID.replace(TRACE, b"0" * 32),
        VALID.replace(SPAN, b"0" * 16),
        VALID[:-1],
        VALID + b"\n",
        b"01" + VALID[2:] + b"-" + b"x" * MAX_TRACEPARENT_BYTES,
    ],
)
def test_other_headers_are_ignored(header: bytes | None) -> None:
    assert trace_context(header) is None


def test_a_bad_state_is_dropped_and_the_trace_stays() -> None:
    for state in (b"a" * (MAX_TRACESTATE_BYTES + 1), b"a=\xff", b"a=1\r\nb: 2"):
        found = trace_context(VALID, state)
        assert found is not None
        assert found.state == ""


@given(st.binary(max_size=200), st.binary(max_size=600))
def test_no_header_raises(parent: bytes, state: bytes) -> None:
    trace_context(parent, state)
    trace_context(VALID, state)
