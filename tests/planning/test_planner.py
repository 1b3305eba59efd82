"""The planner, purely: a graph and a fleet in, a plan out."""

from __future__ import annotations

import time

from kvist.planning.fleet import Fleet, Native, Role, Running, Worker, unknown_fleet
from kvist.planning.graph import Generate, Graph, Place, Position, Score, Tool
from kvist.planning.plan import Work
from kvist.planning.planner import plan
from kvist.planning.prompt import Prompt, hole

PREFILL, DECODE = Worker(name="p", role=Role.PREFILL), Worker(name="d", role=Role.DECODE)
PAIR = Fleet(workers=(PREFILL, DECODE), native=frozenset(Native), num_lease_tokens=10_000)
SHARED = "You answer questions about plants. " * 40  # 350 tokens


def _place(operation_id: int, program: int = 0) -> Place:
    return Place(operation_id=operation_id, position=Position("p.py", operation_id), program=program)


def _generate(operation_id: int, prompt: str, *, program: int = 0, max_tokens: int = 32) -> Generate:
    return Generate(place=_place(operation_id, program), name="a", prompt=Prompt(prompt), max_tokens=max_tokens)


def _score(operation_id: int, prompt: str) -> Score:
    return Score(place=_place(operation_id), name="v", prompt=Prompt(prompt), choices=("yes", "no"))


def _graph(*operations: Generate | Score | Tool) -> Graph:
    return Graph(operations=operations)


def test_a_score_is_prefill_work_and_touches_no_decode_worker() -> None:
    made = plan(_graph(_score(1, SHARED)), PAIR, Running())
    (placed,) = made.placements
    assert (placed.work, placed.prefill_worker, placed.decode_worker) == (Work.PREFILL, "p", None)
    assert placed.num_output_tokens == 0


def test_a_long_new_prompt_goes_to_prefill_and_a_short_extension_stays_on_decode() -> None:
    long = plan(_graph(_generate(1, SHARED)), PAIR, Running()).placements[0]
    assert (long.work, long.prefill_worker, long.decode_worker) == (Work.SPLIT, "p", "d")
    cached = Running(cached={"p": (SHARED,), "d": (SHARED,)})
    short = plan(_graph(_generate(1, SHARED + "And why?")), PAIR, cached).placements[0]
    assert (short.work, short.prefill_worker, short.decode_worker) == (Work.DECODE, "d", "d")
    assert short.num_computed_tokens == 2
    assert short.num_cached_tokens == 350


def test_a_slow_handoff_keeps_longer_extensions_on_decode() -> None:
    slow = Worker(name="d", role=Role.DECODE, handoff_s=1.0)
    placed = plan(_graph(_generate(1, SHARED)), Fleet(workers=(PREFILL, slow)), Running()).placements[0]
    assert placed.work is Work.DECODE


def test_a_request_goes_to_the_worker_that_has_its_prefix_unless_that_one_is_too_busy() -> None:
    one, two = Worker(name="u1", role=Role.UNIFIED), Worker(name="u2", role=Role.UNIFIED)
    running = Running(cached={"u2": (SHARED,)})
    placed = plan(_graph(_generate(1, SHARED + "x")), Fleet(workers=(one, two)), running).placements[0]
    assert placed.prefill_worker == "u2"
    busy = Worker(name="u2", role=Role.UNIFIED, queue_s=5.0)
    placed = plan(_graph(_generate(1, SHARED + "x")), Fleet(workers=(one, busy)), running).placements[0]
    assert placed.prefill_worker == "u1"


def test_a_shared_prefix_is_computed_once_ahead_and_kept_until_its_last_use() -> None:
    made = plan(_graph(*(_generate(n, f"{SHARED}Question {n}") for n in range(8))), PAIR, Running())
    (warm,) = made.warm
    assert (warm.prompt.outline, warm.worker) == (SHARED + "Question ", "p")
    assert warm.users == tuple(range(8))
    (pin,) = made.pin
    assert (pin.prompt, pin.until) == (warm.prompt, tuple(range(8)))
    assert {(each.work, each.prefill_worker) for each in made.placements} == {(Work.SPLIT, "p")}
    assert max(each.num_computed_tokens for each in made.placements) <= 1
    assert len({each.session for each in made.placements}) == 1


def test_nothing_is_computed_ahead_for_one_use_or_for_a_short_prefix() -> None:
    assert not plan(_graph(_generate(1, SHARED)), PAIR, Running()).warm
    short = plan(_graph(*(_generate(n, f"Hi. Question {n}") for n in range(8))), PAIR, Running())
    assert not short.warm
    assert not short.pin


def test_a_prefix_that_is_warm_already_is_not_computed_again() -> None:
    graph = _graph(*(_generate(n, f"{SHARED}Question {n}") for n in range(8)))
    running = Running(warmed=frozenset({SHARED + "Question "}), pinned=frozenset({SHARED + "Question "}))
    made = plan(graph, PAIR, running)
    assert not made.warm
    assert not made.pin


def test_an_outer_prefix_is_computed_before_the_inner_ones() -> None:
    essays = [f"{SHARED}Essay {letter}: " + f"{letter} " * 600 for letter in "ab"]
    questions = [_score(10 * n + m, f"{essay}Criterion {m}") for n, essay in enumerate(essays) for m in range(4)]
    made = plan(_graph(*questions), PAIR, Running())
    outer, first, second = made.warm
    assert first.num_tokens < 350  # beyond the outer prefix
    assert [outer.is_awaited, first.is_awaited, second.is_awaited] == [False, True, True]
    gates = {each.operation_id: each.after_warm for each in made.placements}
    assert gates[0] == first.prompt.outline
    assert gates[13] == second.prompt.outline
    busy = plan(_graph(*questions), PAIR, Running(num_in_flight=1))
    assert [each.after_warm for each in busy.warm] == [None, *[outer.prompt.outline] * 2]


def test_requests_wait_for_a_prefix_only_where_the_server_would_compute_it_several_times() -> None:
    short, long = ([_generate(n, f"{SHARED * times}Question {n}") for n in range(8)] for times in (1, 4))
    for requests, running, are_waiting in (
        (short, Running(), False),  # alone in its step: the others find it cached
        (short, Running(num_in_flight=1), True),  # in one step with the others
        (long, Running(num_in_flight=1), False),  # the server lets the others wait
    ):
        made = plan(_graph(*requests), PAIR, running)
        (warm,) = made.warm
        gate = warm.prompt.outline if are_waiting else None
        assert {each.after_warm for each in made.placements} == {gate}


def test_branches_stay_with_their_parent_unless_its_queue_is_longer_than_computing_the_prefix_again() -> None:
    other = Worker(name="q", role=Role.PREFILL)
    branches = _graph(*(_generate(n, f"{SHARED}{n}") for n in range(8)))
    for queue_s, workers in ((0.0, {"p"}), (0.3, {"p"}), (0.5, {"q"})):  # computing it again costs 4 * 0.0875 s
        parent = Worker(name="p", role=Role.PREFILL, queue_s=queue_s)
        fleet = Fleet(workers=(parent, other, DECODE), native=frozenset(Native))
        made = plan(branches, fleet, Running(cached={"p": (SHARED,)}))
        assert {each.prefill_worker for each in made.placements} == workers


def test_a_prefill_worker_writes_a_short_answer_itself() -> None:
    alone = Worker(name="p", role=Role.PREFILL, max_answer_tokens=16)
    fleet = Fleet(workers=(alone, DECODE), native=frozenset(Native))
    short, long = plan(
        _graph(_generate(1, SHARED, max_tokens=16), _generate(2, SHARED, max_tokens=17)), fleet, Running()
    ).placements
    assert (short.work, short.prefill_worker, short.decode_worker) == (Work.PREFILL, "p", "p")
    assert (long.work, long.prefill_worker, long.decode_worker) == (Work.SPLIT, "p", "d")


def test_a_request_that_waits_for_a_result_keeps_no_worker_from_other_work() -> None:
    waiting = _generate(2, f"{SHARED}{hole(1)} And now?", max_tokens=64)
    made = plan(_graph(_generate(1, SHARED, max_tokens=64), waiting, _generate(3, SHARED + "x")), PAIR, Running())
    starts = {each.operation_id: each.start_ms for each in made.placements}
    assert starts[2] > 1000  # 32 tokens at 25 a second
    assert starts[3] < 100


def test_a_batch_runs_depth_first_over_its_prefix_tree() -> None:
    texts = {5: "b/2", 1: "a/1", 3: "b/1", 2: "a/2", 4: "a/1/x"}
    made = plan(_graph(*(_generate(n, text) for n, text in sorted(texts.items()))), PAIR, Running())
    assert [texts[each] for each in made.order] == ["a/1", "a/1/x", "a/2", "b/1", "b/2"]


def test_a_request_that_needs_a_result_is_planned_after_the_request_that_gives_it() -> None:
    made = plan(_graph(_generate(1, "z"), _generate(2, f"a{hole(1)}")), PAIR, Running())
    assert made.order == (1, 2)
    first, second = made.placements
    assert second.start_ms >= first.start_ms + first.duration_ms


def test_pins_stay_within_the_room_for_leases_and_prefer_the_most_useful_prefix() -> None:
    often = [_generate(n, f"{SHARED}Question {n}") for n in range(8)]
    seldom = [_generate(20 + n, f"Other {SHARED}Question {n}") for n in range(2)]
    fleet = Fleet(workers=(PREFILL, DECODE), native=frozenset(Native), num_lease_tokens=400)
    (pin,) = plan(_graph(*often, *seldom), fleet, Running()).pin
    assert pin.until == tuple(range(8))
    full = Running(num_pinned_tokens=100)
    assert not plan(_graph(*often, *seldom), fleet, full).pin


def test_branches_on_several_workers_keep_their_prefix_on_each_of_them() -> None:
    workers = (PREFILL, Worker(name="q", role=Role.PREFILL), DECODE)
    fleet = Fleet(workers=workers, native=frozenset(Native), num_lease_tokens=10_000)
    branches = _graph(*(_score(n, f"{SHARED}{n} {'word ' * 400}") for n in range(8)))
    made = plan(branches, fleet, Running(cached={"p": (SHARED,), "q": (SHARED,)}, width=2))
    users = {pin.worker: set(pin.until) for pin in made.pin}
    assert users == {
        name: {each.operation_id for each in made.placements if each.prefill_worker == name} for name in ("p", "q")
    }
    assert all(len(each) > 1 for each in users.values())
    assert not plan(branches, fleet, Running(cached={"p": (SHARED,), "q": (SHARED,)})).pin, "requests hold their pages"


def test_a_prefix_is_kept_for_a_use_that_waits_for_another_prompt_and_not_for_the_next_turn() -> None:
    later = f"{SHARED}Question 1{hole(1)} And now?"
    cached = Running(cached={"p": (SHARED,)})
    follows = _graph(_score(1, SHARED + "Question 1"), _score(2, later))
    assert not plan(follows, PAIR, cached).pin
    waits = _graph(_score(0, "Other"), _score(1, SHARED + "Question 1"), _score(2, f"{later}{hole(0)}"))
    (pin,) = plan(waits, PAIR, cached).pin
    assert pin.until == (1, 2)


def test_the_known_part_of_the_next_turn_is_computed_while_a_tool_runs_if_prefill_is_idle() -> None:
    tool = Tool(place=_place(1), name="search", prompt=Prompt(SHARED))
    (warm,) = plan(_graph(tool), PAIR, Running()).warm
    assert (warm.prompt.outline, warm.users) == (SHARED, ())
    assert not plan(_graph(tool), PAIR, Running(num_in_flight=1)).warm
    assert not plan(_graph(tool), PAIR, Running(warmed=frozenset({SHARED}))).warm


def test_the_known_part_of_a_turn_is_computed_while_it_waits_for_other_results() -> None:
    graph = _graph(_generate(1, "A short prompt"), _generate(2, f"{SHARED}{hole(1)} And now?"))
    made = plan(graph, PAIR, Running(num_in_flight=9))
    (warm,) = made.warm
    assert (warm.prompt.outline, warm.users) == (SHARED, ())
    assert made.order == (1, 2)
    assert not plan(graph, PAIR, Running(warmed=frozenset({SHARED}))).warm
    for worker in ("p", "d"):
        assert not plan(graph, PAIR, Running(cached={worker: (SHARED,)})).warm


def test_a_prompt_that_the_awaited_request_computes_is_not_computed_ahead() -> None:
    assert not plan(_graph(_generate(1, SHARED), _generate(2, f"{SHARED}{hole(1)} And now?")), PAIR, Running()).warm


def test_the_width_follows_the_client_and_the_page_pools() -> None:
    graph = _graph(*(_generate(n, f"{n} {SHARED}", max_tokens=64) for n in range(8)))
    assert plan(graph, PAIR, Running(width=5)).width == 5
    small = Worker(name="d", role=Role.DECODE, num_cache_tokens=1000)
    assert plan(graph, Fleet(workers=(PREFILL, small)), Running(width=64)).width == 2


def test_a_server_without_native_operations_gets_a_plan_that_names_what_is_missing() -> None:
    made = plan(_graph(_score(1, SHARED), _score(2, SHARED + "x")), unknown_fleet("http://other"), Running())
    assert not made.warm
    assert not made.pin
    assert [note.partition(":")[0] for note in made.notes] == [
        "the server has no /v1/continuations/score",
        "the server has no prefill without generation",
        "the server has no leases",
    ]


def test_a_fleet_without_workers_still_gives_a_plan() -> None:
    (placed,) = plan(_graph(_generate(1, "a")), Fleet(workers=()), Running()).placements
    assert placed.work is Work.CLIENT


def test_planning_takes_less_than_a_millisecond_an_operation() -> None:
    graph = _graph(*(_generate(n, f"{SHARED}{'x' * 4000}Question {n}", program=n) for n in range(200)))
    cached = Running(cached={"p": tuple(sorted(f"{SHARED}{n}" for n in range(512)))})
    times = []
    for _ in range(3):
        start_s = time.thread_time()
        plan(graph, PAIR, cached)
        times.append(time.thread_time() - start_s)
    assert min(times) / 200 < 0.001
