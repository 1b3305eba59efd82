"""The time between the first and the second token of a pair, over real loops and schedulers in simulated time."""

from __future__ import annotations

import random

import pytest

from kvist.simulation.timed_pair import VOCAB, TimedPair, Timing
from kvist.testing.specs import make_request

TIMING = Timing()
DECODE_STEP_S = TIMING.weights_s + 16 * TIMING.decode_s  # of at most 16 streams


def submit(pair: TimedPair, name: str, num_tokens: int, *, at_s: float, max_tokens: int = 32) -> None:
    rng = random.Random(name)
    prompt = [rng.randrange(VOCAB) for _ in range(num_tokens)]
    pair.submit(make_request(name, prompt, max_tokens=max_tokens, ignore_eos=True), at_s)


def handed_over_s(num_tokens: int) -> float:
    """Return the time from the last computed page of a prompt of one chunk until the pages are verified."""
    num_pages = -(-num_tokens // 16)
    copies_s = TIMING.copy_s + TIMING.verify_s + num_pages * (TIMING.copy_page_s + TIMING.verify_page_s)
    return copies_s + TIMING.wire_s


@pytest.mark.parametrize("blocks", [False, True], ids=["free", "blocked"])
def test_the_second_token_of_a_chat_does_not_wait_for_the_prompt_that_is_computed_next(blocks: bool) -> None:
    """Blocked loops are the baseline: there Done waits for a step of the long prompt."""
    pair = TimedPair(TIMING, blocks=blocks)
    submit(pair, "earlier", 512, at_s=1.0, max_tokens=200)
    submit(pair, "chat", 512, at_s=1.2)
    submit(pair, "long", 8192, at_s=1.201)
    pair.run(3.0)
    gap_s = pair.gaps_s("chat")[0]
    bound_s = handed_over_s(512) + 3 * DECODE_STEP_S
    assert (gap_s > bound_s) if blocks else (gap_s <= bound_s)


def test_a_verified_stream_is_in_the_next_batch_that_decode_plans() -> None:
    pair = TimedPair(TIMING)
    submit(pair, "earlier", 512, at_s=1.0, max_tokens=100)
    submit(pair, "chat", 512, at_s=1.2)
    pair.run(1.2)
    num_before = {batch.step_id for batch in pair.decode.device.batches}
    pair.run(2.0)
    joined = next(batch for batch in pair.decode.device.batches if batch.started and batch.step_id not in num_before)
    taken_over_s = pair.token_times_s["chat"][0] + handed_over_s(512)
    earlier = pair.decode.device.ends
    running = min(step_id for step_id, end_s in earlier.items() if end_s > taken_over_s)
    assert joined.step_id == running + 2, "one step is running and one is queued when the pages are verified"
    assert pair.token_times_s["chat"][1] == pytest.approx(earlier[joined.step_id])


@pytest.mark.parametrize("rate", [6.0, 12.0])
def test_the_mixed_load_has_no_gap_above_its_bar_and_parts_add_up(rate: float) -> None:
    """Chats of 512 + 256 tokens with one prompt of 8192 + 128 in every four; the bars are 20 and 25 ms."""
    pair, rng, at_s = TimedPair(TIMING), random.Random(3), 1.0
    names = [f"{'long' if number % 4 == 3 else 'chat'}{number}" for number in range(36)]
    for name in names:
        at_s += rng.expovariate(rate)
        num_in, num_out = (8192, 128) if name.startswith("long") else (512, 256)
        submit(pair, name, num_in, at_s=at_s, max_tokens=num_out)
    pair.run(at_s + 4.0)
    for name in names:
        gaps_s, report = pair.gaps_s(name), pair.reports[name]
        assert len(gaps_s) == (127 if name.startswith("long") else 255)
        assert max(gaps_s) <= handed_over_s(8192) + 3 * DECODE_STEP_S < 0.020
        parts_s = report.grant_wait_s, report.last_copy_s, report.wait_s, report.admission_s, report.first_step_s
        assert min(parts_s) >= 0.0
        assert 0.0 <= gaps_s[0] - sum(parts_s) <= TIMING.wire_s + 1e-6, "the rest is Done on its way"
