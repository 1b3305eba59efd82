"""Requests of client libraries, as recorded by scripts/clients.py: each is answered as the schemas of the API say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import msgspec
import pytest

from clients import CLIENTS, IDS
from kvist.api_docs.document import openapi_document
from tests.clients.agent_server import agent_bench

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(openapi_document()))
    return found


def test_every_client_is_recorded() -> None:
    assert {path.stem for path in RECORDED.glob("*.json")} == set(CLIENTS)


@pytest.mark.parametrize("name", CLIENTS)
async def test_the_requests_of_a_client_are_answered_as_the_schemas_say(name: str, document: dict[str, Any]) -> None:
    """The reports vLLM #33089, #30439, #44775 and codex #12669: turns of Responses, streamed calls, cache usage."""
    record = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    assert record["client"].startswith(f"{name} ")
    ids: dict[str, str] = {}  # recorded → given now
    made = agent_bench()
    async with made.client:
        for exchange in record["exchanges"]:
            path, body = (_renamed(exchange[part], ids) for part in ("path", "body"))
            response = await made.client.request(
                exchange["method"], path, content=body.encode() or None, headers=exchange["headers"]
            )
            assert response.status_code == 200, (path, body, response.text)
            assert response.headers.get("x-kvist-ignored", "") == exchange["ignored"], (path, body)
            _check(document, exchange["method"], path.partition("?")[0], response)
            ids |= zip(exchange["ids"], dict.fromkeys(IDS.findall(response.text)), strict=True)


def _renamed(text: str, ids: dict[str, str]) -> str:
    return IDS.sub(lambda found: ids[found[0]], text)


def _check(document: dict[str, Any], method: str, path: str, response: httpx.Response) -> None:
    """Check that the path is described, and that the answer has its schema."""
    [operations] = [
        found for known, found in document["paths"].items() if re.fullmatch(re.sub(r"{\w+}", "[^/]+", known), path)
    ][:1]
    content = operations[method.lower()]["responses"]["200"]["content"]
    kind = response.headers["content-type"].partition(";")[0]
    validator = jsonschema_rs.validator_for({**content[kind]["schema"], "components": document["components"]})
    if kind == "application/json":
        validator.validate(response.json())
        return
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    assert data
    for one in data:
        validator.validate(msgspec.json.decode(one))
