"""The columns of a batch and their packed inputs equal its items. On a CPU: the GPU only copies them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.kernels.operands import PENALTIES
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import RequestId, SamplingParams, SlotId
from kvist.runner.columns import EMPTY_BATCH, BatchColumns, read_batch
from kvist.runner.sampler import min_p_reach, noise_key_words
from kvist.runner.staging import NUM_ROW_WORDS, Staging
from tests.runner.tables import small_table

GREEDY = SamplingParams(max_tokens=9, temperature=0.0)
WARM = SamplingParams(max_tokens=9, temperature=0.5, seed=3, min_p=0.2, num_logprobs=1)
TOP_K = SamplingParams(max_tokens=9, temperature=0.5, seed=4, top_k=3, top_p=0.25, presence_penalty=1.0)
NUM_SLOTS, NUM_TOKENS = 8, 64


def started(slot: int, sampling: SamplingParams = GREEDY) -> StartRequest:
    return StartRequest(
        slot=SlotId(slot),
        request_id=RequestId(f"in slot {slot}"),
        sampling=sampling,
        token_ids=(1,),
        num_prompt_tokens=1,
    )


def decode(slot: int, start: int, token_id: int | None = None) -> BatchItem:
    token_ids = () if token_id is None else (token_id,)
    return BatchItem(slot=SlotId(slot), token_ids=token_ids, start=start, page_ids=list(range(start + 1)), samples=True)


def chunk(slot: int, start: int, tokens: list[int], *, samples: bool) -> BatchItem:
    pages = list(range(start + len(tokens)))
    return BatchItem(slot=SlotId(slot), token_ids=tokens, start=start, page_ids=pages, samples=samples)


class Reader:
    """A slot table, and the columns of one batch after another."""

    def __init__(self) -> None:
        self.table = small_table(NUM_SLOTS)
        self.previous = EMPTY_BATCH

    def read(
        self, *items: BatchItem, started: tuple[StartRequest, ...] = (), ended: tuple[int, ...] = ()
    ) -> BatchColumns:
        batch = Batch(step_id=1, ended=tuple(map(SlotId, ended)), started=started, items=items)
        self.table.update(batch)
        columns = read_batch(batch, self.previous, self.table)
        self.previous = columns.persistent
        return columns


def device_words(columns: BatchColumns, last_tokens: dict[int, int], *, padding: int = 0) -> dict[str, list[object]]:
    """Return the device inputs after the copy, with the tokens that earlier steps sampled."""
    staging = Staging(num_slots=NUM_SLOTS, num_tokens=NUM_TOKENS, device=torch.device("cpu"))
    num_tokens, num_sampled = len(columns.inputs.token_ids) + padding, len(columns.inputs.rows) + padding
    staging._ring.next_buffer(3 * NUM_TOKENS + NUM_ROW_WORDS * NUM_SLOTS)[:] = -99  # stale content of an earlier step
    staging._ring.next_buffer(1), staging._ring.next_buffer(1)
    slots = torch.tensor(list(last_tokens), dtype=torch.int32)
    staging.write_sampled(torch.tensor(list(last_tokens.values())), slots)
    staging.send(columns.inputs, num_tokens, num_sampled)
    words = staging.views(num_tokens, num_sampled)
    found = {name: getattr(words, name).tolist() for name in ("positions", "rows", "slots", "flags")}
    names = ("temperatures", "keys", "top_k", "top_p", "reach")
    found |= {name: getattr(words.columns, name).tolist() for name in names}
    return {"token_ids": words.token_ids().tolist(), **found}


ITEMS = st.lists(
    st.tuples(
        st.sampled_from(["unknown", "known", "chunk", "last chunk"]),
        st.integers(0, 40),
        st.integers(1, 6),
        st.sampled_from([GREEDY, WARM, TOP_K]),
    ),
    min_size=1,
    max_size=NUM_SLOTS,
)


@given(ITEMS, st.permutations(range(NUM_SLOTS)), st.integers(0, 3), st.booleans())
def test_device_inputs_equal_the_items_of_the_batch(
    drawn: list[tuple[str, int, int, SamplingParams]], slots: list[int], padding: int, read_before: bool
) -> None:
    items: list[BatchItem] = []
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    sampled: list[int] = []
    for number, (kind, start, count, _) in enumerate(drawn):
        ids = [100 * number + offset for offset in range(count if "chunk" in kind else 1)]
        if kind == "unknown":
            items.append(decode(slots[number], start))
        elif kind == "known":
            items.append(decode(slots[number], start, ids[0]))
        else:
            items.append(chunk(slots[number], start, ids, samples=kind == "last chunk"))
        tokens += ids
        positions += range(start, start + len(ids))
        if kind != "chunk":
            rows.append(len(tokens) - 1)
            sampled.append(number)
    reader = Reader()
    opened = tuple(started(slots[number], sampling) for number, (*_, sampling) in enumerate(drawn))
    if read_before:
        reader.read(*(decode(slots[number], 1, 1) for number in reversed(range(len(drawn)))), started=opened)
        columns = reader.read(*items)
    else:
        columns = reader.read(*items, started=opened)
    padding = min(padding, NUM_SLOTS - len(rows))
    found = device_words(columns, {slots[number]: 100 * number for number in range(len(drawn))}, padding=padding)
    zeros = [0] * padding
    assert found["token_ids"] == tokens + zeros
    assert found["positions"] == positions + zeros
    assert found["rows"] == rows + zeros
    assert found["slots"] == [slots[number] for number in sampled] + [NUM_SLOTS] * padding
    params = [drawn[number][3] for number in sampled]
    assert found["temperatures"] == [*(each.temperature for each in params), *zeros]
    assert found["top_k"] == [each.top_k for each in params] + zeros
    assert found["top_p"] == pytest.approx([*(each.top_p for each in params), *zeros])
    assert found["reach"] == pytest.approx([*map(min_p_reach, params), *zeros])
    assert found["flags"] == [PENALTIES if each is TOP_K else 0 for each in params] + zeros
    if any(each.temperature for each in params):
        keys = noise_key_words([each.seed for each in params], [items[number].end for number in sampled])
        assert found["keys"][: len(rows)] == keys.tolist()
    assert [(span.start, span.end, span.page_ids) for span in columns.spans] == [
        (item.start, item.end, item.page_ids) for item in items
    ]
    assert columns.only_decodes is (len(tokens) == len(items) == len(sampled))
    assert columns.persistent.wants_logprobs is any(each is WARM for each in params)


def test_an_unchanged_batch_reuses_its_columns() -> None:
    reader = Reader()
    first = reader.read(decode(0, 3, 1), decode(1, 5, 2), started=(started(0, WARM), started(1)))
    second = reader.read(decode(0, 4), decode(1, 6))
    assert second.persistent is first.persistent
    assert reader.read(decode(1, 7), decode(0, 5)).persistent is not second.persistent


def test_a_slot_that_is_ended_and_started_in_one_batch_has_the_new_parameters() -> None:
    reader = Reader()
    first = reader.read(decode(0, 3, 1), decode(1, 3, 1), started=(started(0, WARM), started(1)))
    again = reader.read(decode(0, 3, 1), decode(1, 4), ended=(0,), started=(started(0, TOP_K),))
    found = [device_words(columns, {})["top_k"] for columns in (first, again)]
    assert found == [[0, 0], [TOP_K.top_k, 0]]
    assert again.inputs.keys is not None
    assert again.inputs.keys[:1].tolist() == noise_key_words([TOP_K.seed], [4]).tolist()


def test_an_item_of_a_slot_that_is_not_open_is_an_error() -> None:
    reader = Reader()
    with pytest.raises(AssertionError, match="not open"):
        reader.read(decode(0, 3))
    reader.read(decode(0, 3, 1), started=(started(0),))
    with pytest.raises(AssertionError, match="not open"):
        reader.read(decode(0, 4), ended=(0,))


def test_a_slot_is_started_and_ended_once() -> None:
    reader = Reader()
    reader.read(decode(0, 3, 1), started=(started(0),))
    with pytest.raises(AssertionError, match="slot 0, which in slot 0 holds"):
        reader.read(decode(0, 3, 1), started=(started(0),))
    with pytest.raises(AssertionError, match="slot 1 is ended"):
        reader.read(decode(0, 3, 1), ended=(1,))


def test_the_last_token_of_a_slot_lasts_over_batches_without_it() -> None:
    staging = Staging(num_slots=3, num_tokens=4, device=torch.device("cpu"))
    staging.write_sampled(torch.tensor([7, 8]), torch.tensor([2, 0], dtype=torch.int32))
    staging.write_sampled(torch.tensor([9]), torch.tensor([0], dtype=torch.int32))
    reader = Reader()
    columns = reader.read(decode(0, 3), decode(2, 3), started=(started(0), started(2)))
    staging.send(columns.inputs, 2, 2)
    assert staging.views(2, 2).token_ids().tolist() == [9, 7]


def test_each_step_copies_its_sampled_tokens_to_a_buffer_of_its_own() -> None:
    staging = Staging(num_slots=2, num_tokens=2, device=torch.device("cpu"))
    reads = []
    for step in range(3):
        staging.write_sampled(torch.tensor([step, step + 10]), torch.tensor([1, 0], dtype=torch.int32))
        reads.append(staging.start_read(2))
    assert np.array(reads).tolist() == [[0, 10], [1, 11], [2, 12]]
