"""Schemas that cannot be compiled are refused in bounded time and memory, and do not hold up the streams of others."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist.testing.rounds import check_time, in_rounds
from tests.e2e.conftest import Cluster

LIMIT_S = 15.0  # the limit of a compilation is 10
NUM_TOKENS = 100
STREAM = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}


def needs(schema: object) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}


def nested(num_levels: int) -> str:
    return '{"items":' * num_levels + "{}" + "}" * num_levels


# the path of the fault inside the schema, and a part of the reason
BAD: dict[str, tuple[object, str, str]] = {
    "1 MB": ({"enum": ["x" * 1_000_000]}, "", "limit"),
    "10,000 levels": (nested(10_000), "", "levels"),
    "a reference to itself": ({"$ref": "#"}, "", "no finite answer"),
    "references in a circle": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        ".$defs.a",
        "no finite answer",
    ),
    "an endless list": (needs({"type": "array", "minItems": 1, "items": {"$ref": "#"}}), "", "no finite answer"),
    "look-ahead": (needs({"type": "string", "pattern": "(?=a)b"}), ".properties.a", "look-a"),
    "back-references": (needs({"type": "string", "pattern": r"(a+)+\1"}), ".properties.a", "regex"),
    "contradictory numbers": (needs({"type": "integer", "minimum": 5, "maximum": 3}), ".properties.a", "greater"),
    "contradictory types": (needs({"allOf": [{"type": "integer"}, {"type": "string"}]}), ".properties.a", ""),
    "contradictory lengths": (needs({"type": "string", "minLength": 5, "maxLength": 3}), ".properties.a", ""),
    "an unknown format": (needs({"type": "string", "format": "no-such"}), ".properties.a", "no-such"),
    "an unknown type": (needs({"type": "strin"}), ".properties.a", "strin"),
    "another document": (needs({"$ref": "https://example.com/x"}), ".properties.a", "example.com"),
}
# Without back-tracking, patterns that are catastrophic elsewhere cost nothing; too many states end the request alone.
HARD = [
    needs({"type": "string", "pattern": "^(a+)+$", "maxLength": 8}),
    needs({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "maxLength": 8}),
    needs({"type": "string", "pattern": "^(((a{1,99}){1,99}){1,99}){1,99}$"}),
    needs({"type": "string", "pattern": "(.*a.{25}){9}"}),
]


def post(url: str, schema: object) -> httpx.Response:
    body = {"prompt": "x", "max_tokens": 2, "structured_outputs": {"json": schema}}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def rss_mib(cluster: Cluster, name: str) -> float:
    child = cluster.processes.children[name]
    status = Path(f"/proc/{child.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


@pytest.mark.parametrize("name", BAD)
@in_rounds(3)
def test_a_bad_schema_is_a_400_with_the_path_of_its_fault_in_bounded_time(settled: Cluster, name: str) -> None:
    schema, path, reason = BAD[name]
    start_s = time.monotonic()
    answer = post(settled.router, schema)
    took_s = time.monotonic() - start_s
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith("structured_outputs.json" + path), error
    assert reason in error["message"], error
    check_time(took_s < LIMIT_S, f"the refusal took {took_s:.1f} s")


@pytest.mark.parametrize("schema", HARD, ids=lambda schema: schema["properties"]["a"]["pattern"])
def test_a_hard_pattern_is_followed_or_ends_its_request_alone(settled: Cluster, schema: dict[str, Any]) -> None:
    answer = post(settled.router, schema)
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "invalid_constraint", answer.text


def gap_s(url: str) -> float:
    """Return the mean time between the tokens of a stream; a client that is late gets several with one event."""
    times: list[float] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=STREAM, timeout=120) as response:
        assert response.status_code == 200
        times += [time.monotonic() for line in response.iter_lines() if line.startswith("data: {")]
    assert len(times) >= 2
    return (times[-1] - times[0]) / (NUM_TOKENS - 1)


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
FAULTY_TOOLS: list[list[Any]] = [
    [{"type": "function", "function": {**FUNCTION, "name": ""}}],
    [{"type": "function", "function": {"parameters": {}}}],
    [{"type": "function", "function": FUNCTION}] * 2,
    [{"type": "function", "function": {**FUNCTION, "strict": True, "parameters": needs({"not": {}})}}],
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
FAULTY_CHATS: list[list[Any]] = [
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": ""},
    ],
    [{"role": "tool", "tool_call_id": "other", "content": "x"}],
]
USER = {"role": "user", "content": "x"}


def schema_in_chat(schema: object) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    return {"messages": [USER], "response_format": form}


def schema_in_response(schema: object) -> dict[str, Any]:
    return {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}}


def schema_in_message(schema: object) -> dict[str, Any]:
    return {"messages": [USER], "max_tokens": 2, "output_config": {"format": {"type": "json_schema", "schema": schema}}}


def flat(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", **tool["function"]}


def anthropic(tool: dict[str, Any]) -> dict[str, Any]:
    changed = {"input_schema": tool["function"].get("parameters"), **tool["function"]}
    changed.pop("parameters", None)
    return changed


ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}
RESULT = {"type": "function_call_output", "call_id": "other", "output": "x"}
USED = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": "{"}]}
TOOL_RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "other", "content": "x"}]}
# by path: how a schema is sent, and faulty bodies without one
APIS: dict[str, tuple[Callable[[object], dict[str, Any]], list[dict[str, Any]]]] = {
    "/v1/completions": (lambda schema: {"prompt": "x", "max_tokens": 2, "structured_outputs": {"json": schema}}, []),
    "/v1/chat/completions": (
        schema_in_chat,
        [
            *({"messages": [USER], "tools": tools} for tools in FAULTY_TOOLS),
            *({"messages": [USER, *chat], "tools": FAULTY_TOOLS[2][:1]} for chat in FAULTY_CHATS),
        ],
    ),
    "/v1/responses": (
        schema_in_response,
        [
            *({"input": "x", "tools": [flat(tool) for tool in tools]} for tools in FAULTY_TOOLS),
            {"input": [{"role": "user", "content": "x"}, ITEM, {**RESULT, "call_id": "c"}]},
            {"input": [{"role": "user", "content": "x"}, RESULT]},
        ],
    ),
    "/v1/messages": (
        schema_in_message,
        [
            *({"messages": [USER], "max_tokens": 2, "tools": [anthropic(t) for t in tools]} for tools in FAULTY_TOOLS),
            {"messages": [USER, USED], "max_tokens": 2},
            {"messages": [USER, TOOL_RESULT], "max_tokens": 2},
        ],
    ),
}


def faulty_bodies(path: str) -> Iterator[dict[str, Any]]:
    """Yield bodies for ever, each with a new schema or a fault without one."""
    with_schema, others = APIS[path]
    for number in itertools.count():
        schema = list(BAD.values())[number % len(BAD)][0]
        if isinstance(schema, dict):
            schema = {"title": f"schema {number}", **schema}
        if path == "/v1/completions" or isinstance(schema, dict):  # elsewhere, a schema is an object, not a text
            yield with_schema(schema)
        yield from others


@contextlib.contextmanager
def storm(url: str, path: str, num_threads: int = 2) -> Iterator[list[tuple[int, str]]]:
    """Send bad bodies one after the other; yield the status codes and the beginnings of the answers."""
    answers: list[tuple[int, str]] = []
    is_over, lock, bodies = threading.Event(), threading.Lock(), faulty_bodies(path)

    def send() -> None:
        with httpx.Client(timeout=60) as client:
            while not is_over.is_set():
                with lock:
                    body = next(bodies)
                answer = client.post(url + path, json=body)
                answers.append((answer.status_code, f"{json.dumps(body)[:200]} ► {answer.text[:200]}"))

    threads = [threading.Thread(target=send) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        is_over.set()
        for thread in threads:
            thread.join(60)


@pytest.mark.parametrize("path", APIS)
@in_rounds(4)
def test_a_storm_of_bad_bodies_does_not_hold_up_the_streams_of_others(settled: Cluster, path: str) -> None:
    gap_s(settled.unified)  # warms up
    quiet_s = gap_s(settled.unified)
    before = rss_mib(settled, "unified")
    with storm(settled.unified, path) as answers:
        stormy_s = gap_s(settled.unified)
    assert len(answers) >= 10
    assert [text for code, text in answers if code != 400] == []
    assert rss_mib(settled, "unified") < before + 200
    check_time(stormy_s < 2.5 * quiet_s, f"{1e3 * quiet_s:.0f} ms between tokens became {1e3 * stormy_s:.0f} ms")
