"""A fault of a manifest: the field, what is wrong with it, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """`text` goes on from the field: "replicas: -1 is less than 0"."""

    field: str  # its path within the document, with dots; "" is the document
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.text}: {self.remedy}" if self.field else f"{self.text}: {self.remedy}"
