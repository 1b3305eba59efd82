"""Writes the table of request fields into docs/api.md, from the schemas.

    python scripts/api_fields.py

tests/test_docs.py fails if the page has another table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvist.api import messages, responses, schemas
from kvist.api.fields import Advisory, FieldClass, Honoured, KnownFields, classes_of

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
BEGIN, END = "<!-- fields: made by scripts/api_fields.py -->\n", "<!-- end of fields -->\n"

# The requests, under their names in the column "Where"; and the objects inside requests.
ENDPOINTS: dict[str, type[msgspec.Struct]] = {
    "chat": schemas.ChatRequest,
    "completions": schemas.CompletionRequest,
    "/generate": schemas.NativeRequest,
    "sampling_params": schemas.NativeSampling,
    "/tokenize": schemas.TokenizeRequest,
    "/detokenize": schemas.DetokenizeRequest,
    "/v1/messages": messages.MessagesRequest,
    "/v1/responses": responses.ResponsesRequest,
    "score": schemas.ScoreRequest,
    "/v1/prefill": schemas.PrefillRequest,
    "/v1/leases": schemas.LeaseRequest,
}
_V1, _CHAT, _MESSAGES, _RESPONSES = "chat, completions", "chat", "/v1/messages", "/v1/responses"
_PROMPTS = "score, /v1/prefill, /v1/leases"
INSIDE: list[tuple[str, str, type[msgspec.Struct]]] = [  # endpoints, path, struct
    (_V1, "stream_options.", schemas.StreamOptions),
    (f"{_V1}, /generate", "kvist.", schemas.KvistOptions),
    (_PROMPTS, "kvist.", schemas.PlaceOptions),
    (f"{_CHAT}, /tokenize, {_PROMPTS}", "messages[].", schemas.ChatMessage),
    (f"{_CHAT}, /tokenize, {_PROMPTS}", "messages[].content[].", schemas.ContentPart),
    (f"{_CHAT}, /tokenize, {_PROMPTS}", "messages[].tool_calls[].", schemas.ToolCall),
    (f"{_CHAT}, /tokenize, {_PROMPTS}", "messages[].tool_calls[].function.", schemas.CalledFunction),
    (f"{_CHAT}, /tokenize, {_PROMPTS}", "tools[].", schemas.Tool),
    (f"{_CHAT}, /tokenize, {_PROMPTS}", "tools[].function.", schemas.ToolFunction),
    (_MESSAGES, "messages[].", messages.InputMessage),
    (_MESSAGES, "messages[].content[].", messages.MessageBlock),
    (_MESSAGES, "system[].", messages.ResultPart),
    (_MESSAGES, "messages[].content[].content[].", messages.ResultPart),
    (_MESSAGES, "tools[].", messages.MessagesTool),
    (_MESSAGES, "tool_choice.", messages.MessagesToolChoice),
    (_MESSAGES, "thinking.", messages.Thinking),
    (_MESSAGES, "output_config.", messages.OutputConfig),
    (_MESSAGES, "output_config.format.", messages.OutputFormat),
    (_RESPONSES, "input[].", responses.InputItem),
    (_RESPONSES, "input[].content[].", responses.InputPart),
    (_RESPONSES, "tools[].", responses.ResponsesTool),
    (_RESPONSES, "text.", responses.TextOptions),
    (_RESPONSES, "text.format.", responses.TextFormat),
    (_RESPONSES, "reasoning.", responses.ReasoningOptions),
    (_RESPONSES, "stream_options.", responses.ResponseStreamOptions),
]


def table() -> str:
    rows, inside = [*_honoured(), *_others()], list[tuple[str, str, str, str]]()
    for where, prefix, struct in INSIDE:
        inside.extend((prefix + name, _class_name(cls), where, _says(cls)) for name, cls in classes_of(struct).items())
    places: dict[tuple[str, str, str], list[str]] = {}  # a field of several structs with one effect has one row
    for name, kind, where, says in inside:
        places.setdefault((name, kind, says), []).append(where)
    rows += [(name, kind, ", ".join(found), says) for (name, kind, says), found in places.items()]
    order = {"honoured": 0, "advisory": 1, "refused": 2}
    rows.sort(key=lambda row: (order[row[1]], row[0]))
    lines = [f"| `{name}` | {kind} | {where} | {says} |" for name, kind, where, says in rows]
    return "\n".join(["| Field | Class | Where | Effect, reason, or alternative |", "|---|---|---|---|", *lines]) + "\n"


def _honoured() -> Iterator[tuple[str, str, str, str]]:
    """Yield one row for each field and effect, with the endpoints where it has that effect."""
    found: dict[tuple[str, str], list[str]] = {}
    for where, struct in ENDPOINTS.items():
        for name, cls in classes_of(struct).items():
            if isinstance(cls, Honoured):
                found.setdefault((name, cls.effect), []).append(where)
    for (name, effect), places in found.items():
        yield name, "honoured", "everywhere" if len(places) == len(ENDPOINTS) else ", ".join(places), effect


def _others() -> Iterator[tuple[str, str, str, str]]:
    for name, cls in classes_of(KnownFields).items():
        if isinstance(cls, Honoured):
            continue
        takes = [where for where, one in ENDPOINTS.items() if isinstance(classes_of(one)[name], Honoured)]
        yield name, _class_name(cls), "elsewhere" if takes else "everywhere", _says(cls)


def _class_name(cls: FieldClass) -> str:
    return type(cls).__name__.lower()


def _says(cls: FieldClass) -> str:
    if isinstance(cls, Honoured):
        return cls.effect
    said = cls.reason if isinstance(cls, Advisory) else cls.instead
    values = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in cls.neutral)
    if not values:
        return said
    return f"{said}. {'Not named with' if isinstance(cls, Advisory) else 'Accepted:'} {values}"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
