"""The parts of bench/chaos.py: plans of faults, comparisons that find every difference, and counts of what is left."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos import Load, parse
from chaos_checks import held_in, longest_pauses
from chaos_cluster import ChaosCluster, ChaosFailure, Suspension, family_of, num_open_files, processes_of
from chaos_faults import Fault, blackouts, may_begin, plan_faults, role_of
from chaos_load import Answer, Case, Choice, Comparison, StreamReader, difference, make_cases, prefix_difference
from chaos_plan import check_gpus, plans_of, seconds_of_load

NAMES = ["prefill-0", "prefill-1", "decode-0", "unified-0", "gateway-0", "gateway-1"]


@given(st.integers(0, 1000), st.booleans())
def test_a_seed_plans_the_same_faults_again_in_the_order_of_their_times(seed: int, has_blackouts: bool) -> None:
    options: dict[str, Any] = {"seed": seed, "seconds": 300, "interval_s": 3.0, "has_blackouts": has_blackouts}
    faults = plan_faults(NAMES, **options)
    assert faults == plan_faults(NAMES, **options)
    assert [each.at_s for each in faults] == sorted(each.at_s for each in faults)
    assert {role_of(name) for each in faults for name in each.victims} == {"prefill", "decode", "unified", "gateway"}
    dark = {each.victims for each in faults if each.fault is Fault.BLACKOUT}
    assert dark == (set(blackouts(NAMES)) if has_blackouts else set()), "every role is dead as a whole at least once"
    for each in faults:
        assert each.for_s > 0 if each.fault.is_stop or each.fault is Fault.BLACKOUT else each.for_s == 0
    assert faults != plan_faults(NAMES, **{**options, "seed": seed + 1})


def test_the_only_role_of_a_cluster_is_never_dead_as_a_whole() -> None:
    assert blackouts(["unified-0", "unified-1", "gateway-0"]) == []


@given(st.sets(st.sampled_from(NAMES)), st.integers(0, 100))
def test_a_fault_waits_until_another_worker_and_gateway_can_serve(up: set[str], seed: int) -> None:
    workers = [name for name in up if role_of(name) != "gateway"]
    gateways = [name for name in up if role_of(name) == "gateway"]
    for each in plan_faults(NAMES, seed=seed, seconds=30, interval_s=3.0, has_blackouts=True):
        left = up - set(each.victims)
        can_serve = bool(left & set(workers)) and bool(left & set(gateways))
        assert may_begin(each, serving=workers, ready_gateways=gateways) is can_serve


def whole_answer() -> Answer:
    choices = {
        index: Choice(
            text="ab",
            token_ids=[1, 2],
            logprob_tokens=["a", "b"],
            logprobs=[None, -0.5],
            finish_reason="stop",
        )
        for index in range(2)
    }
    return Answer(choices=choices, num_prompt_tokens=3, num_output_tokens=4, is_whole=True)


CHANGES: list[tuple[Callable[[Answer], object], bool]] = [  # change, seen by lengths alone
    (lambda a: a.choices.pop(1), True),
    (lambda a: setattr(a, "num_output_tokens", 5), True),
    (lambda a: a.choices[1].token_ids.append(2), True),
    (lambda a: a.choices[0].token_ids.pop(), True),
    (lambda a: setattr(a.choices[1], "finish_reason", "length"), True),
    (lambda a: a.choices[0].token_ids.__setitem__(1, 3), False),
    (lambda a: setattr(a.choices[0], "text", "aa"), False),
    (lambda a: a.choices[0].logprob_tokens.__setitem__(0, "c"), False),
    (lambda a: a.choices[0].logprobs.__setitem__(1, -0.51), False),
    (lambda a: a.choices[0].logprobs.__setitem__(0, -0.5), False),
]


@pytest.mark.parametrize(("change", "seen_by_lengths"), CHANGES)
def test_every_difference_from_the_twin_is_found(change: Callable[[Answer], object], seen_by_lengths: bool) -> None:
    twin, found = whole_answer(), whole_answer()
    assert difference(twin, found, Comparison.TOKENS) is None
    found.choices[0].logprobs[1] = -0.5001  # rounding
    assert difference(twin, found, Comparison.TOKENS) is None
    change(found)
    assert difference(twin, found, Comparison.TOKENS) is not None
    assert (difference(twin, found, Comparison.LENGTHS) is not None) is seen_by_lengths


def test_the_beginning_of_an_answer_is_compared_with_that_of_its_twin() -> None:
    twin = whole_answer()
    part = copy.deepcopy(twin)
    part.choices[0].token_ids.pop()
    assert prefix_difference(twin, part, Comparison.TOKENS) is None
    part.choices[1].token_ids[0] = 9
    assert prefix_difference(twin, part, Comparison.TOKENS) == "choice 1: another token at 0"
    assert prefix_difference(twin, part, Comparison.LENGTHS) is None
    part.choices[1].token_ids += [1, 2]
    assert prefix_difference(twin, part, Comparison.LENGTHS) is not None


def test_a_stream_is_read_in_pieces_of_any_size() -> None:
    events: list[dict[str, object]] = [
        {"choices": [{"index": 0, "text": "a", "token_ids": [1], "finish_reason": None}]},
        {"choices": [{"index": 0, "text": "é", "token_ids": [2, 3], "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}, "kvist": {"failovers": 2}},
    ]
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    for size in (1, 7, len(body)):
        reader = StreamReader()
        for begin in range(0, len(body), size):
            reader.on_piece(body[begin : begin + size], float(begin))
        answer = reader.answer
        assert answer.is_whole
        assert (answer.choices[0].text, answer.choices[0].token_ids) == ("aé", [1, 2, 3])
        assert (answer.num_prompt_tokens, answer.num_output_tokens, answer.num_failovers) == (4, 3, 2)
        assert len(reader.event_times_s) == 3


def test_cases_have_every_kind_and_in_lengths_no_length_that_depends_on_tokens() -> None:
    cases = make_cases(seed=3, count=40, max_tokens=(4, 8), comparison=Comparison.TOKENS)
    fields = set().union(*(case.body for case in cases))
    assert {"seed", "n", "echo", "logprobs", "frequency_penalty", "logit_bias", "include_stop_str_in_output"} <= fields
    assert cases == make_cases(seed=3, count=40, max_tokens=(4, 8), comparison=Comparison.TOKENS)
    for case in make_cases(seed=3, count=40, max_tokens=(4, 8), comparison=Comparison.LENGTHS):
        assert case.body["ignore_eos"]
        assert case.name != "stop string"


def test_held_pages_and_requests_are_read_from_the_metrics_of_a_gateway() -> None:
    metrics = """# TYPE kvist:kv_pages gauge
kvist:kv_pages{role="decode",state="owned",worker="d"} 3.0
kvist:kv_pages{role="decode",state="cached",worker="d"} 100.0
kvist:kv_pages{role="prefill",state="in_flight",worker="p"} 2.0
kvist:gateway_requests_in_flight 1.0
kvist:num_requests_running{role="decode",worker="d"} 4.0
"""
    assert held_in(metrics) == (5, 5)


def test_the_longest_pauses_are_by_the_fault_that_happened_meanwhile() -> None:
    suspensions = [
        Suspension(begin_s=10.0, end_s=12.0, of_gateway=False),
        Suspension(begin_s=20.0, end_s=22.0, of_gateway=True),
    ]
    assert longest_pauses([(1.0, 1.5), (9.0, 11.0), (12.5, 13.0), (21.0, 24.0)], suspensions) == {
        "beside kills": 0.5,
        "beside suspended workers": 2.0,
        "beside suspended gateways": 3.0,
    }


def test_a_process_that_outlives_the_leader_of_its_session_is_found() -> None:
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print(flush=True); time.sleep(60)"
    leader = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    leader.stdout.readline()
    _, child = family_of(leader.pid)
    leader.kill()
    leader.wait(60)
    leader.stdout.close()
    assert processes_of({leader.pid}) == [child]
    subprocess.run(["kill", "-9", str(child)], check=True)
    give_up_s = time.monotonic() + 60
    while processes_of({leader.pid}):
        assert time.monotonic() < give_up_s


# ---------------------------------------------------------------- a run whose answers are wrong

TWIN = [{"choices": [{"index": 0, "text": "a", "token_ids": [token], "finish_reason": None}]} for token in (1, 2)]
LAST = {"choices": [{"index": 0, "text": "", "token_ids": [3], "finish_reason": "stop"}]}
ERROR = {"error": {"code": "worker_lost", "message": "lost"}}
DONE = "[DONE]"


async def read_some(events: list[object], *, gateway_ends: bool = False) -> Load:
    """Return a load that has read a few streams with these events from a server."""
    case = Case(name="case", body={"prompt": "p", "stream": True})
    reader = StreamReader()
    for event in (*TWIN, LAST, DONE):
        reader.on_piece(sse(event), 0.0)
    gateway = SimpleNamespace(name="gateway-0", num_ends=0, plan=SimpleNamespace(url=""))
    fresh = itertools.count()

    async def serve(incoming: asyncio.StreamReader, outgoing: asyncio.StreamWriter) -> None:
        await incoming.readuntil(b"}")
        ends = gateway_ends and next(fresh) == 0
        gateway.num_ends += ends
        body = b"".join(map(sse, (*TWIN, LAST, DONE) if gateway_ends and not ends else events))
        length = len(body) + ends  # one byte is missing when the gateway ends
        outgoing.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body)
        await outgoing.drain()
        outgoing.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        gateway.plan.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        cluster = SimpleNamespace(
            gateways=[gateway], members={"gateway-0": gateway}, ready_gateways=lambda: ["gateway-0"]
        )
        load = Load(cast(ChaosCluster, cluster), [(case, reader.answer)], seed=4)
        await load.run(0.05, 1)
    return load


def sse(event: object) -> bytes:
    return b"data: " + (DONE if event == DONE else json.dumps(event)).encode() + b"\n\n"


async def test_equal_streams_are_counted_and_give_no_finding() -> None:
    tally = (await read_some([*TWIN, LAST, DONE])).tally
    assert (tally.errors, tally.wrong, tally.num_cut) == ([], [], 0)
    assert tally.num_streams > 0


@pytest.mark.parametrize(
    ("events", "num_wrong", "error"),
    [
        ([TWIN[0], TWIN[0], LAST, DONE], 1, ""),
        ([TWIN[0], LAST, DONE], 1, ""),
        ([*TWIN, LAST], 0, "without [DONE]"),
        ([TWIN[0], ERROR], 0, "worker_lost"),
        ([TWIN[1], ERROR], 1, "worker_lost"),
    ],
    ids=["a repeated token", "a gap", "no end", "an error", "another token and an error"],
)
async def test_a_stream_that_is_not_its_twin_is_a_finding(events: list[object], num_wrong: int, error: str) -> None:
    tally = (await read_some(events)).tally
    assert bool(tally.wrong) == bool(num_wrong)
    assert error in "".join(tally.errors)
    assert bool(tally.errors) == bool(error)


async def test_a_stream_that_was_cut_with_its_gateway_is_sent_again_and_its_part_is_compared() -> None:
    tally = (await read_some([TWIN[0]], gateway_ends=True)).tally
    assert (tally.num_cut, tally.errors, tally.wrong) == (1, [], [])
    assert tally.num_streams > 0
    tally = (await read_some([TWIN[1]], gateway_ends=True)).tally
    assert (tally.num_cut, tally.errors, len(tally.wrong)) == (1, [], 1)


GPU_RUN = ("--compare=lengths", "--model-path=FOLDER", "--prefill=1", "--decode=2", "--unified=1")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--gpus=2", *GPU_RUN), None),
        (("--gpus=1", *GPU_RUN), None),
        (("--gpus=3", *GPU_RUN), "give --gpus 2"),
        (("--gpus=2", "--model-path=FOLDER"), "--compare lengths"),
        (("--gpus=2", "--compare=lengths"), "--model-path"),
        ((), None),
    ],
)
def test_gpus_that_a_run_cannot_use_are_an_error_before_anything_starts(
    options: tuple[str, ...], problem: str | None
) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "4,5"}
    if problem is None:
        check_gpus(parse(options), environ)
    else:
        with pytest.raises(ChaosFailure, match=problem):
            check_gpus(parse(options), environ)


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_workers_share_the_gpus_of_a_run_and_their_memory(num_gpus: int, tmp_path: Path) -> None:
    flags = ("--", "--load-format", "dummy", "--max-total-tokens", "65536")
    plans, reference = plans_of(parse((f"--gpus={num_gpus}", *GPU_RUN, *flags)), tmp_path)
    workers = [plan.argv for plan in plans if role_of(plan.name) != "gateway"]
    places = [next(word for word in argv if word.startswith("--base-gpu-id=")) for argv in workers]
    assert places == [f"--base-gpu-id={index % num_gpus}" for index in range(4)]
    shares = {word for argv in workers for word in argv if word.startswith("--mem-fraction-static=")}
    assert shares == {f"--mem-fraction-static={0.8 * num_gpus / 4:.4f}"}
    assert all(argv.count("--max-total-tokens") == 1 and "--max-total-tokens=4096" not in argv for argv in workers)
    assert reference is None, "the cluster computes the twins itself"


def test_a_bounded_run_shortens_its_load_by_a_long_start_and_keeps_time_for_the_checks() -> None:
    assert seconds_of_load(600, None, 300) == 600
    assert seconds_of_load(400, 580, 50) == 400
    assert seconds_of_load(600, 580, 100) == 420
    with pytest.raises(ChaosFailure, match="--within-s 180"):
        seconds_of_load(600, 180, 130)


def test_open_files_of_the_gpu_driver_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "7" / "fd"
    folder.mkdir(parents=True)
    for name, target in {"0": "/dev/null", "1": "/dev/nvidia0", "2": "/dev/nvidiactl", "3": "socket:[1]"}.items():
        (folder / name).symlink_to(target)
    assert num_open_files(7, tmp_path) == 2
