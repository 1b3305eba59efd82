"""The figures that `kvist top` shows, at any width."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from kvist.dashboard.snapshot import Snapshot
from kvist.top.source import Reading, SlowRequest, SlowStage
from kvist.top.view import view

NOW = 1_700_000_100.0
URL = "http://127.0.0.1:30000"
QUANTILES = {"p50": 0.05, "p90": 0.25, "p99": 1.5}
HANDOFFS = {
    **dict.fromkeys(("sent_per_s", "received_per_s", "failed_per_s", "pages_per_s", "bytes_per_s"), 2.0),
    "mean_s": 0.012,
    "num_sent": 5,
    "num_received": 5,
}
HITS = {"cached": 0.62, "ceiling": 0.7, "cached_total": 0.5, "ceiling_total": 0.6}
PAGES = {"total": 2048, "used": 512, "cached": 1024, "free": 512}


def worker(name: str, role: str, **changes: Any) -> dict[str, Any]:
    return {
        "worker_id": name,
        "url": f"http://{name}",
        "role": role,
        "state": "ready",
        "problem": "",
        "device": "cpu",
        "tp_size": 1,
        "num_running": 3,
        "num_waiting": 12,
        "num_in_flight": 4,
        "num_pending_tokens": 0,
        "max_running_requests": 128,
        "queue_wait_s": 0.1,
        "page_bytes": 1 << 20,
        "pages": PAGES,
        "host_pages": None,
        "num_leased_pages": 0,
        "storage": None,
        "hit_rate": HITS,
        "computed_tokens_per_s": 1234.0,
        "output_tokens_per_s": 87.0,
        "busy_share": 0.9,
        "decode_step_s": 0.01,
        "handoffs": HANDOFFS,
        "preemptions_per_s": 0.0,
        **changes,
    }


def snapshot(**changes: Any) -> Snapshot:
    values = {
        "time_unix_s": NOW,
        "server": {
            "version": "0.1.0",
            "model": "qwen",
            "instance_id": None,
            "role": "router",
            "ready": True,
            "draining": False,
            "num_open_requests": 0,
            "policy": "cost",
        },
        "traffic": {
            "num_in_flight": 7,
            "num_long_waiting": 0,
            "finished_per_s": 4.5,
            "failed_per_s": 0.0,
            "disconnected_per_s": 0.0,
            "prompt_tokens_per_s": {"device": 100.0, "host": 200.0, "storage": 300.0, "computed": 40_000.0},
            "output_tokens_per_s": 640.0,
            "ttft_s": QUANTILES,
            "itl_s": QUANTILES,
            "e2e_s": {"p50": None, "p90": None, "p99": None},
        },
        "hit_rate": HITS,
        "handoffs": HANDOFFS,
        "workers": [worker("10.0.0.2:9001", "decode"), worker("10.0.0.1:9001", "prefill")],
        "pools": [],
        "routing": {"reasons": {}, "num_failovers": 0, "num_index_pages": 0, "num_index_bytes": 0, "decisions": []},
        "series": {"times_unix_s": [], "lines": {}},
        **changes,
    }
    return msgspec.convert(values, Snapshot)


SLOW = SlowRequest(
    id="req-1",
    status="finished",
    duration_s=12.5,
    ttft_s=0.7,
    prompt_tokens=8192,
    completion_tokens=128,
    stages=(SlowStage(name="queued", duration_s=0.2), SlowStage(name="decode", duration_s=11.0)),
)


def shown(reading: Reading, width: int = 160) -> str:
    output = io.StringIO()
    Console(file=output, width=width, highlight=False).print(view(reading, url=URL, width=width, now_unix_s=NOW))
    return output.getvalue()


def test_the_fleet_is_shown() -> None:
    text = shown(Reading(snapshot=snapshot(), slowest=(SLOW,)))
    for words in (
        *(URL, "ready", "router 0.1.0", "qwen", "cost"),
        *("7 in flight, 4.5/s", "output 640 tok/s", "40k computed, 100 device, 200 host, 300 storage"),
        *("hits 62% of at most 70%", "TTFT 50 ms/250 ms/1.5 s", "request -/-/-", "handoffs 2.0/s, 12 ms each"),
        *("10.0.0.1:9001", "prefill", "25%+50% of 2.0k", "1.2k", "90%"),
        *("req-1", "12.5 s", "700 ms", "8192", "128", "decode 11.0 s"),
    ):
        assert words in text, text
    rows = [line.split()[1] for line in text.splitlines() if "10.0.0." in line]
    assert rows == ["decode", "prefill"]


@pytest.mark.parametrize("width", [20, 40, 61, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    pool = {
        **dict.fromkeys(("location", "master"), "10.0.0.9:50051"),
        "age_s": 1.0,
        "problem": "",
        **dict.fromkeys(("num_stores", "num_pages", "capacity_bytes", "used_bytes"), 3),
        **dict.fromkeys(("ssd_capacity_bytes", "ssd_used_bytes"), 0),
        "stores": {},
    }
    many = [worker(f"a-host-with-a-long-name-{number}:9001", "prefill") for number in range(30)]
    text = shown(Reading(snapshot=snapshot(workers=many, pools=[pool]), slowest=(SLOW,) * 8), width)
    assert max(map(len, text.splitlines())) <= width
    if width >= 40:
        assert "12" in text, "the number of requests that wait is shown on every terminal"
    assert ("device pages" in text) == (width >= 61)
    assert ("host pages" in text) == (width >= 120)


def test_a_worker_that_is_not_ready_shows_why() -> None:
    lost = worker("w", "decode", state="lost", problem="no answer", num_running=None, num_waiting=None, pages=None)
    text = shown(Reading(snapshot=snapshot(workers=[lost])))
    assert "lost: no answer" in text
    assert shown(Reading(snapshot=snapshot(workers=[]))).count("no worker") == 1


def test_a_gateway_that_does_not_answer_keeps_its_last_figures() -> None:
    text = shown(Reading(snapshot=snapshot(), problem="no Kvist server answers", since_unix_s=NOW - 42))
    assert "unreachable since" in text
    assert "(42 s): no Kvist server answers" in text
    assert "10.0.0.1:9001" in text
    assert "unreachable since" in shown(Reading(problem="refused", since_unix_s=NOW))


def test_texts_of_a_server_cannot_command_the_terminal() -> None:
    evil = "\x1b]0;owned\x07[bold]"
    server = msgspec.structs.replace(snapshot().server, model=evil)
    reading = Reading(
        snapshot=msgspec.structs.replace(
            snapshot(workers=[worker(evil, evil, state="lost", problem=evil)]), server=server
        ),
        slowest=(SlowRequest(id=evil, status=evil, duration_s=1.0),),
        problem=evil,
        since_unix_s=NOW,
    )
    text = shown(reading)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]" in text


def test_a_long_id_of_a_request_does_not_hide_its_times() -> None:
    slow = msgspec.structs.replace(SLOW, id="chatcmpl-" + "0" * 40)
    for width in (60, 80, 100):
        text = shown(Reading(snapshot=snapshot(), slowest=(slow,)), width)
        assert all(time in text for time in ("12.5 s", "700 ms", "decode 11.0 s")), text
        assert "chatcmpl-" in text
