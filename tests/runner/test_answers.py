"""The mask of a slot is that of its answer so far, however the answer's tokens have reached the rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.grammar.compiler import GrammarCompiler
from kvist.kernels.shaping import unpack_bits
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import Constraint, RequestId, SamplingParams, SlotId
from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable
from kvist.testing.tiny_model import VOCAB_SIZE, tiny_grammars
from kvist.testing.tokenizers import byte_tokenizer

SLOT, PROMPT = SlotId(1), tuple(range(40, 49))
TOKENS = byte_tokenizer()
ANSWER = tuple(TOKENS.encode("ab12ab3a9"))
CONSTRAINT = Constraint(kind="regex", text="(ab?[0-9]+)*")


@pytest.fixture(scope="module")
def grammars() -> GrammarCompiler:
    return tiny_grammars()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENS.encode(text))


def table_of(grammars: GrammarCompiler | None, answer: Sequence[int], **params: object) -> SlotTable:
    table = SlotTable(table_sizes(2, vocab_size=VOCAB_SIZE, context_len=64), torch.device("cpu"), grammars)
    sampling = SamplingParams(max_tokens=30, constraint=CONSTRAINT, **params)  # type: ignore[arg-type]
    start = StartRequest(
        slot=SLOT,
        request_id=RequestId("r"),
        sampling=sampling,
        token_ids=[*PROMPT, *answer],
        num_prompt_tokens=len(PROMPT),
    )
    table.update(Batch(step_id=1, started=(start,), items=()))
    return table


def error_of(table: SlotTable) -> str:
    answer = table.answers.get(SLOT)
    assert answer is not None
    return answer.error


def allowed_after(table: SlotTable, cuts: Sequence[int], tokens: Sequence[int]) -> set[int]:
    """Compute `tokens` in chunks that end at `cuts`; return the tokens that may follow."""
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        if start == end:
            continue
        samples = end == len(tokens)
        item = BatchItem(slot=SLOT, token_ids=tokens[start:end], start=start, page_ids=(0,), samples=samples)
        table.answers.accept_known([item])
        table.shaping.before_choice([item], table.answers.followed([item]))
    return set(np.flatnonzero(~unpack_bits(table.shaping.tables.banned[SLOT], VOCAB_SIZE).numpy()).tolist())


@settings(max_examples=60, deadline=None)
@given(known=st.integers(0, len(ANSWER)), shown=st.integers(0, len(ANSWER)), data=st.data())
def test_tokens_may_come_in_any_chunks_and_partly_by_replay(
    grammars: GrammarCompiler, known: int, shown: int, data: st.DataObject
) -> None:
    tokens = [*PROMPT, *ANSWER[: max(known, shown)]]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=5)))
    found = allowed_after(table_of(grammars, ANSWER[:known]), cuts, tokens)
    matcher = grammars.start(CONSTRAINT).result(20.0).matcher()
    assert matcher.accept(list(ANSWER[: max(known, shown)]))
    mask = np.zeros(VOCAB_SIZE // 32, dtype=np.int32)
    matcher.fill(mask)
    assert found == set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_other_bans_apply_to_the_tokens_that_are_left(grammars: GrammarCompiler) -> None:
    tokens = [*PROMPT, *ids("a")]
    assert allowed_after(table_of(grammars, ids("a")), [], tokens) == set(ids("b0123456789"))
    banned = table_of(grammars, ids("a"), bad_words=(ids("1"), ids("ab")))
    assert allowed_after(banned, [], tokens) == set(ids("023456789"))
    few = table_of(grammars, ids("a"), allowed_token_ids=ids("xyz19"))
    assert allowed_after(few, [], tokens) == set(ids("19"))


@pytest.mark.parametrize("answer", ["x", "a1x"])
def test_a_wrong_answer_bans_every_token_and_names_the_reason(grammars: GrammarCompiler, answer: str) -> None:
    tokens = [*PROMPT, *ids(answer)]
    for table in (table_of(grammars, ids(answer)), table_of(grammars, ids(""))):
        assert not allowed_after(table, [len(PROMPT)], tokens)
        assert "does not satisfy" in error_of(table)
        table.update(Batch(step_id=2, ended=(SLOT,), items=()))
        assert table.answers.get(SLOT) is None


def test_without_a_compiler_every_token_is_banned() -> None:
    table = table_of(None, ids(""))
    assert not allowed_after(table, [], PROMPT)
    assert "tokenizer" in error_of(table)
