"""Answers of one grammar do not wait for each other, and do not use up the limits of each other."""

from __future__ import annotations

import llguidance
import numpy as np
import pytest

from kvist.errors import InvalidConstraint
from kvist.grammar import copies
from kvist.grammar import llguidance as backend_module
from kvist.grammar.backend import Vocabulary
from kvist.grammar.copies import LlguidanceGrammar, LlguidanceMatcher
from kvist.grammar.llguidance import LlguidanceBackend
from kvist.request import Constraint
from kvist.testing.tokenizers import byte_tokenizer
from kvist.testing.waits import wait_until

TOKENS = byte_tokenizer()
END_ID = 256
VOCABULARY = Vocabulary(tokens=TOKENS, size=257, end_token_ids=(END_ID,))
MANY_STATES = "(a|b)*a(a|b){9}"  # each text of a and b leads to a state of its own, up to 1024


def ids(text: str) -> list[int]:
    return TOKENS.encode(text)


def compiled(text: str) -> LlguidanceGrammar:
    return LlguidanceBackend(VOCABULARY).compile(Constraint(kind="regex", text=text))


def mask_of(matcher: LlguidanceMatcher) -> list[int]:
    words = np.zeros(VOCABULARY.num_words, dtype=np.int32)
    matcher.fill(words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def write(matcher: LlguidanceMatcher, text: str) -> None:
    for token_id in ids(text):
        assert token_id in mask_of(matcher)
        assert matcher.accept([token_id])


def texts(count: int) -> list[str]:
    return [format(37 * number % 512, "09b").replace("0", "a").replace("1", "b") * 2 for number in range(count)]


def test_a_grammar_with_many_answers_gets_copies_and_at_most_one_for_each_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_module, "_NUM_MASK_THREADS", 3)
    grammar = compiled("[ab]+")
    answers = [grammar.matcher() for _ in range(4)]
    assert grammar.num_copies == 1

    def has_all_copies() -> bool:
        answers.append(grammar.matcher())
        return grammar.num_copies == 3

    wait_until(has_all_copies, "two more copies")
    answers.clear()
    answers += [grammar.matcher() for _ in range(40)]
    assert grammar.num_copies == 3
    by_copy = [sum(each.copy_id == copy_id for each in answers) for copy_id in {each.copy_id for each in answers}]
    assert max(by_copy) - min(by_copy) <= 1
    assert {tuple(mask_of(each)) for each in answers} == {tuple(sorted(ids("ab")))}


@pytest.mark.parametrize("together", [False, True])
def test_answers_go_on_when_earlier_ones_have_used_the_states_of_the_lexer(
    monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    monkeypatch.setattr(backend_module, "_NUM_MASK_THREADS", 2)
    monkeypatch.setattr(
        backend_module, "_LIMITS", llguidance.LLParserLimits(max_lexer_states=200, verbose_errors=False)
    )
    monkeypatch.setattr(copies, "_MAX_COMPILE_S", 10.0)
    backend = LlguidanceBackend(VOCABULARY)
    grammar = backend.compile(Constraint(kind="regex", text=MANY_STATES))
    if not together:
        for text in texts(60):
            write(grammar.matcher(), text)
        return
    answers = [grammar.matcher() for _ in range(40)]
    words = np.zeros((len(answers), VOCABULARY.num_words), dtype=np.int32)
    for tokens in zip(*map(ids, texts(len(answers))), strict=True):
        assert backend.fill(answers, words) == {}
        assert backend.accept(answers, tokens) == {}
    assert [mask_of(each) for each in answers] == [mask_of(replayed(text)) for text in texts(len(answers))]


def replayed(text: str) -> LlguidanceMatcher:
    matcher = compiled(MANY_STATES).matcher()
    assert matcher.accept(ids(text))
    return matcher


@pytest.mark.parametrize("max_compile_s", [0.0, 10.0])
def test_a_constraint_that_exceeds_the_limits_by_itself_fails_its_answers(
    monkeypatch: pytest.MonkeyPatch, max_compile_s: float
) -> None:
    monkeypatch.setattr(backend_module, "_LIMITS", llguidance.LLParserLimits(max_lexer_states=25, verbose_errors=False))
    monkeypatch.setattr(copies, "_MAX_COMPILE_S", max_compile_s)
    grammar = compiled(MANY_STATES)
    for _ in range(3):
        with pytest.raises(InvalidConstraint):
            write(grammar.matcher(), "abbababaabbbaababaabbabbaabaaaabbbbababa")
