"""Divides one answer into blocks, in their order: text, reasoning and tool calls. At most one block is open.

White space before a call or at the start of an answer is a block only if the answer has no other text, so that an
answer that begins with a call does not begin with an empty text. The blocks do not depend on how the text is cut.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvist.server.answer_parts import AnswerParsing, AnswerParts
from kvist.tools import (
    ArgumentsPiece,
    CallEnded,
    CallStarted,
    ContentPiece,
    ParserEvent,
    ReasoningPiece,
)


class BlockKind(enum.Enum):
    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"


@dataclass(slots=True, kw_only=True, eq=False)
class Block:
    """Mutable; owned by `AnswerBlocks`."""

    index: int
    kind: BlockKind
    name: str = ""  # of the called function
    call_id: str = ""
    pieces: list[str] = field(default_factory=list)
    is_complete: bool = False  # stays False for a call whose arguments break off

    @property
    def text(self) -> str:
        """The text, or the arguments of a call as JSON."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class BlockStarted:
    block: Block


@dataclass(frozen=True, slots=True)
class BlockPiece:
    block: Block
    text: str


@dataclass(frozen=True, slots=True)
class BlockEnded:
    block: Block


BlockEvent = BlockStarted | BlockPiece | BlockEnded


class AnswerBlocks:
    """Mutable; owned by the format of one response."""

    def __init__(self, parsing: AnswerParsing | None) -> None:
        """None as `parsing`: the whole answer is text."""
        self.blocks: list[Block] = []
        self._parts = None if parsing is None else AnswerParts(parsing)
        self._open: Block | None = None
        self._held = ""  # white space that may begin a text
        self._events: list[BlockEvent] = []

    @property
    def has_calls(self) -> bool:
        return any(block.kind is BlockKind.CALL for block in self.blocks)

    def push(self, text: str, *, finished: bool) -> list[BlockEvent]:
        """Return the events of the next piece of the answer; `finished` marks the last piece."""
        for event in self._parsed(text, finished):
            self._take(event)
        if finished:
            if self._held and all(block.kind is BlockKind.REASONING for block in self.blocks):
                self._add(BlockKind.TEXT, self._held)
            self._end()
        events, self._events = self._events, []
        return events

    def _parsed(self, text: str, finished: bool) -> list[ParserEvent]:
        if self._parts is None:
            return [ContentPiece(text)] if text else []
        return self._parts.events(text, finished=finished)

    def _take(self, event: ParserEvent) -> None:
        if isinstance(event, ContentPiece):
            self._take_text(event.text)
        elif isinstance(event, ReasoningPiece):
            self._add(BlockKind.REASONING, event.text)
        elif isinstance(event, CallStarted):
            self._held = ""
            self._start(Block(index=len(self.blocks), kind=BlockKind.CALL, name=event.name, call_id=event.call_id))
        elif isinstance(event, ArgumentsPiece):
            self._add(BlockKind.CALL, event.text)
        else:
            assert isinstance(event, CallEnded)
            self._end(is_whole_call=True)

    def _take_text(self, text: str) -> None:
        is_open = self._open is not None and self._open.kind is BlockKind.TEXT
        if is_open or not text.isspace():
            text, self._held = self._held + text, ""
            self._add(BlockKind.TEXT, text)
        else:
            self._held += text

    def _add(self, kind: BlockKind, text: str) -> None:
        """Add to the open block if it is of this kind, else to a new one."""
        if self._open is None or self._open.kind is not kind:
            self._start(Block(index=len(self.blocks), kind=kind))
        assert self._open is not None
        self._open.pieces.append(text)
        self._events.append(BlockPiece(self._open, text))

    def _start(self, block: Block) -> None:
        self._end()
        self._open = block
        self.blocks.append(block)
        self._events.append(BlockStarted(block))

    def _end(self, *, is_whole_call: bool = False) -> None:
        if self._open is not None:
            self._open.is_complete = is_whole_call or self._open.kind is not BlockKind.CALL
            self._events.append(BlockEnded(self._open))
            self._open = None
