"""Parses the text of an answer into content, reasoning and tool calls, while it arrives.

A format is data (tables.py). `find_formats` chooses formats by name or from the chat template (selection.py), and
`AnswerParser` turns pieces of text into events (parser.py). bodies.py reads one call in each style of writing
arguments, over the waiting reader of cursor.py.

The events do not depend on how the text is cut into pieces. Text that looks like a call and is none becomes content,
unchanged. Time is linear in the text, and the withheld text is limited (`HELD_CHARS`).
"""

from __future__ import annotations

from kvist.text.tool_calls.cursor import is_name
from kvist.text.tool_calls.events import (
    ArgumentsPiece,
    CallEnded,
    CallStarted,
    ContentPiece,
    ParserEvent,
    ReasoningPiece,
)
from kvist.text.tool_calls.parser import AnswerParser
from kvist.text.tool_calls.selection import (
    AUTO,
    NONE,
    REASONING_PARSERS,
    TOOL_PARSERS,
    AnswerFormats,
    find_formats,
)
from kvist.text.tool_calls.tables import CallIds, ReasoningFormat, ToolFormat

__all__ = [
    "AUTO",
    "NONE",
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "AnswerFormats",
    "AnswerParser",
    "ArgumentsPiece",
    "CallEnded",
    "CallIds",
    "CallStarted",
    "ContentPiece",
    "ParserEvent",
    "ReasoningFormat",
    "ReasoningPiece",
    "ToolFormat",
    "find_formats",
    "is_name",
]
