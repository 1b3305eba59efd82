"""PURE checks of the messages that engines send.

An engine is a member of the cluster, but may be broken or of another build. An impossible message fails its own request
or is dropped; other streams and the gateway are not affected.
"""

from __future__ import annotations

import math
import re

import msgspec

from kvist.request import EngineRequest, SamplingParams, TokenLogprobs
from kvist.wire import DIGEST_BYTES, EngineSpec, LoadReport, PageEvents, TokenChunk

_LONGEST_RETRY_AFTER_S = 3600.0
_MAX_TOTALS = 512
_MAX_DIGEST_FIELDS = 6  # in one message: stored and removed pages of each tier, and a piece of a list with room to grow
_TOTAL_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # becomes part of a metric name


def fault_of_chunk(chunk: TokenChunk, sampling: SamplingParams, *, vocab_size: int) -> str | None:
    """Return what is impossible in the chunk, or None. Called for every chunk of every stream: must be cheap."""
    token_ids, num_tokens, max_tokens = chunk.token_ids, len(chunk.token_ids), sampling.max_tokens
    if not 0 <= chunk.position <= max_tokens - num_tokens:
        return f"{num_tokens} tokens from position {chunk.position}, in an answer of at most {max_tokens} tokens"
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            return f"token {token_id}, outside the vocabulary of {vocab_size}"
    if chunk.logprobs is None:
        return None
    if len(chunk.logprobs) != num_tokens:
        return f"{len(chunk.logprobs)} logprobs for {num_tokens} tokens"
    return _fault_of_logprobs(chunk.logprobs, sampling, vocab_size)


def fault_of_prompt_logprobs(
    chunk: TokenChunk, request: EngineRequest, *, num_known: int, vocab_size: int
) -> str | None:
    """Return what is impossible in the chunk's piece of prompt logprobs, or None. `num_known`: positions whose logprobs
    have arrived before."""
    sampling = request.sampling
    start, count = max(sampling.prompt_logprobs_start, 1) + num_known, len(chunk.prompt_logprobs)
    if sampling.prompt_logprobs is None:
        return "logprobs of a prompt that were not asked for"
    if chunk.prompt_position != start or start + count > request.num_prompt_tokens:
        return f"{count} logprobs from position {chunk.prompt_position} of a prompt, where position {start} is next"
    if any(each.rank is None for each in chunk.prompt_logprobs):
        return "logprobs of a prompt without ranks"
    return _fault_of_logprobs(chunk.prompt_logprobs, sampling, vocab_size)


def _fault_of_logprobs(logprobs: tuple[TokenLogprobs, ...], sampling: SamplingParams, vocab_size: int) -> str | None:
    num_asked = len(sampling.logprob_token_ids)
    for each in logprobs:
        if len(each.top_token_ids) != len(each.top_logprobs):
            return f"{len(each.top_logprobs)} top logprobs for {len(each.top_token_ids)} top tokens"
        if each.top_token_ids and not 0 <= min(each.top_token_ids) <= max(each.top_token_ids) < vocab_size:
            return f"top tokens outside the vocabulary of {vocab_size}"
        if len(each.requested_logprobs) != num_asked:
            return f"logprobs of {len(each.requested_logprobs)} tokens where {num_asked} were asked for"
    return None


def fault_of_report(report: LoadReport) -> str | None:
    counts = (
        report.num_running,
        report.num_waiting,
        report.num_free_pages,
        report.num_cached_pages,
        report.num_owned_pages,
        report.num_in_flight_pages,
        *msgspec.structs.astuple(report.leases),
        *report.num_host_pages.values(),
    )
    if min(counts) < 0:
        return "a negative count"
    if len(report.totals) > _MAX_TOTALS:
        return f"{len(report.totals)} counters"
    wrong = next((name for name in report.totals if not _TOTAL_NAME.fullmatch(name)), None)
    return None if wrong is None else f"a counter named {wrong[:64]!r}"


def fault_of_page_events(events: PageEvents) -> str | None:
    fields = [digests for changes in events.changes for digests in (changes.stored, changes.removed)]
    fields += [listed.digests for listed in events.listed]
    if events.store is not None:
        fields += [events.store.found, events.store.missing]
    if any(len(digests) % DIGEST_BYTES for digests in fields):
        return "digests of a wrong length"
    if len(fields) > _MAX_DIGEST_FIELDS:
        return f"{len(fields)} groups of digests"
    return None


def fault_of_spec(spec: EngineSpec) -> str | None:
    for name in ("vocab_size", "max_model_len", "page_size", "num_pages", "tp_size", "max_running_requests"):
        if getattr(spec, name) < 1:
            return f"a {name} of {getattr(spec, name)}"
    for name in ("num_host_pages", "max_queued_requests"):
        if getattr(spec, name) < 0:
            return f"a {name} of {getattr(spec, name)}"
    return None


def checked_retry_after_s(reported_s: float | None) -> float | None:
    if reported_s is None or not math.isfinite(reported_s):
        return None
    return min(max(reported_s, 0.0), _LONGEST_RETRY_AFTER_S)
