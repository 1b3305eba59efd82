"""The state that a run returns: the program's own state, with its streams, its explanation and what it returned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from kvist.errors import ProgramError
from kvist.execution.explaining import explained
from kvist.execution.report import Report
from kvist.lang.live_program import LiveProgram
from kvist.lang.positions import here
from kvist.lang.program import Variable
from kvist.lang.state import State
from kvist.planning.explanation import Explanation
from kvist.planning.prompt import transcript_pieces


class ProgramState(State):
    """Mutable; owned by its program while it runs, read by the caller of `run`."""

    def __init__(self, program: LiveProgram, report: Report) -> None:
        super().__init__(program)
        self._live = program
        self._report = report
        self.ret_value: object = None  # what the program's function returned
        self._error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        self._error = error

    def error(self) -> BaseException | None:
        """Return what ended the program early; None for a program that is complete or still runs."""
        return self._error

    @property
    def live(self) -> LiveProgram:
        """The program itself, for those who run it."""
        return self._live

    @property
    def report(self) -> Report:
        """The figures of the whole run or batch."""
        return self._report

    def explain(self) -> Explanation:
        """Return the plan of this program beside what happened, so far."""
        return explained(self._live.graph(), self._report)

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Yield the text of a variable, or `text()` of the whole state, in pieces as it is generated. Raises
        `ProgramError`."""
        if var_name is not None:
            yield from self._variable(var_name).result.pieces(self._live.timeout_s)
            return
        seen = 0
        while True:
            ended = self._live.has_ended
            outline = self.prompt.outline
            for piece in transcript_pieces(outline, seen):
                if isinstance(piece, str):
                    yield piece
                else:
                    yield from self._live.variables[piece].result.pieces(self._live.timeout_s)
            seen = len(outline)
            if ended:
                break
            if seen == len(self.prompt.outline):
                self._live.wait_for_more(self._live.timeout_s)
        if self._error is not None:
            raise self._error

    async def text_async_iter(self, var_name: str | None = None) -> AsyncIterator[str]:
        """The twin of `text_iter` for coroutines."""
        pieces = self.text_iter(var_name)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def _variable(self, name: str) -> Variable:
        """Wait until the program has the variable."""
        while name not in self and not self._live.has_ended:
            self._live.wait_for_more(self._live.timeout_s)
        if self._error is not None and name not in self:
            raise self._error
        found = self._find(name)
        if not isinstance(found, Variable):
            raise ProgramError(f"{here()}: {name!r} is not the result of one generation, and cannot be streamed")
        return found
