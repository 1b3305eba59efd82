"""The prompt of a state: one text with marks for the beginnings and ends of messages and for results to come.

One flat text makes every question about prefixes a question about texts: a common prefix is a common beginning, and
sorted prompts are in depth-first order of their prefix tree. The marks are lone surrogates, which no text that can be
sent contains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

OPEN, NAMED, CLOSE = "\udc01", "\udc02", "\udc03"  # OPEN role NAMED text CLOSE
HOLE, FILLED_BY = "\udc04", "\udc05"  # HOLE operation id FILLED_BY: the result of that operation
_HOLES = re.compile(f"{HOLE}(\\d+){FILLED_BY}")
_HEADS = re.compile(f"{OPEN}[^{NAMED}]*{NAMED}")
_UNSENDABLE = re.compile("[\ud800-\udfff]")


class PromptError(ValueError):
    """A part that cannot come at this place of a prompt. The message says what to change."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    text: str


def hole(operation_id: int) -> str:
    """Return the text that stands for the result of an operation until the result is known."""
    return f"{HOLE}{operation_id}{FILLED_BY}"


def holes_of(text: str) -> tuple[int, ...]:
    """Return the ids of the operations whose results the text needs, in order, without duplicates."""
    return tuple(dict.fromkeys(int(found) for found in _HOLES.findall(text)))


def filled(text: str, results: Mapping[int, str]) -> str:
    """Return the text with the holes of `results` replaced; the other holes stay."""

    def result(found: re.Match[str]) -> str:
        return results.get(int(found[1]), found[0])

    return _HOLES.sub(result, text) if HOLE in text else text


def unsendable(text: str) -> str | None:
    """Return the first character that UTF-8 cannot encode, outside of holes; None for a usual text."""
    found = _UNSENDABLE.search(_HOLES.sub("", text))
    return found[0] if found else None


def plain_text(outline: str) -> str:
    """Return the text of an outline, or of a part of one, without roles and marks."""
    return _HEADS.sub("", outline).replace(CLOSE, "")


def transcript_pieces(outline: str, start: int = 0) -> list[str | int]:
    """Return the texts and the operations whose results stand between them, in order, from the character `start` on:
    those of `Prompt.transcript`."""

    def shown_head(head: re.Match[str]) -> str:
        return f"{head[0][1:-1]}: " if start + head.start() == 0 else f"\n{head[0][1:-1]}: "

    shown = _HEADS.sub(shown_head, outline[start:])
    texts = _HOLES.split(shown.replace(CLOSE, ""))  # text, id, text, id, ..., text
    return [int(one) if index % 2 else one for index, one in enumerate(texts) if one]


def readable(text: str) -> str:
    """Return the text with readable marks: {3} for the result of operation 3."""
    for mark, shown in ((HOLE, "{"), (FILLED_BY, "}"), (OPEN, "<"), (NAMED, ">"), (CLOSE, "</>")):
        text = text.replace(mark, shown)
    return text


@dataclass(frozen=True, slots=True)
class Prompt:
    """Immutable: each method that adds a part returns a new prompt, and raises `PromptError` for a wrong place."""

    outline: str = ""

    @property
    def is_chat(self) -> bool:
        return self.outline.startswith(OPEN)

    @property
    def open_role(self) -> str | None:
        """The role of the message that has begun and not ended."""
        start = self.outline.rfind(OPEN)
        if start < 0 or self.outline.find(CLOSE, start) >= 0:
            return None
        return self.outline[start + 1 : self.outline.index(NAMED, start)]

    def with_open(self, role: str) -> Prompt:
        if self.outline and not self.is_chat:
            raise PromptError(f"a {role} message cannot follow text outside of messages: give that text a role, too")
        if self.open_role is not None:
            raise PromptError(f"a {role} message cannot begin inside of a {self.open_role} message: end that one first")
        return Prompt(f"{self.outline}{OPEN}{role}{NAMED}")

    def with_close(self, role: str) -> Prompt:
        if self.open_role != role:
            where = "outside of messages" if self.open_role is None else f"inside of a {self.open_role} message"
            raise PromptError(f"a {role} message cannot end {where}")
        return Prompt(self.outline + CLOSE)

    def with_text(self, text: str) -> Prompt:
        if text and self.is_chat and self.open_role is None:
            raise PromptError("text between messages has no role: put it into system(), user() or assistant()")
        return Prompt(self.outline + text)

    @property
    def holes(self) -> tuple[int, ...]:
        return holes_of(self.outline)

    def filled(self, results: Mapping[int, str]) -> Prompt:
        return Prompt(filled(self.outline, results))

    @property
    def known(self) -> Prompt:
        """The part before the first hole: what can be computed now."""
        return Prompt(self.outline.partition(HOLE)[0])

    @property
    def is_known(self) -> bool:
        return HOLE not in self.outline

    def beginning(self, num_chars: int) -> Prompt:
        """Return the longest prompt in the first `num_chars` of the outline: no role or hole is cut in two."""
        cut = self.outline[:num_chars]
        opened, holed = cut.rfind(OPEN), cut.rfind(HOLE)
        if opened >= 0 and cut.find(NAMED, opened) < 0:
            cut = cut[:opened]
        if 0 <= holed < len(cut) and cut.find(FILLED_BY, holed) < 0:
            cut = cut[:holed]
        return Prompt(cut)

    def messages(self) -> tuple[ChatMessage, ...]:
        """Return the messages of a known chat prompt; the last one may be open (`open_role`)."""
        found = []
        for part in self.outline.split(OPEN)[1:]:
            role, _, text = part.partition(NAMED)
            found.append(ChatMessage(role, text.removesuffix(CLOSE)))
        return tuple(found)

    def transcript(self) -> str:
        """Return the text as people read it: the messages without marks, one below the other."""
        if not self.is_chat:
            return self.outline
        return "\n".join(f"{message.role}: {message.text}" for message in self.messages())

    @property
    def num_chars(self) -> int:
        """The number of characters of text, without marks and roles."""
        return len(plain_text(self.outline))

    def num_chars_after(self, beginning: Prompt) -> int:
        """Return the number of characters of text that follow a beginning of this prompt."""
        return len(plain_text(self.outline[len(beginning.outline) :]))


def common_length(first: str, second: str, *, known: int = 0) -> int:
    """Return the length of the common beginning of two texts, of which `known` characters are known to be common."""
    shorter = min(len(first), len(second))
    if first[known:shorter] == second[known:shorter]:
        return shorter
    low, high = known, shorter  # first[:low] is common, first[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
