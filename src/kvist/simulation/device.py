"""The page pool and the model of a simulated engine.

The model writes into each position of a page a hash of the whole prefix, on which real K/V depends. Before the
model "attends", it checks every position it reads, so a page that was freed, overwritten or never filled is detected at
once. The next token is a hash of (prefix, seed, position): one lost, duplicated or misplaced token changes all later
tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from functools import reduce
from itertools import count

from kvist.kv.cache import PageCache
from kvist.kv.pages import PageState
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.plan.events import SampledTokens
from kvist.request import EngineRequest, FinishReason, SamplingParams, SlotId, TokenLogprobs
from kvist.scheduler import SchedulerConfig

VOCAB = 23
EOS = 7
Cell = tuple[int, int]  # the K/V of one position: token id, hash of the prefix that ends with it
Page = list[Cell | None]  # None: never written


def chain(previous: int, token_id: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{previous}/{token_id}".encode(), digest_size=8).digest(), "little")


def forbidden_tokens(answer: Sequence[int]) -> set[int]:
    """Return the tokens that a constraint forbids after these output tokens: half of the vocabulary, by their hash."""
    state = reduce(chain, answer, 0)
    return {token_id for token_id in range(VOCAB) if state >> token_id & 1}


def next_token(prefix: int, sampling: SamplingParams, answer: Sequence[int], position: int, stops: Set[int]) -> int:
    """Return the token that the model samples, none of `stops`. `position` is the number of tokens before it; only a
    constraint depends on `answer`, the output tokens."""
    excluded = stops | forbidden_tokens(answer) if sampling.constraint is not None else stops
    tries = (chain(prefix, (sampling.seed << 20) + (position << 6) + attempt) % VOCAB for attempt in count())
    return next(token_id for token_id in tries if token_id not in excluded)


def reference_stream(
    request: EngineRequest, config: SchedulerConfig, context_len: int
) -> tuple[list[int], FinishReason]:
    """Return the output tokens and the finish reason of an undisturbed engine."""
    tokens = [*request.prompt_token_ids, *request.output_token_ids]
    sampling = request.sampling
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(config.eos_token_ids))
    prefix = reduce(chain, tokens, 0)
    while True:
        outputs = tokens[len(request.prompt_token_ids) :]
        if not sampling.max_tokens:
            return list(request.output_token_ids), FinishReason.LENGTH
        excluded = stops if len(outputs) < sampling.min_tokens else set()
        token_id = next_token(prefix, sampling, outputs, len(tokens), excluded)
        prefix = chain(prefix, token_id)
        tokens.append(token_id)
        outputs.append(token_id)
        if token_id in stops:
            return outputs, FinishReason.STOP
        if len(outputs) >= sampling.max_tokens or len(tokens) >= context_len:
            return outputs, FinishReason.LENGTH


def score(prefix: int, token_id: int) -> TokenLogprobs:
    """Return the logprob that the model gives a prompt token after the prefix."""
    return TokenLogprobs(logprob=-float(chain(prefix, token_id) % 997), rank=1)


def reference_scores(request: EngineRequest) -> list[TokenLogprobs]:
    """Return the scores of the prompt that an undisturbed engine reports."""
    sampling = request.sampling
    if sampling.prompt_logprobs is None or request.output_token_ids:
        return []
    found, prefix = [], 0
    for position, token_id in enumerate(request.prompt_token_ids):
        if position >= max(1, sampling.prompt_logprobs_start):
            found.append(score(prefix, token_id))
        prefix = chain(prefix, token_id)
    return found


class SimDevice:
    """A page pool and a model. Mutable; owned by one simulated engine."""

    def __init__(self, cache: PageCache, row_tokens: int = 1) -> None:
        """`row_tokens`: the most tokens in a row."""
        self._row_tokens = row_tokens
        self._page_size = cache.page_size
        self._page_state = cache.page_state
        self.pages: list[Page] = [[None] * cache.page_size for _ in range(cache.num_pages)]
        self._open: dict[SlotId, StartRequest] = {}
        # of open slots: the output tokens that the matcher has seen; None without a constraint
        self._answers: dict[SlotId, list[int] | None] = {}
        self._last_tokens: dict[SlotId, int] = {}  # slot → token sampled last, for `takes_sampled`
        self._broken: set[SlotId] = set()  # slots of the batch before, if it failed

    def execute(self, batch: Batch) -> SampledTokens:
        """Write the K/V of all items and sample; check the state of each page that is read or written."""
        self._start(batch)
        sampled: dict[SlotId, list[int]] = {}
        scores: dict[int, tuple[TokenLogprobs, ...]] = {}
        for index, item in enumerate(batch.items):
            if item.slot in self._broken:  # launched after the failed batch: its input is invalid
                self._check_owned(item)
                if item.samples:
                    sampled[item.slot] = [0]
                continue
            prefix = self._check_prefix(item.page_ids, item.start)
            token_ids = item.token_ids or [self._last_tokens[item.slot]]
            if item.score_from is not None:
                scores[index] = self._score(item, prefix)
            for offset, token_id in enumerate(token_ids):
                page, slot = divmod(item.start + offset, self._page_size)
                state = self._page_state(item.page_ids[page])
                assert state is PageState.OWNED, f"a step writes page {item.page_ids[page]}, which is {state.name}"
                prefix = chain(prefix, token_id)
                self.pages[item.page_ids[page]][slot] = (token_id, prefix)
            answer = self._answers[item.slot]
            if answer is not None:  # a row of several tokens may be computed in several steps
                answer += token_ids[self._open[item.slot].num_prompt_tokens + len(answer) - item.start :]
            if item.samples:
                sampled[item.slot] = self._sample(self._open[item.slot], prefix, item.end, answer)
        self._last_tokens |= {slot: row[0] for slot, row in sampled.items()}
        self._broken.clear()
        rows = list(sampled.values())
        return SampledTokens(
            token_ids=[row[0] for row in rows],
            following={place: row[1:] for place, row in enumerate(rows) if len(row) > 1},
            prompt_logprobs=scores,
        )

    def _sample(self, start: StartRequest, prefix: int, position: int, answer: list[int] | None) -> list[int]:
        """Return the tokens of a row: one, or a number that follows from the prefix."""
        seen = answer or []
        assert answer is None or start.num_prompt_tokens + len(seen) == position, "the matcher lacks tokens"
        row: list[int] = []
        num_tokens = 1 + prefix % self._row_tokens
        while len(row) < num_tokens:
            stops = set(start.suppressed_token_ids if position + len(row) < start.suppress_until else ())
            row.append(next_token(prefix, start.sampling, [*seen, *row], position + len(row), stops))
            prefix = chain(prefix, row[-1])
        return row

    def _score(self, item: BatchItem, prefix: int) -> tuple[TokenLogprobs, ...]:
        assert self._open[item.slot].sampling.prompt_logprobs is not None
        assert item.score_from is not None
        assert item.start < item.score_from, "the item does not compute the token before"
        assert 0 < len(item.scored_token_ids) <= item.end + 1 - item.score_from, (
            "the item does not compute the last one"
        )
        found = []
        for position, token_id in enumerate(item.token_ids, item.start + 1):
            prefix = chain(prefix, token_id)
            place = position - item.score_from
            if 0 <= place < len(item.scored_token_ids):
                if position < item.end:
                    assert item.token_ids[position - item.start] == item.scored_token_ids[place]
                found.append(score(prefix, item.scored_token_ids[place]))
        return tuple(found)

    def fail(self, batch: Batch) -> None:
        """Fail the batch, and leave invalid K/V in the pages that it should have written."""
        self._start(batch)
        for item in batch.items:
            self._check_owned(item)
            for position in range(item.start, item.end):
                page, slot = divmod(position, self._page_size)
                self.pages[item.page_ids[page]][slot] = (-1, -1)
        self._broken = {item.slot for item in batch.items}

    def _start(self, batch: Batch) -> None:
        """End and start slots: nothing of a slot's earlier request is left."""
        for slot in batch.ended:
            del self._open[slot]
            self._last_tokens.pop(slot, None)
            self._broken.discard(slot)
        for start in batch.started:
            assert start.slot not in self._open
            self._open[start.slot] = start
            answer = start.token_ids[start.num_prompt_tokens :]
            self._answers[start.slot] = None if start.sampling.constraint is None else list(answer)

    def _check_owned(self, item: BatchItem) -> None:
        for page in range(item.start // self._page_size, (item.end - 1) // self._page_size + 1):
            state = self._page_state(item.page_ids[page])
            assert state is PageState.OWNED, f"a step writes page {item.page_ids[page]}, which is {state.name}"

    def _check_prefix(self, page_ids: Sequence[int], num_tokens: int) -> int:
        prefix = 0
        for index in range(num_tokens):
            page, slot = divmod(index, self._page_size)
            content = self.pages[page_ids[page]][slot]
            assert content is not None, f"position {index} is read before it was written"
            prefix = chain(prefix, content[0])
            assert content[1] == prefix, f"position {index} holds the K/V of another prefix"
        return prefix

    def checksum(self, page_ids: tuple[int, ...]) -> str:
        return checksum([self.pages[page_id] for page_id in page_ids])


def checksum(pages: list[Page]) -> str:
    return hashlib.blake2b(repr(pages).encode(), digest_size=8).hexdigest()
