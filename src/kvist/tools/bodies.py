"""Reads one call in each style. The text of a call is withheld until its name is certain; arguments are then shown as
they arrive. A call that turns out to be malformed later keeps the arguments shown so far. After a wrong bracket, all
text up to the next mark of the format is part of them, as the model wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from kvist.tools.cursor import HELD_CHARS, Cursor, MalformedCallError, Waiting, is_name
from kvist.tools.events import EventLog
from kvist.tools.tables import Call, JsonCall, NamedCall, TaggedCall, ToolFormat
from kvist.tools.values import (
    PYTHON_QUOTES,
    BracketScanner,
    bracketed,
    content_of,
    escaped,
    json_string,
    json_value,
    python_call,
    typed,
)

ParameterTypes = Mapping[str, Mapping[str, frozenset[str]]]  # function → parameter → JSON types
_KEY_CHARS = 256


class CallReader:
    def __init__(
        self,
        form: ToolFormat,
        cursor: Cursor,
        log: EventLog,
        types: ParameterTypes,
        *,
        accepts: Callable[[str], bool] | None = None,
    ) -> None:
        """`accepts` decides which names may be called; None accepts every name, and calls are then between marks."""
        self._closings = form.call_closings
        self._restarts = form.restarts
        self._breaks = tuple(mark for mark in form.restarts if mark[0] in "[{(")
        self._cursor = cursor
        self._log = log
        self._types = types
        self._accepts = accepts

    def read(self, call: Call) -> Waiting[None]:
        """Read one call, whose `begin` has been read. Raises `MalformedCallError`."""
        if isinstance(call, JsonCall):
            yield from self._json(call)
        elif isinstance(call, NamedCall):
            yield from self._named(call)
        elif isinstance(call, TaggedCall):
            yield from self._tagged(call)
        else:
            yield from self._python()

    def _start(self, name: str, own_id: str = "") -> None:
        if not is_name(name) or (self._accepts is not None and not self._accepts(name)):
            raise MalformedCallError
        self._log.start(name, own_id)

    def _complete(self, arguments: str = "") -> None:
        self._log.arguments(arguments)
        self._log.end()
        self._cursor.commit()

    def _json(self, call: JsonCall) -> Waiting[None]:
        cursor = self._cursor
        name, held, started, is_ended = "", "", False, False
        while True:
            yield from cursor.skip_space()
            key = yield from json_string(cursor)
            yield from cursor.skip_space()
            yield from cursor.expect((":",))
            yield from cursor.skip_space()
            if key == call.name_key and not name:
                name = yield from json_string(cursor)
                if held:
                    self._start(name)
                    self._log.arguments(held)
                    started = True
            elif key in call.argument_keys and not started and not held:
                if name and (yield from cursor.char()) == "{":
                    self._start(name)
                    started = True
                    yield from self._stream_object(self._closings)
                else:
                    held = _object_text((yield from json_value(cursor)))
                    if name:
                        self._start(name)
                        self._log.arguments(held)
                        started = True
            else:
                yield from json_value(cursor)
            if started:
                if not is_ended:
                    self._log.end()  # an outer brace that is missing makes no arguments incomplete
                is_ended = True
                cursor.commit()
            elif cursor.at > HELD_CHARS:
                raise MalformedCallError
            yield from cursor.skip_space()
            if (yield from cursor.expect((",", "}"))) == "}":
                break
        if not name:
            raise MalformedCallError
        if started:
            cursor.commit()
        else:
            self._start(name)
            self._complete("{}")

    def _named(self, call: NamedCall) -> Waiting[None]:
        cursor = self._cursor
        yield from cursor.skip_space()
        name = yield from cursor.name()
        own_id = name if call.name_is_id else ""
        if call.name_is_id:
            name = name.removeprefix("functions.").rpartition(":")[0] or name.removeprefix("functions.")
        yield from cursor.skip_space()
        if call.id_begin and (yield from cursor.take_any((call.id_begin,))):
            own_id = yield from cursor.name()
            yield from cursor.skip_space()
        yield from cursor.take_any((call.arguments_begin,))
        yield from cursor.skip_space()
        if (yield from cursor.char()) != "{":
            raise MalformedCallError
        self._start(name, own_id)
        yield from self._stream_object(self._restarts)
        self._complete()
        yield from cursor.skip_space()
        if (yield from cursor.take_any(call.ends)):
            cursor.commit()

    def _stream_object(self, restarts: Sequence[str]) -> Waiting[None]:
        """Show a JSON object as it arrives. After a wrong bracket, all text up to one of `restarts` is shown."""
        cursor, scanner = self._cursor, BracketScanner(breaks=self._breaks)
        cursor.commit()
        while True:
            cursor.at = scanner.advance(cursor.text, 0)
            self._log.arguments(cursor.commit())
            if scanner.done:
                return
            if scanner.broken and restarts and self._accepts is None:
                yield from self._show_up_to(restarts)
            if scanner.broken or cursor.ended:
                raise MalformedCallError
            yield

    def _show_up_to(self, marks: Sequence[str]) -> Waiting[None]:
        cursor = self._cursor
        while True:
            end, mark = cursor.decided(marks)
            cursor.at = end if mark else cursor.cut_end(marks)
            self._log.arguments(cursor.commit())
            if mark or cursor.ended:
                return
            yield

    def _tagged(self, call: TaggedCall) -> Waiting[None]:
        cursor = self._cursor
        name = yield from cursor.name()
        if call.name_end:
            yield from cursor.expect((call.name_end,))
        types, num_keys = self._types.get(name, {}), 0
        ends = (call.end, *self._restarts)
        while True:
            yield from cursor.skip_space()
            mark = yield from cursor.expect((call.key_begin, *(ends if num_keys else (call.end,))))
            if num_keys == 0:
                self._start(name)
                self._log.arguments("{")
            if mark in ends:
                break
            key, _ = yield from cursor.until((call.key_end,), _KEY_CHARS)
            if call.value_begin:
                yield from cursor.skip_space()
                yield from cursor.expect((call.value_begin,))
            elif call.newlines:
                yield from cursor.take_any(("\n",))
            cursor.commit()
            self._log.arguments(f"{', ' if num_keys else ''}{json.dumps(key.strip(), ensure_ascii=False)}: ")
            yield from self._value(call, types.get(key.strip(), frozenset()))
            num_keys += 1
        if call.end_is_closing or mark != call.end:
            cursor.at -= len(mark)
        self._complete("}")

    def _value(self, call: TaggedCall, types: frozenset[str]) -> Waiting[None]:
        cursor = self._cursor
        ends = (call.value_end, *call.value_breaks)
        ends = (*ends, *("\n" + end for end in ends)) if call.newlines else ends
        if types - {"string"}:
            try:
                text, end = yield from cursor.until(ends, HELD_CHARS)
            except MalformedCallError:  # too long, or cut off: shown as a string
                cursor.at = 0
                at, end = self._last_break(call)
                text = cursor.text[:at]
            if end:
                self._log.arguments(typed(text, types))
                self._end_value(call, len(text), end)
                return
        self._log.arguments('"')
        while True:
            cursor.at, end = cursor.decided(ends)
            if not end:
                cursor.at, end = self._last_break(call, cursor.at)
            self._log.arguments(escaped(cursor.commit()))
            if end:
                break
            if cursor.ended:
                raise MalformedCallError
            yield
        self._end_value(call, 0, end)
        self._log.arguments('"')

    def _end_value(self, call: TaggedCall, at: int, end: str) -> None:
        """Read over the end at `at`, but not over a break."""
        is_whole = end.endswith(call.value_end)
        self._cursor.at = at + (len(end) if is_whole else end.startswith("\n"))
        self._cursor.commit()

    def _last_break(self, call: TaggedCall, at: int = 0) -> tuple[int, str]:
        """Return where the end of the text is that of a call without `value_end`, and that end; `at` and "" if it is
        not."""
        text = self._cursor.text
        for end in (call.end, *self._closings) if self._cursor.ended and call.value_breaks else ():
            found = text.rfind(end)
            if found >= 0 and any(each.startswith(text[found:]) for each in call.value_breaks):
                has_line = call.newlines and text[:found].endswith("\n")
                return found - has_line, "\n" * has_line + end
        return at, ""

    def _python(self) -> Waiting[None]:
        cursor = self._cursor
        first = cursor.at
        yield from cursor.name()
        if (yield from cursor.char()) != "(":
            raise MalformedCallError
        yield from bracketed(cursor, PYTHON_QUOTES)
        name, arguments = python_call(cursor.text[first : cursor.at])
        self._start(name)
        self._complete(arguments)


def _object_text(value: str) -> str:
    """Return the JSON object that is written as an object, as a string that contains one, or as null."""
    if value.startswith("{"):
        return value
    inner = "{}" if value == "null" else content_of(value).strip()
    try:
        is_object = isinstance(json.loads(inner), dict)
    except (ValueError, RecursionError) as error:
        raise MalformedCallError from error
    if not is_object:
        raise MalformedCallError
    return inner
