"""The figures and output of the demo, with a router that answers from a script."""

from __future__ import annotations

import dataclasses
import json

import httpx
import pytest

from kvist.cluster.chat_turn import TurnOptions, TurnReport, stream_turn
from kvist.cluster.demo import FROM_HOST, FROM_STORE, cache_summary, process_summary, table, unmet_expectations
from kvist.demo_schema import SCHEMA, ask_for_json
from kvist.errors import EngineError
from kvist.supervisor.child import Child, ChildPlan
from kvist.testing.clocks import FakeClock

REPORT = {
    "prefill_worker": "127.0.0.1:1",
    "decode_worker": "127.0.0.1:2",
    "handoff": {"num_pages": 3, "num_pages_reused": 1, "num_bytes": 3 << 20, "duration_ms": 12.5, "wait_ms": 0.5},
}
USAGE = {
    "prompt_tokens": 50,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 48},
    "kvist": {"cached_tokens": {"device": 16, "host": 32, "storage": 0}},
}


def event(**fields: object) -> str:
    return "data: " + json.dumps(fields) + "\n\n"


def piece(text: str) -> str:
    return event(choices=[{"index": 0, "delta": {"content": text}}])


def ask(body: str, clock: FakeClock, status: int = 200) -> tuple[TurnReport, list[str], dict[str, object]]:
    """Return the report, the shown pieces and the sent request; every piece takes 0.1 s."""
    sent: dict[str, object] = {}
    shown: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.update(json.loads(request.content))
        return httpx.Response(status, text=body)

    def show(text: str) -> None:
        shown.append(text)
        clock.advance(0.1)

    with httpx.Client(base_url="http://router", transport=httpx.MockTransport(answer)) as client:
        messages = [{"role": "user", "content": "Hello"}]
        return (
            stream_turn(client, messages, TurnOptions(max_tokens=8, temperature=0), clock=clock, show=show),
            shown,
            sent,
        )


def test_a_turn_is_shown_piece_by_piece_and_measured() -> None:
    body = piece("Bon") + piece("jour") + piece("!") + event(choices=[], usage=USAGE, kvist=REPORT) + "data: [DONE]\n\n"
    report, shown, sent = ask(body, FakeClock())
    assert shown == ["Bon", "jour", "!"]
    assert report.text == "Bonjour!"
    assert report.tpot_s == pytest.approx(0.1)  # two intervals of 0.1 s after the first of three tokens
    assert (report.num_prompt_tokens, report.num_cached_tokens, report.num_output_tokens) == (50, 48, 3)
    assert report.num_cached_by_tier == {"device": 16, "host": 32, "storage": 0}
    assert (report.num_pages, report.num_pages_reused, report.num_bytes) == (3, 1, 3 << 20)
    assert (report.handoff_s, report.handoff_wait_s) == (pytest.approx(0.0125), pytest.approx(0.0005))
    assert (sent["temperature"], sent["stream"], sent["kvist"]) == (0, True, {"report": True, "usage": True})


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ('{"error": {"message": "no worker"}}', 503, "no worker"),
        (piece("Bon") + event(error={"message": "lost"}), 200, "lost"),
        ("data: [DONE]\n\n", 200, "no usage"),
    ],
)
def test_a_failed_answer_is_an_error_with_the_reason(body: str, status: int, word: str) -> None:
    with pytest.raises(EngineError, match=word):
        ask(body, FakeClock(), status)


def test_the_demo_table_has_one_line_per_turn_and_the_summary_names_the_processes() -> None:
    body = piece("a") + piece("b") + piece("c") + event(choices=[], usage=USAGE, kvist=REPORT)
    report = ask(body, FakeClock())[0]
    lines = table([("question", report), ("chat 1", report)]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    for cell in ("100.0 ms", "50 tok", "48 tok", "3.00 MiB", "12.5 ms"):
        assert cell in lines[2]
    child = Child(ChildPlan(name="prefill-0", argv=(), url="http://127.0.0.1:1"))
    line = process_summary([("question", report)], [child])
    assert "Prefill ran in prefill-0" in line
    assert "decode in 127.0.0.1:2" in line
    line = cache_summary(FROM_HOST, report)
    assert "48 of 50 prompt tokens" in line
    assert "(16 from the device pool, 32 from host memory, 0 from storage)" in line


def test_the_demo_fails_without_the_expected_word_or_without_pages_from_a_tier() -> None:
    body = piece("It is Paris") + event(choices=[], usage=USAGE, kvist=REPORT)
    report = ask(body, FakeClock())[0]
    rows = [("question", report), (FROM_HOST.name, report), (FROM_STORE.name, report)]
    assert unmet_expectations(rows, [FROM_HOST], question="Where?", expect="paris") == []
    assert "Rome" in unmet_expectations(rows, [FROM_HOST], question="Where?", expect="Rome")[0]
    (line,) = unmet_expectations(rows, [FROM_HOST, FROM_STORE], question="Where?", expect="")  # no page from storage
    assert "of host memory were flushed, but no page was loaded from the storage tier" in line
    stored = dataclasses.replace(report, num_cached_by_tier={"device": 48, "host": 0, "storage": 16})
    rows[1:] = [(FROM_HOST.name, stored), (FROM_STORE.name, stored)]
    (line,) = unmet_expectations(rows, [FROM_HOST, FROM_STORE], question="Where?", expect="")
    assert "device pools were flushed, but no page was loaded from the host tier" in line


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"plant": "sunflower", "full_sun": true, "litres_a_week": 5}', None),
        ('{"plant": "sunflower"', "not JSON"),
        ('{"plant": "sunflower", "full_sun": true, "litres_a_week": "5"}', "form"),
        ("[]", "form"),
    ],
)
def test_an_answer_with_a_schema_is_shown_and_its_form_is_checked(text: str, problem: str | None) -> None:
    sent: dict[str, object] = {}
    shown: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.update(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})

    with httpx.Client(base_url="http://router", transport=httpx.MockTransport(answer)) as client:
        found = ask_for_json(client, shown.append)
    assert (problem in found) if problem and found else found is problem
    assert text in shown[0]
    form = {"name": "plant", "strict": True, "schema": dict(SCHEMA)}
    assert sent["response_format"] == {"type": "json_schema", "json_schema": form}
