"""Makes the OpenAPI 3.1 document. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from kvist import __version__
from kvist.api.chat_objects import ErrorBody
from kvist.api.fields import Advisory, Refused, classes_of
from kvist.api.messages import MessagesErrorBody
from kvist.api_docs.operations import OPERATIONS, Operation

_REF = "#/components/schemas/{name}"
_ERRORS = "an error: the message names the field and the remedy"


def openapi_document() -> dict[str, Any]:
    types = _types(OPERATIONS)
    found, components = msgspec.json.schema_components(types, schema_hook=_any_json, ref_template=_REF)
    schema_of = dict(zip(map(repr, types), found, strict=True))
    for struct in _structs(types):
        _describe(components[struct.__name__], struct)
    paths: dict[str, dict[str, object]] = {}
    for operation in OPERATIONS:
        for method in operation.methods:
            paths.setdefault(operation.path, {})[method.lower()] = _operation(operation, method, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Kvist",
            "version": __version__,
            "description": "Unknown fields are refused. A field without effect is named in the response header "
            "x-kvist-ignored.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _types(operations: Sequence[Operation]) -> list[Any]:
    found: list[Any] = [ErrorBody, MessagesErrorBody]
    for operation in operations:
        found += [each for each in (operation.request, operation.response, operation.event) if each is not None]
    return list({repr(each): each for each in found}.values())


def _structs(types: Sequence[Any]) -> list[type[msgspec.Struct]]:
    """Return all structs in the types."""
    found: dict[str, type[msgspec.Struct]] = {}
    pending = list(types)
    while pending:
        each = pending.pop()
        if isinstance(each, type) and issubclass(each, msgspec.Struct):
            if each.__name__ not in found:
                found[each.__name__] = each
                pending += [field.type for field in msgspec.structs.fields(each)]
        else:
            pending += getattr(each, "__args__", ())
    return list(found.values())


def _describe(schema: dict[str, Any], struct: type[msgspec.Struct]) -> None:
    """Write the effects of the fields into a schema, and leave out the fields that are always refused."""
    properties: dict[str, Any] = schema.get("properties", {})
    for name, cls in classes_of(struct).items():
        if isinstance(cls, Refused):
            del properties[name]
        elif isinstance(cls, Advisory):
            properties[name] = {**properties[name], "description": f"without effect: {cls.reason}"}
        else:
            properties[name] = {**properties[name], "description": cls.effect}


def _operation(operation: Operation, method: str, schema_of: dict[str, Any]) -> dict[str, object]:
    whole = {"type": "object"} if operation.response is None else schema_of[repr(operation.response)]
    content: dict[str, object] = {"application/json": {"schema": whole}}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": schema_of[repr(operation.event)]}
    error = MessagesErrorBody if operation.path.startswith("/v1/messages") else ErrorBody
    found: dict[str, object] = {
        "summary": operation.text,
        "responses": {
            "200": {"description": operation.text, "content": content},
            "default": {"description": _ERRORS, "content": {"application/json": {"schema": schema_of[repr(error)]}}},
        },
    }
    names = re.findall(r"\{(\w+)\}", operation.path)
    if names:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.request is not None and method == "POST":
        body = {"application/json": {"schema": schema_of[repr(operation.request)]}}
        found["requestBody"] = {"required": True, "content": body}
    return found


def _any_json(kind: type) -> dict[str, object]:
    assert kind is object, kind
    return {"description": "any JSON value"}
