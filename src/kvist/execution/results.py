"""Results of operations: produced by the executor's event loop, read by the threads and coroutines of programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

from kvist.errors import ProgramTimeout
from kvist.planning.graph import Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How a request was served, as the server reports it. None: not reported."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    prefill_worker: str | None = None
    decode_worker: str | None = None
    num_requests: int = 1
    num_scored_tokens: int = 0

    @property
    def num_computed_tokens(self) -> int:
        return max(self.num_prompt_tokens - self.num_cached_tokens, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`texts`: one for each of the `n` answers. `meta`: what `get_meta_info` returns."""

    texts: tuple[str, ...]
    served: Served = Served()
    meta: Mapping[str, object] = field(default_factory=dict)


class Result:
    """The answer of one operation, perhaps to come. Pieces of the text arrive before it.

    The executor's loop calls `push`, then `finish` or `fail` once; any thread may wait.
    """

    def __init__(self, position: Position) -> None:
        self.position = position
        self._changed = threading.Condition()
        self._pieces: list[str] = []
        self._future: Future[Answer] = Future()

    def push(self, piece: str) -> None:
        with self._changed:
            self._pieces.append(piece)
            self._changed.notify_all()

    def finish(self, answer: Answer) -> None:
        if not self._future.done():
            with self._changed:
                whole = answer.texts[0]
                sent = "".join(self._pieces)
                if len(sent) < len(whole):
                    self._pieces.append(whole[len(sent) :])
                self._future.set_result(answer)
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        if not self._future.done():
            with self._changed:
                self._future.set_exception(error)
                self._changed.notify_all()

    def on_done(self, call: Callable[[Result], None]) -> None:
        """Call `call(result)` once the result is there, in the thread that brings it; at once if it is there."""
        self._future.add_done_callback(lambda _: call(self))

    @property
    def is_done(self) -> bool:
        return self._future.done()

    @property
    def error(self) -> BaseException | None:
        return self._future.exception() if self._future.done() else None

    def wait(self, timeout_s: float) -> Answer:
        """Return the answer. Raises its error, or `ProgramTimeout`."""
        try:
            return self._future.result(timeout_s)
        except FutureTimeout:
            raise self._too_late(timeout_s) from None

    async def wait_async(self, timeout_s: float) -> Answer:
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._future)), timeout_s)
        except TimeoutError:
            raise self._too_late(timeout_s) from None

    def _too_late(self, timeout_s: float) -> ProgramTimeout:
        return ProgramTimeout(
            f"{self.position}: the result is not there after {timeout_s:g} s: give the run a longer `timeout_s`"
        )

    def pieces(self, timeout_s: float) -> Iterator[str]:
        """Yield the text in pieces as they arrive. Raises as `wait`."""
        num_seen = 0

        def has_news() -> bool:
            return len(self._pieces) > num_seen or self._future.done()

        while True:
            with self._changed:
                if not self._changed.wait_for(has_news, timeout_s):
                    raise self._too_late(timeout_s)
                new, num_seen = self._pieces[num_seen:], len(self._pieces)
                done = self._future.done()
            yield from new
            if done:
                self.wait(0)
                return
