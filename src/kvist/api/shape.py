"""Bounds the memory that a JSON body can take, before the body is decoded.

The JSON decoder, written in C, holds the interpreter lock for the whole body: 8 MB of empty lists take 0.5 s and
200 MB. Values, texts and lists of a body are therefore counted first. Counting separators in the whole body takes a few
milliseconds and never counts too low. A body over a limit by that count is counted again, without the contents of its
texts.
"""

from __future__ import annotations

from kvist.errors import RequestError

MAX_VALUES = 1 << 20  # mostly token ids: 40 bytes each, 25 ms to decode
MAX_TEXTS = 1 << 17  # names of fields included
MAX_CONTAINERS = 1 << 16  # lists and objects
_SMALL_BYTES = 1 << 16  # a body of this size or less cannot exceed a limit


def check_shape(body: bytes | bytearray) -> None:
    """Raise `RequestError` for a body that would decode to more values than any request needs. Invalid JSON passes:
    the decoder refuses it."""
    if len(body) <= _SMALL_BYTES or _fits(*_count_all(body)):
        return
    num_values, num_texts, num_containers = _count_outside_texts(body)
    for kind, count, limit in (
        ("values", num_values, MAX_VALUES),
        ("texts and names", num_texts, MAX_TEXTS),
        ("lists and objects", num_containers, MAX_CONTAINERS),
    ):
        if count > limit:
            raise RequestError(f"the request body has more than {limit} {kind}, which is the limit for one request")


def _fits(num_values: int, num_texts: int, num_containers: int) -> bool:
    return num_values <= MAX_VALUES and num_texts <= MAX_TEXTS and num_containers <= MAX_CONTAINERS


def _count_all(body: bytes | bytearray) -> tuple[int, int, int]:
    return body.count(b","), body.count(b'"') // 2, body.count(b"[") + body.count(b"{")


def _count_outside_texts(body: bytes | bytearray) -> tuple[int, int, int]:
    """Count values, texts and containers, up to the first exceeded limit."""
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
    """Return the index of the quote that ends the text, or -1."""
    closing = body.find(b'"', opening + 1)
    while closing > 0:
        first = closing
        while body[first - 1] == 0x5C:  # a backslash; the loop ends at the opening quote at the latest
            first -= 1
        if (closing - first) % 2 == 0:
            return closing
        closing = body.find(b'"', closing + 1)
    return -1
