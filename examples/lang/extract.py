"""Typed objects from documents: the instructions are one prefix, the schema is compiled once."""

from __future__ import annotations

from typing import Any

import msgspec

import kvist.lang as kv
from texts import run_example, sentences


class Event(msgspec.Struct):
    subject: str
    year: int


@kv.function
def extract(s: kv.State, document: str) -> object:
    s += kv.system("Extract the first event of a document as JSON: who did something, and in which year. " * 8)
    s += kv.user("Document: " + document)
    s += kv.assistant(kv.gen("event", max_tokens=48, type=Event))
    try:
        return s["event"]
    except kv.ProgramError:  # the model wrote too long a text
        return None


def arguments(count: int = 50, length: int = 1) -> list[dict[str, Any]]:
    return [{"document": sentences(number, 12 * length)} for number in range(count)]


if __name__ == "__main__":
    run_example(extract, arguments(5), lambda state: state.ret_value)
