"""Parts that all response formats share: usage, and Kvist's report on workers and handoff."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.flight.handoff_report import HandoffReport
from kvist.server.generation import ChoiceState


def usage(choices: Sequence[ChoiceState], *, by_tier: bool = False) -> dict[str, object]:
    """Return OpenAI's `usage`. A prompt with n answers counts once."""
    first = [choice for choice in choices if not choice.repeats_prompt]
    num_prompt = sum(choice.request.num_prompt_tokens for choice in first)
    num_output = sum(len(choice.token_ids) for choice in choices)
    result: dict[str, object] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in first)},
    }
    if by_tier:
        tiers = ("device", "host", "storage")
        result["kvist"] = {"cached_tokens": {tier: sum(one.cached_by_tier[tier] for one in first) for tier in tiers}}
    return result


def usage_so_far(choice: ChoiceState, num_output: int) -> dict[str, object]:
    """Return `usage` for an event of one choice. As in vLLM, the numbers are those of that choice alone."""
    num_prompt = choice.request.num_prompt_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": choice.num_cached_tokens},
    }


def kvist_field(choices: Sequence[ChoiceState], *, include_report: bool) -> dict[str, object]:
    """Return `kvist` of a response: the report and the trace that the request asks for; else {}."""
    found = report(choices) if include_report else {}
    flight = choices[0].flight
    if flight is not None and flight.arrival.wants_trace:
        found["trace"] = flight.record()
    return {"kvist": found} if found else {}


def report(choices: Sequence[ChoiceState]) -> dict[str, object]:
    """Return the report of the first choice, and with several choices the report of each."""
    reports = [_report_one(choice) for choice in choices]
    return reports[0] if len(reports) == 1 else {**reports[0], "choices": reports}


def _report_one(choice: ChoiceState) -> dict[str, object]:
    handoff, way, stored = choice.handoff, choice.handoff_way, choice.stored
    return {
        "index": choice.index,
        "prefill_worker": choice.prefill_worker,
        "decode_worker": choice.decode_worker,
        "route": choice.route,
        "failovers": choice.num_failovers,
        "cached_tokens": choice.num_cached_tokens,
        "seed": choice.request.sampling.seed,
        "handoff": None
        if handoff is None
        else {
            "way": None if way is None or way.way is None else way.way.value,
            "way_reason": "" if way is None else way.reason,
            "num_pages": handoff.num_pages,
            "num_pages_reused": handoff.num_pages_reused,
            "num_pages_recomputed": handoff.num_pages_recomputed,
            "num_pages_missing": handoff.num_pages_missing,
            "num_bytes": handoff.num_bytes,
            "duration_ms": round(handoff.duration_s * 1000, 3),
            "wait_ms": round(handoff.wait_s * 1000, 3),
            "store_ms": None if stored is None else round(stored.duration_s * 1000, 3),
            "transport": handoff.transport,
            "transport_reason": handoff.transport_reason,
            "second_token": _second_token(choice, handoff),
        },
    }


def _second_token(choice: ChoiceState, handoff: HandoffReport) -> dict[str, float | None]:
    """Return the parts of the time between the first and the second token, in milliseconds; `other_ms` are messages on
    their way. Without the gap (both tokens arrived together), only the parts are known."""
    parts_s = {
        "grant_wait_ms": handoff.grant_wait_s,
        "last_copy_ms": handoff.last_copy_s,
        "store_ms": 0.0 if choice.stored is None else choice.stored.duration_s,
        "verify_ms": handoff.wait_s,
        "admission_ms": handoff.admission_s,
        "first_step_ms": handoff.first_step_s,
    }
    gap_s = choice.second_token_gap_s
    other_s = None if gap_s is None else max(0.0, gap_s - sum(parts_s.values()))
    in_ms = {"gap_ms": gap_s, **parts_s, "other_ms": other_s}
    return {name: None if value is None else round(1000 * value, 3) for name, value in in_ms.items()}
