"""Words of messages that depend on a number."""

from __future__ import annotations


def amount(number: int, noun: str) -> str:
    """Return the number with its noun: "1 error", "2 errors"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
