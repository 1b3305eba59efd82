"""Starts the compilations that the scheduler asks for, and reports the end of each to the loop."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable

from kvist.grammar.compiler import Compilation, GrammarCompiler
from kvist.plan.events import Event
from kvist.plan.grammars import CompileGrammar, GrammarCompiled
from kvist.request import RequestId
from kvist.wire import Submit


class GrammarJobs:
    """Mutable; owned by the engine loop. The threads of the compiler fill the queue of ends."""

    def __init__(self, compiler: GrammarCompiler, wakeup: Callable[[], None]) -> None:
        self._compiler = compiler
        self._wakeup = wakeup
        self.num_open = 0  # started and not reported
        self._done: queue.SimpleQueue[tuple[RequestId, Compilation]] = queue.SimpleQueue()

    def start(self, job: CompileGrammar) -> None:
        self.num_open += 1
        compilation = self._compiler.start(job.constraint)
        compilation.when_done(lambda: self._on_done(job.request_id, compilation))

    def known(self, events: Iterable[Event]) -> list[GrammarCompiled]:
        """Return the reports for the new requests among `events` whose grammars were compiled before. With the report
        beside it, such a request is in time for the next batch."""
        requests = [event.request for event in events if isinstance(event, Submit)]
        return [
            GrammarCompiled(request_id=request.request_id)
            for request in requests
            if request.sampling.constraint is not None and self._compiler.is_known(request.sampling.constraint)
        ]

    def poll(self) -> list[GrammarCompiled]:
        """Return the reports since the last call."""
        reports: list[GrammarCompiled] = []
        while not self._done.empty():
            request_id, compilation = self._done.get()
            self.num_open -= 1
            error = compilation.error
            report = GrammarCompiled(
                request_id=request_id,
                error_code=None if error is None else error.code,
                message="" if error is None else error.message,
            )
            reports.append(report)
        return reports

    def totals(self) -> dict[str, float]:
        return self._compiler.totals()

    def _on_done(self, request_id: RequestId, compilation: Compilation) -> None:
        self._done.put((request_id, compilation))
        self._wakeup()
