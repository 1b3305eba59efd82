"""Parses answers in the harmony format of gpt-oss: messages with a channel, and a recipient for calls.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant          reasoning
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>   a call
    <|channel|>commentary<|message|>… and <|channel|>final<|message|>…     content

The recipient may also stand before the channel. The prompt ends with `<|start|>assistant`, and the server does not show
the token that ends the answer. Source: https://github.com/openai/harmony/blob/main/docs/format.md. The package
`openai-harmony` is not used: it downloads its vocabulary, and parses token ids of that vocabulary only. A test compares
this parser with what the package has written and read (tests/tools/record_harmony.py).
"""

from __future__ import annotations

import contextlib
import re

from kvist.tools.cursor import Cursor, MalformedCallError, Reading, Waiting, is_name
from kvist.tools.events import EventLog, ParserEvent
from kvist.tools.tables import NamedCall, Opening, ReasoningFormat, Region, ToolFormat, Written
from kvist.tools.values import BracketScanner

_MESSAGE, _START, _CHANNEL = "<|message|>", "<|start|>", "<|channel|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START, _CHANNEL)
_FIRSTS = (_CHANNEL, _START, " to=")  # of a message
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."
_HEADER_CHARS = 1024

HARMONY_TOOLS = ToolFormat(
    name="openai",
    template_marks=("<|channel|>", "<|constrain|>"),
    openings=(
        Opening(
            text="<|channel|>commentary to=functions.",
            part_of_call=True,
            region=Region(between="<|end|><|start|>assistant"),
        ),
    ),
    closings=_ENDS,
    calls=(
        NamedCall(
            begin="<|channel|>commentary to=functions.",
            arguments_begin="<|message|>",
            written=Written(name_begin="<|channel|>commentary to=functions.", name_end=" <|constrain|>json<|message|>"),
        ),
    ),
    content_begin="<|channel|>final<|message|>",
    has_one_call=True,
)
HARMONY_REASONING = ReasoningFormat(
    begin="<|channel|>analysis<|message|>",
    end="<|end|><|start|>assistant",
    closing="<|end|><|start|>assistant",
    content_begin="<|channel|>final<|message|>",
)


class HarmonyParser:
    """As `AnswerParser`."""

    def __init__(self, *, has_tools: bool) -> None:
        """`has_tools` False: calls are content."""
        self._has_tools = has_tools
        self._cursor, self._log = Cursor(), EventLog()
        self._reading = Reading(self._answer())

    def push(self, text: str) -> list[ParserEvent]:
        self._cursor.push(text)
        self._reading.go_on()
        return self._log.take()

    def finish(self) -> list[ParserEvent]:
        self._cursor.ended = True
        self._reading.go_on()
        return self._log.take()

    def _answer(self) -> Waiting[None]:
        cursor = self._cursor
        while (yield from cursor.char()) != "":
            found = yield from cursor.take_any(_FIRSTS)
            cursor.at = 0
            if not found:  # text without a header
                yield from self._body("final")
                continue
            try:
                header, _ = yield from cursor.until((_MESSAGE,), _HEADER_CHARS)
            except MalformedCallError:  # not a header
                self._log.content(cursor.commit())
                continue
            recipient = _RECIPIENT.search(header)
            name = recipient[1].removeprefix(_FUNCTIONS) if recipient is not None else ""
            if name and is_name(name) and self._has_tools:
                yield from self._call(name)
            else:
                cursor.commit()
                after = header.rpartition(_CHANNEL)[2].split()
                yield from self._body(after[0] if after else "final")

    def _body(self, channel: str, *, after_call: bool = False) -> Waiting[None]:
        """Show the text of a message. `after_call`: a mark that the end of the answer cuts off is left out."""
        cursor = self._cursor
        show = self._log.reasoning if channel == "analysis" else self._log.content
        while True:
            cursor.at, mark = cursor.decided(_ENDS)
            if after_call and cursor.ended and any(end.startswith(cursor.text) for end in _ENDS):
                cursor.commit()
            after_call = after_call and not cursor.at
            show(cursor.commit())
            if mark or cursor.ended:
                yield from self._end(mark)
                return
            yield

    def _call(self, name: str) -> Waiting[None]:
        """Show the arguments of a call. A message whose text is not an object is content, with its header."""
        cursor = self._cursor
        first = cursor.at
        with contextlib.suppress(MalformedCallError):  # too much white space
            yield from cursor.skip_space()
        if (yield from cursor.char()) != "{":
            cursor.at = first
            self._log.content(cursor.commit())
            yield from self._body("final")
            return
        cursor.commit()
        self._log.start(name)
        scanner = BracketScanner()
        while True:
            cursor.at = scanner.advance(cursor.text, 0)
            self._log.arguments(cursor.commit())
            if scanner.done or scanner.broken or cursor.ended:
                break
            yield
        if scanner.done:
            self._log.end()
            with contextlib.suppress(MalformedCallError):  # too much white space
                yield from cursor.skip_space()
            cursor.commit()
        yield from self._body("final", after_call=scanner.done)  # nothing, unless the call is malformed

    def _end(self, mark: str) -> Waiting[None]:
        """Read over the end of a message."""
        if mark and mark not in (_START, _CHANNEL):
            yield from self._cursor.take_any((mark,))
            self._cursor.commit()
