"""The parts of an answer, in the order of its text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentPiece:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    index: int  # of the call within the answer, from 0
    name: str
    call_id: str = ""  # the id that the model wrote, or ""


@dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    index: int
    text: str  # the pieces of a call together are one JSON object


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The arguments of the call are complete. An answer may end before that."""

    index: int


ParserEvent = ContentPiece | ReasoningPiece | CallStarted | ArgumentsPiece | CallEnded


class EventLog:
    """Collects events and joins adjacent pieces. Owned by one parser."""

    def __init__(self) -> None:
        self._events: list[ParserEvent] = []
        self.num_calls = 0  # started so far

    def content(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, ContentPiece):
            self._events[-1] = ContentPiece(last.text + text)
        elif text:
            self._events.append(ContentPiece(text))

    def reasoning(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, ReasoningPiece):
            self._events[-1] = ReasoningPiece(last.text + text)
        elif text:
            self._events.append(ReasoningPiece(text))

    def start(self, name: str, call_id: str = "") -> None:
        self._events.append(CallStarted(self.num_calls, name, call_id))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Add to the arguments of the last call."""
        index = self.num_calls - 1
        last = self._events[-1] if self._events else None
        if isinstance(last, ArgumentsPiece):
            self._events[-1] = ArgumentsPiece(index, last.text + text)
        elif text:
            self._events.append(ArgumentsPiece(index, text))

    def end(self) -> None:
        self._events.append(CallEnded(self.num_calls - 1))

    def take(self) -> list[ParserEvent]:
        taken, self._events = self._events, []
        return taken
