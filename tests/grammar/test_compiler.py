"""Constraints are compiled once, off the caller's thread, and nothing that a constraint does can block another."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence

import pytest

from kvist.errors import ConfigError, InvalidConstraint, KvistError, Overloaded
from kvist.grammar import compiler as compiler_module
from kvist.grammar.backend import Grammar, Matcher, Vocabulary, Words
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.compiler import MAX_CONSTRAINT_BYTES, MAX_KEPT, NUM_THREADS, Compilation, GrammarCompiler
from kvist.request import Constraint
from kvist.testing.tokenizers import byte_tokenizer

WAIT_S = 20.0
VOCABULARY = Vocabulary(tokens=byte_tokenizer(), size=257, end_token_ids=(256,))


class SteppedBackend:
    """A real backend that holds back constraints of the kind regex until the test lets them go."""

    def __init__(self) -> None:
        self.vocabulary = VOCABULARY
        self.compiled: list[str] = []
        self.go_on = threading.Event()
        self._real = GRAMMAR_BACKENDS["llguidance"].make({}, VOCABULARY)

    def compile(self, constraint: Constraint) -> Grammar:
        if constraint.kind == "regex":
            self.compiled.append(constraint.text)
            assert self.go_on.wait(WAIT_S)
        if constraint.text == "crash":
            raise RuntimeError("a bug of the library")
        return self._real.compile(constraint)

    def accept(self, matchers: Sequence[Matcher], token_ids: Sequence[int]) -> dict[int, InvalidConstraint]:
        return self._real.accept(matchers, token_ids)

    def fill(self, matchers: Sequence[Matcher], allowed: Words) -> dict[int, InvalidConstraint]:
        return self._real.fill(matchers, allowed)


@pytest.fixture
def backend() -> SteppedBackend:
    return SteppedBackend()


@pytest.fixture
def compiler(backend: SteppedBackend) -> GrammarCompiler:
    return GrammarCompiler(lambda: backend)


def regex(text: str) -> Constraint:
    return Constraint(kind="regex", text=text)


def choice(text: str) -> Constraint:
    return Constraint(kind="choice", text=text)


def waits(compilation: Compilation) -> KvistError | None:
    """Wait until the compilation is done; return its error."""
    done = threading.Event()
    compilation.when_done(done.set)
    assert done.wait(WAIT_S)
    return compilation.error


def test_equal_constraints_are_compiled_once_also_while_the_first_is_being_compiled(
    compiler: GrammarCompiler, backend: SteppedBackend
) -> None:
    first, second = compiler.start(regex("a+")), compiler.start(regex("a+"))
    assert first is second
    backend.go_on.set()
    assert first.result(WAIT_S).matcher().accept([ord("a") - 33])
    assert compiler.start(regex("a+")) is first
    assert backend.compiled == ["a+"]
    totals = compiler.totals()
    assert (totals["grammars_compiled"], totals["grammar_cache_hits"], totals["grammar_failures"]) == (1, 2, 0)


def test_a_waiter_gives_up_at_its_deadline_and_the_next_one_finds_the_grammar(
    compiler: GrammarCompiler, backend: SteppedBackend
) -> None:
    slow = compiler.start(regex("a"))
    with pytest.raises(InvalidConstraint, match="grammar-compile-timeout-s"):
        slow.result(0.001)
    assert compiler.start(choice('["x"]')).result(WAIT_S)  # the other thread
    backend.go_on.set()
    assert compiler.start(regex("a")).result(WAIT_S)


def test_known_grammars_are_found_while_all_threads_are_busy(
    compiler: GrammarCompiler, backend: SteppedBackend
) -> None:
    known = compiler.start(choice('["x"]'))
    assert waits(known) is None
    stuck = [compiler.start(regex("a" * length)) for length in range(1, NUM_THREADS + 1)]
    assert compiler.start(choice('["x"]')).result(0.0)
    unknown = compiler.start(choice('["y"]'))
    with pytest.raises(InvalidConstraint):
        unknown.result(0.001)
    backend.go_on.set()
    assert all(waits(each) is None for each in [*stuck, unknown])


def test_a_full_queue_refuses_and_the_refusal_is_not_kept(
    compiler: GrammarCompiler, backend: SteppedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_WAITING", 1)
    for length in range(1, NUM_THREADS + 1):
        compiler.start(regex("a" * length))
        while len(backend.compiled) < length:
            threading.Event().wait(0.001)
    waiting, refused = compiler.start(choice('["x"]')), compiler.start(choice('["y"]'))
    with pytest.raises(Overloaded):
        refused.result(0.0)
    backend.go_on.set()
    assert waits(waiting) is None
    assert compiler.start(choice('["y"]')).result(WAIT_S)


def test_errors_are_kept_and_each_waiter_gets_its_own(compiler: GrammarCompiler) -> None:
    faulty = Constraint(kind="json_schema", text='{"properties": {"a": {"type": "strin"}}}')
    first = compiler.start(faulty)
    error = waits(first)
    assert isinstance(error, InvalidConstraint)
    assert error.param == "properties.a"
    assert compiler.start(faulty) is first
    raised = []
    for _ in range(2):
        with pytest.raises(InvalidConstraint) as caught:
            first.result(0.0)
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert compiler.totals()["grammar_failures"] == 1


def test_vllm_47312_a_bug_of_the_library_is_an_error_of_this_constraint_alone(
    compiler: GrammarCompiler, backend: SteppedBackend
) -> None:
    backend.go_on.set()
    error = waits(compiler.start(regex("crash")))
    assert isinstance(error, InvalidConstraint)
    assert "a bug of the library" in error.message
    assert compiler.start(regex("a")).result(WAIT_S)


@pytest.mark.parametrize(("name", "takes_old_drafts"), [("llguidance", True), ("xgrammar", False)])
def test_vllm_43920_no_constraint_decides_which_later_ones_can_be_compiled(name: str, takes_old_drafts: bool) -> None:
    pytest.importorskip(name)
    tuple_of_old_drafts = {"type": "array", "items": [{"type": "string"}]}
    constraints = [
        Constraint(kind="json_schema", text='{"type": "object", "properties": {"a": {"type": "null"}}}'),
        Constraint(kind="json_schema", text=json.dumps(tuple_of_old_drafts)),
        Constraint(kind="grammar", text='root ::= "a" | "b"'),
        choice('["x", "y"]'),
        regex("[0-9]+"),
    ]

    def outcomes(order: Sequence[Constraint]) -> dict[Constraint, str | None]:
        compiler = GrammarCompiler(lambda: GRAMMAR_BACKENDS[name].make({}, VOCABULARY))
        errors = {constraint: waits(compiler.start(constraint)) for constraint in order}
        assert all(error is None or isinstance(error, InvalidConstraint) for error in errors.values())
        return {constraint: error.message if error else None for constraint, error in errors.items()}

    forwards = outcomes(constraints)
    assert forwards == outcomes(constraints[::-1])
    refused = [constraint.text for constraint, error in forwards.items() if error]
    assert refused == ([] if takes_old_drafts else [json.dumps(tuple_of_old_drafts)])


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(kind="sql", text="x"),
        regex("a" * (MAX_CONSTRAINT_BYTES + 1)),
        regex("ü" * (MAX_CONSTRAINT_BYTES // 2 + 1)),
        regex("\ud800" * (MAX_CONSTRAINT_BYTES // 2)),
    ],
    ids=["kind", "bytes", "bytes in UTF-8", "not UTF-8"],
)
def test_constraints_over_the_limits_are_refused_without_a_thread(
    compiler: GrammarCompiler, backend: SteppedBackend, constraint: Constraint
) -> None:
    compilation = compiler.start(constraint)
    assert compilation.is_done
    assert isinstance(compilation.error, InvalidConstraint)
    assert not backend.compiled


def test_the_number_of_kept_grammars_is_bounded(compiler: GrammarCompiler, backend: SteppedBackend) -> None:
    backend.go_on.set()
    first = compiler.start(regex("first"))
    assert waits(first) is None
    for number in range(MAX_KEPT):
        assert waits(compiler.start(regex(f"r{number}"))) is None
    assert compiler.start(regex("first")) is not first
    last = compiler.start(regex(f"r{MAX_KEPT - 1}"))
    assert last.is_done


@pytest.mark.parametrize(
    "error", [ConfigError("no such package: pip install it"), RuntimeError("the vocabulary is broken")]
)
def test_a_backend_that_cannot_be_made_fails_every_constraint(error: Exception) -> None:
    def fail() -> SteppedBackend:
        raise error

    compiler = GrammarCompiler(fail)
    for text in ("a", "b"):
        found = waits(compiler.start(regex(text)))
        assert found is not None
        assert str(error) in found.message


def test_a_callback_runs_at_once_when_the_compilation_is_done(compiler: GrammarCompiler) -> None:
    calls: list[str] = []
    append: Callable[[str], None] = calls.append
    compilation = compiler.start(choice('["x"]'))
    assert waits(compilation) is None
    compilation.when_done(lambda: append("now"))
    assert calls == ["now"]
