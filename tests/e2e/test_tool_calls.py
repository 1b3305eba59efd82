"""Over HTTP, tool calls are valid, and equal for one worker and for a pair, streamed or whole."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema_rs

from tests.e2e.conftest import Cluster

FLIGHT = {
    "type": "object",
    "properties": {
        "to": {"enum": ["Oslo", "Reims"]},
        "adults": {"type": "integer", "minimum": 1, "maximum": 9},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["to", "adults", "note"],
    "additionalProperties": False,
}
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Book a flight to Reims."}],
    "tools": [
        {"type": "function", "function": {"name": "book", "strict": True, "parameters": FLIGHT}},
        {"type": "function", "function": {"name": "now"}},
    ],
    "tool_choice": {"type": "function", "function": {"name": "book"}},
    "parallel_tool_calls": False,
    "temperature": 1.2,
    "seed": 5,
    "max_tokens": 120,
}


def whole(url: str) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/chat/completions", json={**BODY, "return_token_ids": True}, timeout=120)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["choices"][0]
    return found


def streamed_arguments(url: str) -> str:
    arguments = ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for call in json.loads(line[6:])["choices"][0]["delta"].get("tool_calls", ()):
                    arguments += call["function"]["arguments"]
    return arguments


def test_calls_of_one_worker_and_of_a_pair_are_equal_and_valid(settled: Cluster) -> None:
    alone, pair = whole(settled.unified), whole(settled.router)
    assert pair["token_ids"] == alone["token_ids"]
    assert alone["finish_reason"] == "tool_calls"
    [call] = alone["message"]["tool_calls"]
    assert call["function"]["name"] == "book"
    assert jsonschema_rs.validator_for(FLIGHT).is_valid(json.loads(call["function"]["arguments"]))
    assert streamed_arguments(settled.router) == call["function"]["arguments"]
