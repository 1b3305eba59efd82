"""The conformance files: example outputs of each format, and the tools that the examples call."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvist.tools import (
    TOOL_PARSERS,
    AnswerFormats,
    AnswerParser,
    ArgumentsPiece,
    CallEnded,
    CallStarted,
    ContentPiece,
    ParserEvent,
    ReasoningPiece,
    answer_parser,
    find_formats,
)
from kvist.tools.harmony import HarmonyParser

FOLDER = Path(__file__).parent / "conformance"
TOOLS: dict[str, Any] = {
    "get_weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {},
    "write_file": {
        "properties": {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "lines": {"type": "integer"},
            "options": {"type": "object"},
            "mode": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "quiet": {"type": ["boolean"]},
        }
    },
}


@dataclass
class Answer:
    """The answer that a client reads from the events."""

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)  # name and arguments
    ids: list[str] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def add(self, event: ParserEvent) -> None:
        match event:
            case ContentPiece(text):
                self.content += text
            case ReasoningPiece(text):
                self.reasoning += text
            case CallStarted(index, name, call_id):
                assert index == len(self.calls)
                self.calls.append([name, ""])
                self.ids.append(call_id)
            case ArgumentsPiece(index, text):
                assert index == len(self.calls) - 1
                assert index not in self.ended
                self.calls[index][1] += text
            case CallEnded(index):
                assert index == len(self.calls) - 1
                self.ended.append(index)


def make_parser(name: str) -> AnswerParser | HarmonyParser:
    reasoning = find_formats("", reasoning_parser="mistral" if name == "mistral" else "qwen3").reasoning
    return answer_parser(AnswerFormats(TOOL_PARSERS[name], reasoning), parameters=TOOLS)


def parse(name: str, *pieces: str) -> Answer:
    parser, answer = make_parser(name), Answer()
    for piece in pieces:
        for event in parser.push(piece):
            answer.add(event)
    for event in parser.finish():
        answer.add(event)
    return answer


def all_cases() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(FOLDER.glob("*.toml"))
    return [(file.stem, case) for file in files for case in tomllib.loads(file.read_text(encoding="utf-8"))["case"]]
