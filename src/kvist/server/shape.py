"""Bounds how much a JSON body can become in memory, before it is decoded.

A decoder in C holds the interpreter lock from the first byte to the last: 8 MB of empty lists take it half a second and
200 MB. So the values, texts and lists of a body are counted first. Counting separators in all of the body takes a few
milliseconds and is never too low; only a body that is over a limit by that count is looked at closely, where what
stands inside texts does not count.
"""

from __future__ import annotations

from kvist.errors import RequestError

MAX_VALUES = 1 << 20  # mostly token ids: 40 bytes each, 25 ms to decode
MAX_TEXTS = 1 << 17  # names of fields included
MAX_CONTAINERS = 1 << 16  # lists and objects
_SMALL_BYTES = 1 << 16  # nothing in so short a body can be over a limit


def check_shape(body: bytes | bytearray) -> None:
    """Raises `RequestError` for a body that would decode to more than a request of any size needs. Says nothing of a
    body that is no JSON at all."""
    if len(body) <= _SMALL_BYTES or _fits(*_count_all(body)):
        return
    num_values, num_texts, num_containers = _count_outside_texts(body)
    for what, count, limit in (
        ("values", num_values, MAX_VALUES),
        ("texts and names", num_texts, MAX_TEXTS),
        ("lists and objects", num_containers, MAX_CONTAINERS),
    ):
        if count > limit:
            raise RequestError(f"the request body holds more than {limit} {what}, which is the limit for one request")


def _fits(num_values: int, num_texts: int, num_containers: int) -> bool:
    return num_values <= MAX_VALUES and num_texts <= MAX_TEXTS and num_containers <= MAX_CONTAINERS


def _count_all(body: bytes | bytearray) -> tuple[int, int, int]:
    return body.count(b","), body.count(b'"') // 2, body.count(b"[") + body.count(b"{")


def _count_outside_texts(body: bytes | bytearray) -> tuple[int, int, int]:
    """As far as the first limit that is passed: values, texts, containers."""
    num_values = num_texts = num_containers = 0
    start = 0
    while _fits(num_values, num_texts, num_containers):
        opening = body.find(b'"', start)
        end = len(body) if opening < 0 else opening
        num_values += body.count(b",", start, end)
        num_containers += body.count(b"[", start, end) + body.count(b"{", start, end)
        if opening < 0:
            break
        num_texts += 1
        closing = _end_of_text(body, opening)
        if closing < 0:
            break
        start = closing + 1
    return num_values, num_texts, num_containers


def _end_of_text(body: bytes | bytearray, opening: int) -> int:
    """Where the quote stands that ends the text; -1: nowhere."""
    closing = body.find(b'"', opening + 1)
    while closing > 0:
        first = closing
        while body[first - 1] == 0x5C:  # a backslash; the opening quote is none, so that this ends there
            first -= 1
        if (closing - first) % 2 == 0:
            return closing
        closing = body.find(b'"', closing + 1)
    return -1
