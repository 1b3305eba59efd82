"""Compiles constraints on threads of its own, and keeps the grammars by content.

    start(constraint) ──known──► the same Compilation, perhaps done
                      └─unknown─► queue ──► a thread ──► done: a grammar, or an error

Equal constraints are compiled once, also when they arrive together. Errors are kept too. No caller has to wait for a
thread: each waiter gives up at its own deadline, while the compilation continues, bounded by the limits of the backend.
Such a compilation keeps its thread busy. If all threads are busy, further constraints wait in the queue, and are
refused when the queue is full.

One compiler belongs to one vocabulary, so equal constraints have equal grammars.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvist.clock import Clock, MonotonicClock
from kvist.errors import EngineError, InvalidConstraint, KvistError, Overloaded
from kvist.grammar.backend import Grammar, GrammarBackend, Matcher, Words
from kvist.grammar.counters import GRAMMAR_COUNTERS
from kvist.grammar.reasoning import ReasoningBackend
from kvist.request import CONSTRAINT_KINDS, Constraint

MAX_CONSTRAINT_BYTES = 256 << 10  # of its text
NUM_THREADS = 2
MAX_WAITING = 256  # constraints in the queue
MAX_KEPT = 512  # compiled constraints
MAX_KEPT_BYTES = 8 << 20  # of their texts; a grammar takes some ten times as much


class Compilation:
    """One constraint that is being compiled, or was. Safe to read from any thread."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self._done = threading.Event()
        self._grammar: Grammar | None = None
        self._error: KvistError | None = None
        self._callbacks: list[Callable[[], None]] | None = []  # None: called
        self._lock = threading.Lock()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    @property
    def error(self) -> KvistError | None:
        """Why the constraint has no grammar; None if it has one, or is not done."""
        return self._error

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the thread that compiles, or now if the compilation is done."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.append(callback)
                return
        callback()

    def result(self, timeout_s: float) -> Grammar:
        """Wait for the grammar. Raises `InvalidConstraint`, also when it takes too long, and `Overloaded`."""
        if not self._done.wait(timeout_s):
            raise InvalidConstraint.too_slow(timeout_s)
        if self._error is not None:
            # a new object: the raised one keeps the frames of this waiter alive
            raise type(self._error)(self._error.message, param=self._error.param)
        assert self._grammar is not None
        return self._grammar

    def finish(self, outcome: Grammar | KvistError) -> None:
        """Called once, by the compiler."""
        if isinstance(outcome, KvistError):
            self._error = outcome
        else:
            self._grammar = outcome
        self._done.set()
        with self._lock:
            callbacks, self._callbacks = self._callbacks or [], None
        for callback in callbacks:
            callback()


class GrammarCompiler:
    """Safe to use from several threads. Its threads do not keep the process alive."""

    def __init__(self, make_backend: Callable[[], GrammarBackend], clock: Clock | None = None) -> None:
        """`make_backend` is called on a thread of the compiler, soon; it reads the vocabulary, which takes a second.
        Its errors become the errors of all constraints."""
        self._make_backend = make_backend
        self._clock = clock or MonotonicClock()
        self._backend: GrammarBackend | KvistError | None = None
        self._backend_lock = threading.Lock()
        self._lock = threading.Lock()
        self._kept: OrderedDict[Constraint, Compilation] = OrderedDict()  # least recently used first
        self._kept_bytes = 0
        self._queue: queue.SimpleQueue[Compilation | None] = queue.SimpleQueue()
        self._totals = GRAMMAR_COUNTERS.zeros()
        for number in range(NUM_THREADS):
            threading.Thread(target=self._work, name=f"kvist-grammar-{number}", daemon=True).start()

    def start(self, constraint: Constraint) -> Compilation:
        """Return the compilation of the constraint, which was begun or is begun now. Does not wait."""
        with self._lock:
            known = self._kept.get(constraint)
            if known is not None:
                self._kept.move_to_end(constraint)
                self._totals["grammar_cache_hits"] += 1
                return known
            compilation = Compilation(constraint)
            if self._queue.qsize() >= MAX_WAITING:
                refusal: KvistError | None = Overloaded(f"{MAX_WAITING} constraints wait to be compiled: retry later")
            else:
                refusal = _refusal(constraint)
            if refusal is None:
                self._keep(compilation)
        if refusal is not None:
            compilation.finish(refusal)
        else:
            self._queue.put(compilation)
        return compilation

    def is_known(self, constraint: Constraint) -> bool:
        """Return whether the constraint has a grammar already; `start` need not be called then."""
        with self._lock:
            known = self._kept.get(constraint)
            if known is None or not known.is_done or known.error is not None:
                return False
            self._kept.move_to_end(constraint)
            self._totals["grammar_cache_hits"] += 1
            return True

    def accept(self, matchers: Sequence[Matcher], token_ids: Sequence[int]) -> dict[int, InvalidConstraint]:
        """See `GrammarBackend.accept`."""
        return self._backend_of_matchers().accept(matchers, token_ids)

    def fill(self, matchers: Sequence[Matcher], allowed: Words) -> dict[int, InvalidConstraint]:
        """See `GrammarBackend.fill`."""
        return self._backend_of_matchers().fill(matchers, allowed)

    def _backend_of_matchers(self) -> GrammarBackend:
        backend = self._ready_backend()
        assert not isinstance(backend, KvistError), "the backend has made these matchers"
        return backend

    def totals(self) -> dict[str, float]:
        """Return GRAMMAR_COUNTERS."""
        with self._lock:
            return dict(self._totals)

    def close(self) -> None:
        """End the threads that are idle, and the others after their work."""
        for _ in range(NUM_THREADS):
            self._queue.put(None)

    def _keep(self, compilation: Compilation) -> None:
        self._kept[compilation.constraint] = compilation
        self._kept_bytes += len(compilation.constraint.text)
        while len(self._kept) > MAX_KEPT or self._kept_bytes > MAX_KEPT_BYTES:
            dropped, _ = self._kept.popitem(last=False)  # its waiters still get the result
            self._kept_bytes -= len(dropped.text)

    def _work(self) -> None:
        self._ready_backend()
        while (compilation := self._queue.get()) is not None:
            start_s = self._clock.now_s()
            outcome = self._compile(compilation.constraint)
            with self._lock:
                self._totals["grammar_compile_seconds"] += self._clock.now_s() - start_s
                failed = isinstance(outcome, KvistError)
                self._totals["grammar_failures" if failed else "grammars_compiled"] += 1
            compilation.finish(outcome)

    def _compile(self, constraint: Constraint) -> Grammar | KvistError:
        backend = self._ready_backend()
        if isinstance(backend, KvistError):
            return backend
        try:
            return backend.compile(constraint)
        except KvistError as error:
            return error.with_traceback(None)
        except Exception as error:  # of the library; most probably the constraint is at fault
            return InvalidConstraint(f"the constraint cannot be compiled: {type(error).__name__}: {error}"[:500])

    def _ready_backend(self) -> GrammarBackend | KvistError:
        with self._backend_lock:
            if self._backend is None:
                try:
                    self._backend = ReasoningBackend(self._make_backend())
                    self._backend.compile(Constraint(kind="choice", text='["a"]'))  # reads the vocabulary
                except KvistError as error:
                    self._backend = error.with_traceback(None)
                except Exception as error:  # of the library
                    self._backend = EngineError(f"constraints cannot be compiled for this vocabulary: {error}"[:500])
            return self._backend


def _refusal(constraint: Constraint) -> InvalidConstraint | None:
    if constraint.kind not in CONSTRAINT_KINDS:
        return InvalidConstraint(
            f"the kind of constraint {constraint.kind!r} is unknown: {', '.join(CONSTRAINT_KINDS)}"
        )
    num_bytes = len(constraint.text.encode("utf-8", "surrogatepass")) + len(constraint.whitespace or "")
    if num_bytes > MAX_CONSTRAINT_BYTES:
        return InvalidConstraint(f"the constraint has {num_bytes} bytes; the limit is {MAX_CONSTRAINT_BYTES}")
    return None
