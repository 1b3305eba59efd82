"""Constrained answers of real engines with the tiny model: their form, their end, and constraints that fail."""

from __future__ import annotations

import contextlib
import re
from typing import Unpack

import msgspec
import pytest

from kvist.engine.grammar_jobs import GrammarJobs
from kvist.errors import InvalidConstraint
from kvist.grammar.compiler import GrammarCompiler
from kvist.plan.grammars import GrammarCompiled
from kvist.request import Constraint, EngineRequest, FinishReason, Outcome, Role
from kvist.testing.memory_cluster import MemoryCluster, Stream
from kvist.testing.specs import RequestFields, submit_full
from kvist.testing.tiny_model import tiny_grammars
from kvist.testing.tokenizers import byte_tokenizer
from tests.engine.conftest import request_of
from tests.engine.test_engines import prompt

TOKENS = byte_tokenizer()  # the tiny model has the first 128 of them
END = 2  # "#"
WORD: RequestFields = {
    "temperature": 1.5,
    "ignore_eos": False,
    "max_tokens": 60,
    "constraint": Constraint(kind="regex", text="[a-c]{2,4}=[0-9]+;"),
}


def word(request_id: str, prompt_token_ids: tuple[int, ...], **changes: Unpack[RequestFields]) -> EngineRequest:
    """Return a request for WORD, with these changes."""
    fields: RequestFields = {**WORD, **changes}
    return request_of(request_id, prompt_token_ids, **fields)


def text_of(stream: Stream) -> str:
    return TOKENS.decode(stream.token_ids)


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_has_the_form_and_ends_where_the_grammar_does(world: MemoryCluster, seed: int) -> None:
    pair = world.start(role=Role.PREFILL), world.start(role=Role.DECODE)
    alone = world.answer(world.start(), word("alone", prompt(7), seed=seed))
    two = world.submit_pair(*pair, word("pair", prompt(7), seed=seed))
    world.run()
    assert re.fullmatch(r"[a-c]{2,4}=[0-9]*(;#)?", text_of(alone))
    assert alone.finish is (FinishReason.STOP if alone.token_ids[-1] == END else FinishReason.LENGTH)
    assert two.token_ids == alone.token_ids
    assert two.finish is alone.finish


def test_the_end_of_the_grammar_overrides_min_tokens(world: MemoryCluster) -> None:
    choice = Constraint(kind="choice", text='["ab", "abc"]')
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        stream = world.answer(world.start(), word(name, prompt(7), seed=seed, min_tokens=20, constraint=choice))
        # "ab" could end or go on: min_tokens decides. "abc" can only end.
        assert text_of(stream) == "abc#"
        assert stream.finish is FinishReason.STOP


def test_ignore_eos_pads_the_answer_with_end_tokens(world: MemoryCluster) -> None:
    sampling: RequestFields = {**WORD, "ignore_eos": True, "max_tokens": 8}
    sampling["constraint"] = Constraint(kind="choice", text='["abc"]')
    stream = world.answer(world.start(), request_of("r", prompt(7), **sampling))
    assert text_of(stream) == "abc" + "#" * 5
    assert stream.finish is FinishReason.LENGTH


def one_of_two(request_id: str, number: int) -> EngineRequest:
    if number % 2:
        return word(request_id, prompt(9, number), seed=number)
    return request_of(request_id, prompt(9, number), seed=number, temperature=0.8)


def test_rows_with_and_without_constraints_share_steps(world: MemoryCluster) -> None:
    engine, streams = world.start(num_pages=256), list[Stream]()
    for number in range(6):
        streams.append(world.submit_full(engine, one_of_two(f"r{number}", number)))
    world.run()
    for number, stream in enumerate(streams):
        again = world.answer(world.start(), one_of_two(f"again{number}", number))
        assert stream.token_ids == again.token_ids


def test_a_constraint_that_other_fields_contradict_fails_alone(world: MemoryCluster) -> None:
    engine = world.start()
    stuck = word("stuck", prompt(6), allowed_token_ids=tuple(TOKENS.encode("abc")))
    streams = [world.submit_full(engine, each) for each in (stuck, request_of("free", prompt(9)))]
    world.run()
    assert re.fullmatch("[a-c]{4}", text_of(streams[0]))
    assert [(each.outcome, each.error_code) for each in streams[0].ended] == [(Outcome.FAILED, "invalid_request")]
    assert "constraint" in streams[0].ended[0].message
    assert [each.outcome for each in streams[1].ended] == [Outcome.FINISHED]
    world.check_ledgers()


def test_a_constraint_that_cannot_be_compiled_fails_alone(world: MemoryCluster) -> None:
    engine = world.start()
    faulty = request_of("faulty", prompt(6), constraint=Constraint(kind="regex", text="("))
    streams = [world.submit_full(engine, each) for each in (faulty, request_of("free", prompt(9)))]
    world.run()
    assert [(each.outcome, each.error_code) for each in streams[0].ended] == [(Outcome.FAILED, "invalid_constraint")]
    assert [each.outcome for each in streams[1].ended] == [Outcome.FINISHED]
    world.check_ledgers()


def test_a_report_comes_with_a_request_whose_grammar_was_compiled_before() -> None:
    compiler, texts = tiny_grammars(), ("known?[ab]+", "(", "c")
    jobs = GrammarJobs(compiler, lambda: None)
    requests = [word(text, prompt(5), constraint=Constraint(kind="regex", text=text)) for text in texts]
    events = [submit_full(each) for each in (*requests, request_of("free", prompt(5)))]
    assert jobs.known(events) == []
    for request in requests[:2]:
        constraint = request.sampling.constraint
        assert constraint is not None
        with contextlib.suppress(InvalidConstraint):
            compiler.start(constraint).result(20.0)
    before = compiler.totals()["grammar_cache_hits"]
    assert jobs.known(events) == [GrammarCompiled(request_id=requests[0].request_id)]
    assert compiler.totals()["grammar_cache_hits"] == before + 1


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, 1), (3, 3), (60, 7)])
def test_tokens_without_a_choice_end_at_max_tokens(world: MemoryCluster, max_tokens: int, expected: int) -> None:
    choice = Constraint(kind="choice", text='["abcdef"]')
    stream = world.answer(world.start(), word("r", prompt(7), max_tokens=max_tokens, constraint=choice))
    assert text_of(stream) == "abcdef#"[:expected]
    assert stream.finish is (FinishReason.STOP if expected == 7 else FinishReason.LENGTH)


def test_an_answer_that_breaks_its_constraint_is_not_continued(world: MemoryCluster) -> None:
    request = msgspec.structs.replace(request_of("r", prompt(6), **WORD), output_token_ids=tuple(TOKENS.encode("xy")))
    stream = world.submit_full(world.start(), request)
    world.run()
    [ended] = stream.ended
    assert (ended.outcome, ended.error_code) == (Outcome.FAILED, "invalid_constraint")
    assert "does not satisfy" in ended.message
    world.check_ledgers()


def test_an_engine_without_a_tokenizer_refuses_constraints(world: MemoryCluster) -> None:
    def no_tokenizer() -> None:
        raise FileNotFoundError("no tokenizer.json")

    engine = world.start(grammars=GrammarCompiler(no_tokenizer))  # type: ignore[arg-type]
    stream = world.submit_full(engine, request_of("r", prompt(6), **WORD))
    world.run()
    [ended] = stream.ended
    assert ended.outcome is Outcome.FAILED
    assert "tokenizer.json" in ended.message
