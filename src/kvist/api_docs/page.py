"""Shows an OpenAPI document as one HTML page. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "summary{cursor:pointer}code{background:#8882;padding:0 .2em}table{border-collapse:collapse;margin:.5rem 0 1rem}"
    "td,th{border:1px solid #8886;padding:.2rem .5rem;text-align:left;vertical-align:top}"
)


def docs_page(document: dict[str, Any]) -> str:
    return "".join(_parts(document))


def _parts(document: dict[str, Any]) -> Iterator[str]:
    info = document["info"]
    yield '<!doctype html><html lang="en"><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{escape(info['title'])}: the HTTP API</title><style>{_STYLE}</style>"
    yield f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
    yield f'<p>{escape(info["description"])} <a href="openapi.json">openapi.json</a> has the same for programs.</p>'
    yield "<h2>Endpoints</h2>"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<p><code>{method.upper()} {escape(path)}</code> {escape(operation['summary'])}"
            links = dict.fromkeys(_refs({**operation, "responses": operation["responses"]["200"]}))
            yield "".join(f' · <a href="#{name}">{name}</a>' for name in links) + "</p>"
    yield "<h2>Objects</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f'<details id="{name}"><summary><code>{name}</code></summary>'
        if "description" in schema:
            yield f"<p>{escape(schema['description'])}</p>"
        yield "<table><tr><th>Field<th>Type<th>Effect"
        for field, value in schema.get("properties", {}).items():
            yield f"<tr><td><code>{escape(field)}</code><td>{_type(value)}<td>{escape(value.get('description', ''))}"
        yield "</table></details>"
    yield "</html>"


def _refs(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for name, one in value.items():
            if name == "$ref":
                yield str(one).rpartition("/")[2]
            else:
                yield from _refs(one)
    elif isinstance(value, list):
        for one in value:
            yield from _refs(one)


def _type(schema: dict[str, Any]) -> str:
    """Return a short description of a schema, with links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return escape(", ".join(map(str, schema["enum"])))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items') or {})}"
    return escape(str(kind))
