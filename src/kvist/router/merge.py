"""PURE: merges the chunks that engines send for one request into one ordered stream.

Chunks carry the position of their first token. Early chunks wait, repeated tokens are dropped, and all tokens that the
reader has not taken yet are returned as one chunk. Logprobs of the prompt wait for the first token: until then another
engine would send all of them again.
"""

from __future__ import annotations

import msgspec

from kvist.request import RequestId, TokenLogprobs
from kvist.wire import TokenChunk


class ChunkMerger:
    """Merger of one stream's chunks. Owned by the stream; stores at most the tokens of one answer."""

    __slots__ = (
        "_early",
        "_next_position",
        "_prompt_logprobs",
        "_ready",
        "_request_id",
        "complete",
        "num_logprobs",
        "num_prompt_logprobs",
        "token_ids",
    )

    def __init__(self, request_id: RequestId, first_position: int) -> None:
        self._request_id = request_id  # the client's id, set in the chunks that `take` returns
        self._next_position = first_position
        self.token_ids: list[int] = []  # all tokens in order, from `first_position` on
        self._ready: list[TokenChunk] = []  # in order, not taken yet
        self._early: dict[int, TokenChunk] = {}  # by position
        self._prompt_logprobs: list[TokenLogprobs] = []  # not taken yet
        self.num_prompt_logprobs = 0  # positions of the prompt whose logprobs have arrived
        self.num_logprobs = 0  # logprob values of tokens waiting to be taken
        self.complete = False  # the chunk with the finish reason has been appended

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    @property
    def has_gap(self) -> bool:
        """Whether tokens wait for earlier ones."""
        return bool(self._early)

    def restart(self) -> None:
        """Prepare for the chunks of another attempt, which goes on after the last token in order."""
        self._early.clear()
        if not self.token_ids:
            self._prompt_logprobs, self.num_prompt_logprobs = [], 0

    def push(self, chunk: TokenChunk) -> bool:
        """Add a chunk. Return whether tokens became ready."""
        if self.complete:
            return False
        if chunk.prompt_logprobs:  # one engine sends them, in order
            self._prompt_logprobs.extend(chunk.prompt_logprobs)
            self.num_prompt_logprobs += len(chunk.prompt_logprobs)
        if chunk.position > self._next_position:
            known = self._early.get(chunk.position)
            if known is None or len(known.token_ids) < len(chunk.token_ids):
                self._early[chunk.position] = chunk
            return False
        advanced = self._append(chunk)
        while self._early and not self.complete:
            position = min(self._early)
            if position > self._next_position:
                break
            advanced = self._append(self._early.pop(position)) or advanced
        return advanced

    def take(self) -> TokenChunk | None:
        """Remove and return all ready tokens as one chunk; None if there are none."""
        chunks = self._ready
        if not chunks:
            return None
        self._ready = []
        self.num_logprobs = 0
        first, last = chunks[0], chunks[-1]
        cached = next((chunk for chunk in chunks if chunk.num_cached_tokens is not None), first)
        if len(chunks) == 1:
            token_ids, logprobs = first.token_ids, first.logprobs
        else:
            token_ids = tuple(token for chunk in chunks for token in chunk.token_ids)
            logprobs = _joined_logprobs(chunks)
        return TokenChunk(
            request_id=self._request_id,
            position=first.position,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=last.finish_reason,
            num_cached_tokens=cached.num_cached_tokens,
            num_cached_host_tokens=cached.num_cached_host_tokens,
            num_cached_storage_tokens=cached.num_cached_storage_tokens,
            lease=last.lease,
            handoff=next((c.handoff for c in chunks if c.handoff is not None), None),
            prompt_logprobs=self._take_prompt_logprobs() if self._prompt_logprobs else (),
        )

    def _take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        taken, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        return taken

    def _append(self, chunk: TokenChunk) -> bool:
        num_known = self._next_position - chunk.position
        if num_known > len(chunk.token_ids) or (num_known == len(chunk.token_ids) and chunk.finish_reason is None):
            return False
        if num_known:
            chunk = msgspec.structs.replace(
                chunk,
                position=self._next_position,
                token_ids=chunk.token_ids[num_known:],
                logprobs=chunk.logprobs[num_known:] if chunk.logprobs is not None else None,
            )
        self._next_position += len(chunk.token_ids)
        self.token_ids += chunk.token_ids
        self._ready.append(chunk)
        if chunk.logprobs is not None:
            self.num_logprobs += sum(1 + len(one.top_logprobs) + len(one.requested_logprobs) for one in chunk.logprobs)
        if chunk.finish_reason is not None:
            self.complete = True
        return True


def _joined_logprobs(chunks: list[TokenChunk]) -> tuple[TokenLogprobs, ...] | None:
    if any(chunk.logprobs is None for chunk in chunks):
        return None
    return tuple(one for chunk in chunks for one in chunk.logprobs or ())
