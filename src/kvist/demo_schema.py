"""The part of `kvist demo` in which an answer has the form of a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import httpx

_TEXT = "A sunflower needs about five litres of water a week and full sun."
SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {
        "plant": {"type": "string", "maxLength": 20},
        "full_sun": {"type": "boolean"},
        "litres_a_week": {"type": "integer", "minimum": 0, "maximum": 50},
    },
    "required": ["plant", "full_sun", "litres_a_week"],
    "additionalProperties": False,
}
_TYPES = {"plant": str, "full_sun": bool, "litres_a_week": int}


def ask_for_json(client: httpx.Client, show: Callable[[str], None]) -> str | None:
    """Show an answer with the form of `SCHEMA`. Return what is wrong with it, or None. Raises `httpx.HTTPError`."""
    form = {"type": "json_schema", "json_schema": {"name": "plant", "strict": True, "schema": SCHEMA}}
    question = f"{_TEXT} Say that as JSON."
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 100}
    answer = client.post("/v1/chat/completions", json={**body, "response_format": form}).raise_for_status().json()
    text = answer["choices"][0]["message"]["content"]
    show(f"you   > {question} (with a schema of {len(_TYPES)} fields)\nmodel > {text}\n")
    try:
        found = json.loads(text)
    except ValueError:
        return f"The answer to the question with a schema is not JSON: {text!r}."
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != _TYPES:
        return f"The answer to the question with a schema does not have its form: {text!r}."
    return None
