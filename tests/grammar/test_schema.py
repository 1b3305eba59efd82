"""The place of a fault in a schema, and the depth of JSON texts."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.errors import InvalidConstraint
from kvist.grammar.endless import find_endless
from kvist.grammar.schema import MAX_DEPTH, find_fault, parse_json
from kvist.grammar.schema_parts import path_text
from tests.budget import budget

BAD = "bad"


def fails(text: str) -> str | None:
    """A backend that refuses a schema with the keyword `bad`, in any of its parts that are not definitions."""

    def has_bad(value: Any, root: Any, depth: int = 0) -> bool:
        if isinstance(value, list):
            return any(has_bad(each, root, depth) for each in value)
        if not isinstance(value, dict) or depth > 20:
            return False
        if BAD in value:
            return True
        if "$ref" in value:
            target = root
            for step in value["$ref"][2:].split("/") if len(value["$ref"]) > 1 else ():
                target = target[int(step)] if isinstance(target, list) else target[step]
            if has_bad(target, root, depth + 1):
                return True
        return any(has_bad(each, root, depth) for key, each in value.items() if key not in ("$defs", "$ref"))

    schema = json.loads(text)
    return "refused" if has_bad(schema, schema) else None


def place(schema: object) -> str:
    assert fails(json.dumps(schema)) == "refused"
    return path_text(find_fault(schema, "refused", fails)[0])


names = st.sampled_from(["a", "b", "name with . and [0]"])
steps = st.one_of(
    names.map(lambda name: ("properties", name)),
    st.sampled_from([("items",), ("additionalProperties",), ("not",)]),
    st.tuples(st.sampled_from(["anyOf", "allOf", "prefixItems"]), st.integers(0, 2)),
)


@given(st.lists(steps, max_size=6))
def test_a_single_fault_is_found_at_any_depth(path: list[tuple[str | int, ...]]) -> None:
    schema: Any = {BAD: True}
    for step in reversed(path):
        if len(step) == 1:
            schema = {step[0]: schema, "title": "t"}
        elif step[0] == "properties":
            schema = {"properties": {"other": {"type": "string"}, step[1]: schema}}
        else:
            assert isinstance(step[1], int)
            schema = {step[0]: [{"type": "string"}] * step[1] + [schema, {}]}
    assert place(schema) == path_text(tuple(one for step in path for one in step))


def test_the_fault_of_a_definition_is_found_through_its_reference() -> None:
    assert place({"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"properties": {"y": {BAD: 1}}}}}) == (
        "$defs.x.properties.y"
    )


def test_references_that_form_a_circle_end_the_search() -> None:
    circle = {"anyOf": [{"$ref": "#/$defs/b"}]}
    assert place({"$ref": "#/$defs/a", "$defs": {"a": circle, "b": {"anyOf": [{"$ref": "#/$defs/a"}, {BAD: 1}]}}}) == (
        "$defs.b.anyOf[1]"
    )


def test_a_fault_of_the_whole_has_no_path() -> None:
    assert find_fault({"properties": {"a": {}}}, "too large", lambda _: None) == ((), "too large")


@pytest.mark.parametrize(
    ("required", "found"), [(["b"], ("properties.b", "empty")), (["a"], ("", "whole")), ([], ("", "whole"))]
)
def test_an_impossible_part_is_at_fault_if_every_document_needs_it(required: list[str], found: tuple[str, str]) -> None:
    schema = {"properties": {"a": {}, "b": {"enum": []}}, "required": required}
    path, message = find_fault(schema, "whole", lambda text: "empty" if json.loads(text).get("enum") == [] else None)
    assert (path_text(path), message) == found


NEXT = {"type": "object", "properties": {"value": {}, "next": {"$ref": "#"}}}
LISTED = {"type": "array", "items": {"$ref": "#"}}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({**NEXT, "required": ["next"]}, ("properties", "next")),
        (NEXT, None),
        ({**NEXT, "required": ["value"]}, None),
        ({**NEXT, "type": ["object", "null"], "required": ["next"]}, None),
        ({"anyOf": [{**NEXT, "required": ["next"]}, {"type": "null"}]}, None),
        ({**LISTED, "minItems": 1}, ("items",)),
        ({**LISTED, "minItems": 1, "prefixItems": [{}]}, None),
        ({**LISTED, "minItems": 2, "prefixItems": [{}]}, ("items",)),
        (LISTED, None),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, ("$defs", "b")),
        ({"$ref": "https://example.com"}, None),
        (True, None),
    ],
)
def test_a_schema_without_a_finite_document_is_found(schema: object, path: tuple[str, ...] | None) -> None:
    assert find_endless(schema) == path


def test_the_search_for_endless_schemas_takes_time_in_proportion_to_their_size() -> None:
    """A chain of references, whose last link decides, between many alternatives."""
    num_links = 3000
    links: dict[str, Any] = {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(num_links)}
    links[str(num_links)] = {"anyOf": [{"$ref": "#"}] * num_links}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/0"}}, "required": ["a"], "$defs": links}
    start_s = time.thread_time()
    assert find_endless(schema) is not None
    links[str(num_links)]["anyOf"].append({})
    assert find_endless(schema) is None
    assert time.thread_time() - start_s < 2.0


texts = st.text('[]{}"\\', max_size=4)


@settings(max_examples=budget(30, long=1000))
@given(st.recursive(st.none() | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=6))
def test_json_below_the_limits_is_parsed(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["[" * 10_000, '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1)])
def test_deep_json_is_refused_before_it_is_parsed(text: str) -> None:
    with pytest.raises(InvalidConstraint, match="levels"):
        parse_json(text)
    assert parse_json(json.dumps("[" * 10_000))
