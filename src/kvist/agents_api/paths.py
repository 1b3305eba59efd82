"""Renames the fields of a chat, in errors, to the fields of the request that the chat was made from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from kvist.errors import KvistError

T = TypeVar("T")


class RequestPaths:
    """Mutable while a request is converted; owned by the conversion."""

    def __init__(self, fixed: dict[str, str]) -> None:
        """`fixed`: names that differ in every request, by name in the chat."""
        self._own = dict(fixed)

    def add(self, in_chat: str, own: str) -> None:
        self._own[in_chat] = own

    def renamed(self, param: str) -> str:
        return self._pattern("^", "$").sub(lambda found: self._own[found[1]], param)

    def checked(self, call: Callable[[], T]) -> T:
        """Return what `call` returns. An error that it raises names the fields of the request."""
        try:
            return call()
        except KvistError as error:
            if error.param is not None:
                error.message = self._pattern("`", "`").sub(lambda found: "`" + self._own[found[1]], error.message)
                error.param = self.renamed(error.param)
            raise

    def _pattern(self, before: str, after: str) -> re.Pattern[str]:
        names = sorted(self._own, key=len, reverse=True)  # the longest path first
        return re.compile(f"{before}({'|'.join(map(re.escape, names))})(?={after}|[.\\[])")
