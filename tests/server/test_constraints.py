"""Every field for the form of an answer becomes the constraint that it names, or a 400 with the path of its fault."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvist.request import Constraint
from kvist.testing.gateway_bench import GatewayBench

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["x"]}}, "required": ["b"]}
TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"enum":["x"]}},"required":["b"]}'
TAG = {"structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f>"]}
PREFIX = "response_format.json_schema.schema"
NOT = {"type": "object", "properties": {"a": {"not": {}}}}
LOOSE = Constraint(kind="json_schema", text=TEXT, strict=False)
SCHEMATIC = Constraint(kind="json_schema", text=TEXT)
CHOICE = Constraint(kind="choice", text='["yes","no"]')
REGEX, LARK = Constraint(kind="regex", text="a+b"), Constraint(kind="grammar", text='start: "x"+')
EBNF = Constraint(kind="grammar", text='root ::= "x"+')
TAGGED = Constraint(kind="structural_tag", text=json.dumps(TAG, separators=(",", ":")))


def schema_format(schema: object, **fields: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint(kind="json_object")),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, Constraint(kind="json_object")),
        ({"response_format": schema_format(SCHEMA)}, LOOSE),
        ({"response_format": schema_format(SCHEMA, strict=None)}, LOOSE),
        ({"response_format": schema_format(SCHEMA, strict=True)}, SCHEMATIC),
        ({"response_format": {"type": "structural_tag", **TAG}}, TAGGED),
        ({"structured_outputs": {"json": SCHEMA}}, SCHEMATIC),
        ({"structured_outputs": {"json": TEXT}}, SCHEMATIC),
        ({"structured_outputs": {"json_object": True}}, Constraint(kind="json_object")),
        ({"structured_outputs": {"json_object": False, "choice": []}}, None),
        ({"structured_outputs": {"regex": "a+b"}}, REGEX),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, CHOICE),
        ({"structured_outputs": {"grammar": 'start: "x"+'}}, LARK),
        ({"structured_outputs": {"structural_tag": TAG}}, TAGGED),
        (
            {"structured_outputs": {"json": TEXT, "disable_any_whitespace": True}},
            Constraint(kind="json_schema", text=TEXT, whitespace=""),
        ),
        (
            {"structured_outputs": {"json": TEXT, "whitespace_pattern": " ?"}},
            Constraint(kind="json_schema", text=TEXT, whitespace=" ?"),
        ),
        ({"guided_json": SCHEMA}, SCHEMATIC),
        ({"guided_regex": "a+b"}, REGEX),
        ({"guided_choice": ["yes", "no"]}, CHOICE),
        ({"guided_grammar": 'root ::= "x"+'}, EBNF),
        ({"regex": "a+b"}, REGEX),
        ({"ebnf": 'root ::= "x"+'}, EBNF),
        ({"structural_tag": json.dumps(TAG, separators=(",", ":"))}, TAGGED),
        ({"regex": "", "ebnf": "", "structural_tag": {}, "guided_choice": [], "guided_json": None}, None),
    ],
)
async def test_a_field_of_chats_becomes_its_constraint(
    bench: GatewayBench, fields: dict[str, Any], constraint: Constraint | None
) -> None:
    response = await bench.chat(**fields)
    assert response.status_code == 200, response.text
    assert bench.dispatcher.requests[0].sampling.constraint == constraint


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"json_schema": TEXT}, SCHEMATIC),
        ({"json_schema": SCHEMA}, SCHEMATIC),
        ({"regex": "a+b"}, REGEX),
        ({"ebnf": 'root ::= "x"+'}, EBNF),
        ({"structural_tag": TAG}, TAGGED),
    ],
)
async def test_a_field_of_generate_becomes_its_constraint(
    bench: GatewayBench, fields: dict[str, Any], constraint: Constraint
) -> None:
    response = await bench.client.post("/generate", json={"text": "x", "sampling_params": fields})
    assert response.status_code == 200, response.text
    assert bench.dispatcher.requests[0].sampling.constraint == constraint


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (
            {"response_format": schema_format(NOT, strict=True)},
            "response_format.json_schema.schema.properties.a",
            "not",
        ),
        ({"response_format": schema_format({"type": "x"})}, "response_format.json_schema.schema", "x"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "supported"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "response_format", "two constraints"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "two constraints"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
            "structured_outputs.whitespace_pattern",
            "contradict",
        ),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_json": {"items": "[" * 300}}, "guided_json", "schema"),
        ({"ebnf": "root ::= nowhere"}, "ebnf", "nowhere"),
        ({"structural_tag": {"format": {"type": "tag"}}}, "structural_tag.format.begin", "text"),
        ({"regex": "a" * 300_000}, "regex", "limit"),
        ({"guided_json": {"enum": ["a" * 300_000]}}, "guided_json", "limit"),
    ],
)
async def test_a_faulty_constraint_is_a_400_with_its_path(
    bench: GatewayBench, fields: dict[str, Any], param: str, reason: str
) -> None:
    response = await bench.chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], reason in error["message"]) == (param, True), error
    assert not bench.dispatcher.requests


async def test_a_schema_of_ten_thousand_levels_is_a_400(bench: GatewayBench) -> None:
    text = '{"items":' * 10_000 + "{}" + "}" * 10_000
    assert (await bench.chat(guided_json=text)).json()["error"]["param"] == "guided_json"
    body = '{"messages":[{"role":"user","content":"x"}],"guided_json":' + text + "}"
    response = await bench.client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400


async def test_parts_of_a_loose_schema_without_effect_are_named_in_the_header(bench: GatewayBench) -> None:
    response = await bench.chat(response_format=schema_format(NOT))
    assert response.status_code == 200
    assert 'response_format.json_schema.schema (not supported: "not")' in response.headers["x-kvist-ignored"]


async def test_every_answer_of_a_request_has_the_constraint(bench: GatewayBench) -> None:
    assert (await bench.chat(n=3, regex="a+b")).status_code == 200
    assert [each.sampling.constraint for each in bench.dispatcher.requests] == [REGEX] * 3


async def test_compilations_are_counted(bench: GatewayBench) -> None:
    for _ in range(2):
        await bench.chat(regex="a+b")
        await bench.chat(regex="(")
    lines = (await bench.client.get("/metrics")).text.splitlines()
    assert "kvist:gateway_grammars_compiled_total 1.0" in lines
    assert "kvist:gateway_grammar_failures_total 1.0" in lines
    assert "kvist:gateway_grammar_cache_hits_total 2.0" in lines
    assert "kvist:grammar_compilation_time_seconds_count 4.0" in lines
