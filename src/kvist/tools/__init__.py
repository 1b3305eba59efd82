"""Parses the text of an answer into content, reasoning and tool calls, while it arrives.

A format is data (tables.py). `find_formats` chooses formats by name or from the chat template (selection.py), and
`AnswerParser` turns pieces of text into events (parser.py). bodies.py reads one call in each style of writing
arguments, over the waiting reader of cursor.py.

The events do not depend on how the text is cut into pieces. Text that looks like a call and is none becomes content,
unchanged. Time is linear in the text, and the withheld text is limited (`HELD_CHARS`).
"""

from __future__ import annotations

from kvist.tools.cursor import is_name
from kvist.tools.events import (
    ArgumentsPiece,
    CallEnded,
    CallStarted,
    ContentPiece,
    ParserEvent,
    ReasoningPiece,
)
from kvist.tools.parser import AnswerParser
from kvist.tools.selection import (
    AUTO,
    NONE,
    REASONING_PARSERS,
    TOOL_PARSERS,
    AnswerFormats,
    find_formats,
)
from kvist.tools.tables import CallIds, ReasoningFormat, ToolFormat

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
