"""The columns of a batch and their packed inputs equal its items. On a CPU: the GPU only copies them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.plan.batch import BatchItem
from kvist.request import RequestId, SamplingParams
from kvist.runner.columns import EMPTY_BATCH, BatchColumns, PersistentBatch, read_batch
from kvist.runner.sampler import noise_key_words
from kvist.runner.staging import Staging

GREEDY = SamplingParams(max_tokens=9, temperature=0.0)
WARM = SamplingParams(max_tokens=9, temperature=0.5, seed=3)
TOP_K = SamplingParams(max_tokens=9, temperature=0.5, seed=4, top_k=3)
NUM_SLOTS, NUM_TOKENS = 8, 64


def decode(name: str, start: int, sampling: SamplingParams = GREEDY, token_id: int | None = None) -> BatchItem:
    return BatchItem(
        request_id=RequestId(name),
        token_ids=() if token_id is None else (token_id,),
        start=start,
        page_ids=list(range(start + 1)),
        sampling=sampling,
    )


def chunk(name: str, start: int, tokens: list[int], sampling: SamplingParams | None = None) -> BatchItem:
    pages = list(range(start + len(tokens)))
    return BatchItem(request_id=RequestId(name), token_ids=tokens, start=start, page_ids=pages, sampling=sampling)


def device_words(columns: BatchColumns, slots: list[int], *, padding: int = 0) -> dict[str, list[object]]:
    """Return the device inputs after the copy, with the tokens of the previous step in their slots."""
    staging = Staging(num_rows=NUM_SLOTS, num_tokens=NUM_TOKENS, device=torch.device("cpu"))
    num_tokens, num_sampled = len(columns.inputs.token_ids) + padding, len(columns.inputs.rows) + padding
    staging._ring.next_buffer(3 * NUM_TOKENS + 4 * NUM_SLOTS)[:] = -99  # stale content of an earlier step
    staging._ring.next_buffer(1), staging._ring.next_buffer(1)
    staging.write_sampled(torch.tensor(slots + [-1] * (NUM_SLOTS - len(slots))))
    staging.send(columns.inputs, num_tokens, num_sampled)
    words = staging.views(num_tokens, num_sampled)
    found = {name: getattr(words, name).tolist() for name in ("positions", "rows", "temperatures", "keys")}
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


@given(ITEMS, st.booleans(), st.integers(0, 3))
def test_device_inputs_equal_the_items_of_the_batch(
    drawn: list[tuple[str, int, int, SamplingParams]], same_order: bool, padding: int
) -> None:
    items, tokens, positions, rows, sampled = [], [], [], [], []
    for number, (kind, start, count, sampling) in enumerate(drawn):
        ids = [100 * number + offset for offset in range(count if "chunk" in kind else 1)]
        if kind == "unknown":
            items.append(decode(f"r{number}", start, sampling))
        elif kind == "known":
            items.append(decode(f"r{number}", start, sampling, ids[0]))
        else:
            items.append(chunk(f"r{number}", start, ids, sampling if kind == "last chunk" else None))
        tokens += ids
        positions += range(start, start + len(ids))
        if kind != "chunk":
            rows.append(len(tokens) - 1)
            sampled.append(items[-1])
    before = [decode(f"r{number}", 1, item.sampling or WARM, 1) for number, item in enumerate(items)]
    if not same_order:
        before.reverse()
    previous = read_batch(before, EMPTY_BATCH).persistent
    slots = [100 * int(item.request_id[1:]) for item in before]  # the token that the previous step sampled for each
    columns = read_batch(items, previous)
    padding = min(padding, NUM_SLOTS - len(rows))
    found = device_words(columns, slots, padding=padding)
    zeros = [0] * padding
    assert found["token_ids"] == tokens + zeros
    assert found["positions"] == positions + zeros
    assert found["rows"] == rows + zeros
    params = [item.sampling for item in sampled if item.sampling is not None]
    assert found["temperatures"] == [each.temperature for each in params] + zeros
    if any(each.temperature for each in params):
        keys = noise_key_words([each.seed for each in params], [item.end for item in sampled])
        assert found["keys"][: len(rows)] == keys.tolist()
    assert list(columns.persistent.slots) == [item.request_id for item in sampled]
    assert [(span.start, span.end, span.page_ids) for span in columns.spans] == [
        (item.start, item.end, item.page_ids) for item in items
    ]
    assert columns.only_decodes is (len(tokens) == len(items) == len(sampled))
    assert columns.is_plain is all(each is not TOP_K for each in params)


def test_an_unchanged_batch_reuses_its_columns() -> None:
    first = read_batch([decode("a", 3, WARM, 1), decode("b", 5, GREEDY, 2)], EMPTY_BATCH)
    second = read_batch([decode("a", 4, WARM), decode("b", 6, GREEDY)], first.persistent)
    assert second.persistent is first.persistent
    assert (
        read_batch([decode("b", 7, GREEDY), decode("a", 5, WARM)], second.persistent).persistent
        is not second.persistent
    )


def test_a_reused_request_id_brings_its_own_parameters() -> None:
    first = read_batch([decode("a", 3, WARM, 1)], EMPTY_BATCH)
    again = read_batch([decode("a", 3, TOP_K, 1)], first.persistent)
    assert (first.is_plain, again.is_plain) == (True, False)


def test_suppressed_tokens_are_read_at_every_step() -> None:
    item = decode("a", 3, GREEDY, 1)
    first = read_batch([item], EMPTY_BATCH)
    assert first.is_plain
    suppressed = BatchItem(
        request_id=item.request_id,
        token_ids=(1,),
        start=4,
        page_ids=[],
        sampling=GREEDY,
        suppressed_token_ids=(2,),
    )
    assert not read_batch([suppressed], first.persistent).is_plain


def test_reading_a_token_that_no_step_sampled_is_an_error() -> None:
    with pytest.raises(KeyError):
        read_batch([decode("a", 3)], EMPTY_BATCH)
    with pytest.raises(KeyError):
        read_batch([decode("a", 3), decode("b", 3)], PersistentBatch.of([RequestId("a")], [GREEDY]))


def test_each_step_copies_its_sampled_tokens_to_a_buffer_of_its_own() -> None:
    staging = Staging(num_rows=2, num_tokens=2, device=torch.device("cpu"))
    reads = []
    for step in range(3):
        staging.write_sampled(torch.tensor([step, step + 10]))
        reads.append(staging.start_read(2))
    assert np.array(reads).tolist() == [[0, 10], [1, 11], [2, 12]]
