"""The parser of one answer. Life: reasoning, if the answer begins with it → content and regions of calls, in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from kvist.tools.bodies import CallReader
from kvist.tools.cursor import MAX_SPACE_CHARS, Cursor, MalformedCallError, Reading, Waiting
from kvist.tools.events import EventLog, ParserEvent
from kvist.tools.tables import Opening, ReasoningFormat, ToolFormat
from kvist.tools.values import types_of

_STRAY = frozenset("}]) \n")  # may stand between a call and its end
_MAX_STRAY_CHARS = 16
_PIECE_CHARS = 4096  # a longer text is parsed in pieces: committing copies the rest of a piece


class AnswerParser:
    def __init__(
        self,
        tools: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        *,
        reasoning_open: bool = False,
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        """`reasoning_open`: the prompt has opened the reasoning. `parameters`: the JSON Schema of the parameters, by
        name of the function."""
        self._tools = tools
        self._reasoning = reasoning
        self._reasoning_open = reasoning_open
        types = {name: _types_of_all(schema) for name, schema in (parameters or {}).items()}
        self._cursor, self._log = Cursor(), EventLog()
        if tools is not None:
            self._any = CallReader(tools, self._cursor, self._log, types)
            self._known = CallReader(tools, self._cursor, self._log, types, accepts=types.__contains__)
        self._openings = {opening.text: opening for opening in (tools.openings if tools is not None else ())}
        self._anywhere = tuple(text for text, opening in self._openings.items() if not opening.only_first)
        self._reading = Reading(self._answer())

    def push(self, text: str) -> list[ParserEvent]:
        """Return what the text adds to the answer."""
        for start in range(0, len(text), _PIECE_CHARS):
            self._cursor.push(text[start : start + _PIECE_CHARS])
            self._reading.go_on()
        return self._log.take()

    def finish(self) -> list[ParserEvent]:
        """End the answer and return the rest."""
        self._cursor.ended = True
        self._reading.go_on()
        assert self._reading.is_done, "the end of the text decides everything"
        return self._log.take()

    def _answer(self) -> Waiting[None]:
        cursor = self._cursor
        drops_space = yield from self._read_reasoning()
        openings = tuple(self._openings)
        while True:
            try:
                yield from cursor.skip_space()
                found = yield from cursor.take_any(openings)
            except MalformedCallError:  # too much white space
                found = ""
            openings = self._anywhere  # the others count at the start only
            if not found and (yield from cursor.char()) == "":
                break
            if found:
                yield from self._read_region(self._openings[found])
            else:
                space = cursor.commit()
                self._log.content("" if drops_space else space)
            drops_space = False
            if not found or cursor.at:
                self._log.content(cursor.commit())
                yield from self._read_content()
        if self._log.num_calls == 0 and not drops_space:
            self._log.content(cursor.commit())  # an answer of white space

    def _read_reasoning(self) -> Waiting[bool]:
        """Return whether the answer begins with reasoning."""
        cursor, form = self._cursor, self._reasoning
        if form is None:
            return False
        found = ""
        with contextlib.suppress(MalformedCallError):  # too much white space
            yield from cursor.skip_space()
            found = yield from cursor.take_any((form.begin,))
        if not found and not self._reasoning_open:
            cursor.at = 0
            return False
        cursor.commit()
        with contextlib.suppress(MalformedCallError):
            yield from cursor.skip_space()
        cursor.commit()
        while True:
            end, mark = cursor.decided((form.end,))
            text = cursor.text[:end]
            tail = text[-MAX_SPACE_CHARS:]
            num_space = len(tail) - len(tail.rstrip())
            if not mark and cursor.ended:
                num_space = 0
            cursor.at = end - num_space
            self._log.reasoning(cursor.commit())
            if mark:
                cursor.at = num_space + len(mark)
                cursor.commit()
                return True
            if cursor.ended:
                return True
            yield

    def _read_content(self) -> Waiting[None]:
        """Show text up to the next opening."""
        cursor = self._cursor
        while True:
            if self._anywhere:
                cursor.at, mark = cursor.decided(self._anywhere)
            else:
                cursor.at, mark = len(cursor.text), ""
            self._log.content(cursor.commit())
            if mark or cursor.ended:
                return
            yield

    def _read_region(self, opening: Opening) -> Waiting[None]:
        """Read calls after an opening, which is withheld. Other text stays withheld."""
        cursor, form = self._cursor, self._tools
        assert form is not None
        if opening.part_of_call:
            cursor.at -= len(opening.text)
        reader = self._known if opening.only_first else self._any
        num_before = self._log.num_calls
        by_begin = {call.begin: call for call in form.calls}
        marks = (*form.closings, *form.separators, *filter(None, by_begin))
        try:
            if form.leads:
                yield from cursor.skip_space()
                yield from cursor.take_any(form.leads)
            while True:
                yield from cursor.skip_space()
                has_call = self._log.num_calls > num_before
                mark = yield from cursor.take_any(marks)
                if mark in form.closings or ((yield from cursor.char()) == "" and not mark):
                    if self._is_cut_mark(mark + cursor.text[cursor.at :]):
                        cursor.at = len(cursor.text)
                    break
                if mark in form.separators and has_call:
                    yield from cursor.skip_space()
                    mark = yield from cursor.take_any(tuple(filter(None, by_begin)))
                elif not mark and has_call:
                    if (yield from self._skip_stray_brackets()):
                        continue
                    if not self._is_cut_mark(cursor.text[cursor.at :]):
                        cursor.at = 0  # text after a call
                        return
                    cursor.at = len(cursor.text)
                    break
                if mark not in by_begin:
                    raise MalformedCallError
                num_whole = self._log.num_calls
                try:
                    yield from reader.read(by_begin[mark])
                except MalformedCallError:
                    if self._log.num_calls == num_whole:
                        raise
                    yield from cursor.skip_space()
                    mark = yield from cursor.take_any((*form.closings, *form.restarts))
                    if mark and mark in by_begin:
                        cursor.at -= len(mark)
                        continue
                    if mark in self._openings:
                        cursor.at = 0
                        return
                    if not mark and not self._is_cut_mark(cursor.text[cursor.at :]):
                        raise
                    cursor.at = cursor.at if mark else len(cursor.text)
                    cursor.commit()
                    if mark not in form.ends:
                        break
        except MalformedCallError:
            cursor.at = max(cursor.at, 1) if cursor.text else 0
            return
        if self._log.num_calls > num_before:
            cursor.commit()

    def _skip_stray_brackets(self) -> Waiting[bool]:
        """Read over brackets after a call that close nothing, if a mark follows, and over the end of the call. Return
        whether there are any."""
        cursor, form = self._cursor, self._tools
        assert form is not None
        first = cursor.at
        while cursor.at - first < _MAX_STRAY_CHARS and (yield from cursor.char()) in _STRAY:
            cursor.at += 1
        at = cursor.at
        mark = (yield from cursor.take_any(form.restarts)) if at > first else ""
        if not mark:
            cursor.at = first
            return False
        cursor.at = cursor.at if mark in form.ends else at
        cursor.commit()
        return True

    def _is_cut_mark(self, rest: str) -> bool:
        """Return whether the answer ended inside the mark after a call, which is not shown."""
        form = self._tools
        assert form is not None
        marks = (*form.closings, *form.separators, *form.restarts)
        return self._cursor.ended and any(mark.startswith(rest) for mark in marks)


def _types_of_all(schema: object) -> dict[str, frozenset[str]]:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(schema, Mapping) or not isinstance(properties, Mapping):
        return {}
    return {str(name): types_of(one, schema) for name, one in properties.items()}
