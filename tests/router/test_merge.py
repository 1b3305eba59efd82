"""Merging the chunks of two engines into one ordered stream."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvist.flight.handoff_report import HandoffReport
from kvist.request import FinishReason, RequestId, TokenLogprobs
from kvist.router.merge import ChunkMerger
from kvist.wire import TokenChunk

CLIENT_ID = RequestId("client")
REPORT = HandoffReport(num_pages=1, num_pages_reused=0, num_bytes=1, duration_s=0.1, wait_s=0.1)


def chunk(position: int, *token_ids: int, **fields: object) -> TokenChunk:
    return TokenChunk(request_id=RequestId("attempt"), position=position, token_ids=token_ids, **fields)  # type: ignore[arg-type]


def merger(first_position: int = 0) -> ChunkMerger:
    return ChunkMerger(CLIENT_ID, first_position)


def test_waiting_chunks_are_merged_into_one_with_the_clients_request_id() -> None:
    merged = merger()
    cached: dict[str, Any] = {"num_cached_tokens": 3, "num_cached_host_tokens": 2, "num_cached_storage_tokens": 1}
    assert merged.push(chunk(0, 10, **cached))
    assert merged.push(chunk(1, 11, handoff=REPORT))
    assert merged.push(chunk(2, 12, 13, finish_reason=FinishReason.STOP))
    assert merged.take() == TokenChunk(
        request_id=CLIENT_ID,
        position=0,
        token_ids=(10, 11, 12, 13),
        **cached,
        handoff=REPORT,
        finish_reason=FinishReason.STOP,
    )
    assert merged.complete
    assert merged.take() is None


def test_a_chunk_of_decode_waits_for_the_first_token_of_prefill() -> None:
    merged = merger()
    assert not merged.push(chunk(1, 11, handoff=REPORT))
    assert merged.take() is None
    assert merged.push(chunk(0, 10))
    taken = merged.take()
    assert taken is not None
    assert (taken.token_ids, taken.handoff) == ((10, 11), REPORT)


def test_an_early_finish_reason_ends_the_stream_only_after_the_missing_tokens() -> None:
    merged = merger()
    merged.push(chunk(1, 11, finish_reason=FinishReason.LENGTH))
    assert not merged.complete
    merged.push(chunk(0, 10))
    assert merged.complete
    assert not merged.push(chunk(2, 12))


def test_a_finish_without_a_token_ends_the_stream() -> None:
    merged = merger()
    merged.push(chunk(0, 10))
    assert merged.push(chunk(1, finish_reason=FinishReason.STOP))
    assert merged.complete


def test_the_longer_of_two_early_chunks_is_kept() -> None:
    merged = merger()
    merged.push(chunk(2, 12))
    merged.push(chunk(2, 12, 13))
    merged.push(chunk(2, 12))
    merged.push(chunk(0, 10, 11))
    taken = merged.take()
    assert taken is not None
    assert taken.token_ids == (10, 11, 12, 13)


def test_only_the_new_tokens_of_an_overlapping_chunk_are_kept_with_their_logprobs() -> None:
    merged = merger(first_position=5)
    ones = tuple(TokenLogprobs(logprob=-float(i)) for i in range(3))
    merged.push(chunk(5, 10, logprobs=ones[:1]))
    merged.take()
    merged.push(chunk(4, 9, 10, 11, logprobs=ones))
    taken = merged.take()
    assert taken is not None
    assert (taken.position, taken.token_ids, taken.logprobs) == (6, (11,), ones[2:])


@given(
    length=st.integers(1, 30),
    first=st.integers(0, 5),
    cuts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=20),
    seed=st.integers(0, 1 << 16),
    take_every=st.integers(1, 5),
)
def test_chunks_in_any_order_with_repeats_yield_every_token_once(
    length: int, first: int, cuts: list[tuple[int, int]], seed: int, take_every: int
) -> None:
    tokens = [100 + i for i in range(length)]

    def piece(start: int, stop: int) -> TokenChunk:
        finish = FinishReason.LENGTH if stop == length else None
        logprobs = tuple(TokenLogprobs(logprob=-float(t)) for t in tokens[start:stop])
        return chunk(first + start, *tokens[start:stop], finish_reason=finish, logprobs=logprobs)

    sent = [piece(i, i + 1) for i in range(length)]
    sent += [piece(start, min(length, start + size)) for start, size in cuts if start < length]
    random.Random(seed).shuffle(sent)
    merged = merger(first)
    received: list[int] = []
    logprobs: list[TokenLogprobs] = []
    position = first
    for index, one in enumerate(sent):
        merged.push(one)
        if index % take_every and index + 1 < len(sent):
            continue
        taken = merged.take()
        if taken is not None:
            assert taken.position == position
            position += len(taken.token_ids)
            received += taken.token_ids
            logprobs += taken.logprobs or ()
    assert received == tokens
    assert [one.logprob for one in logprobs] == [-float(t) for t in tokens]
    assert merged.complete


def scores(first: int, count: int) -> dict[str, Any]:
    """Return the fields of a chunk with the logprobs of these positions of the prompt."""
    found = tuple(TokenLogprobs(logprob=-float(position), rank=1) for position in range(first, first + count))
    return {"prompt_position": first, "prompt_logprobs": found}


def test_logprobs_of_the_prompt_wait_for_the_first_token() -> None:
    merged = merger()
    assert not merged.push(chunk(0, **scores(1, 3)))
    assert not merged.push(chunk(1, 11, handoff=REPORT))
    assert not merged.push(chunk(0, **scores(4, 2)))
    assert (merged.has_ready, merged.num_prompt_logprobs) == (False, 5)
    assert merged.push(chunk(0, 10))
    taken = merged.take()
    assert taken is not None
    assert (taken.token_ids, taken.prompt_logprobs) == ((10, 11), scores(1, 5)["prompt_logprobs"])
    merged.push(chunk(2, 12))
    later = merged.take()
    assert later is not None
    assert later.prompt_logprobs == ()


def test_a_request_without_tokens_ends_with_the_logprobs_of_its_prompt() -> None:
    merged = merger()
    merged.push(chunk(0, **scores(1, 2)))
    assert merged.push(chunk(0, finish_reason=FinishReason.LENGTH, num_cached_tokens=0))
    taken = merged.take()
    assert taken is not None
    assert (taken.token_ids, len(taken.prompt_logprobs), taken.finish_reason) == ((), 2, FinishReason.LENGTH)
    assert merged.complete
