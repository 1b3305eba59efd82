"""Plan and no plan give the same texts, for random programs: forks, choices, references, control flow by results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvist.lang as kv
from kvist.errors import KvistError, Overloaded
from kvist.execution.fake_server import FAKE_PAIR, FakeServer
from kvist.planning.fleet import Native, Role, Worker
from kvist.planning.prompt import Prompt
from kvist.testing.rounds import check_time, in_rounds
from tests.budget import budget


@dataclass(frozen=True)
class Step:
    """One step of a random program; `inner` are the steps of the branches of a fork."""

    kind: str
    number: int
    inner: tuple[Step, ...] = ()


_LEAVES = st.builds(Step, st.sampled_from(["text", "gen", "select", "form", "read", "ref", "many"]), st.integers(0, 5))
_STEPS = st.recursive(
    st.lists(_LEAVES, min_size=1, max_size=5),
    lambda steps: st.builds(
        lambda number, inner, after: [Step("fork", number, tuple(inner)), *after], st.integers(0, 2), steps, steps
    ),
    max_leaves=12,
)


def _take(s: kv.State, steps: tuple[Step, ...] | list[Step], names: list[str]) -> None:
    """Add the steps to the state. `names`: the variables that it has."""
    for index, step in enumerate(steps):
        name = f"v{len(names)}.{index}"
        match step.kind:
            case "text":
                s += kv.user(f"Text {step.number} " + "shared words " * (20 * step.number))
            case "gen":
                s += kv.user("Go on.") + kv.assistant(kv.gen(name, max_tokens=1 + step.number, temperature=0.8))
                names.append(name)
            case "many":
                s += kv.assistant("Well, " + kv.gen(name, n=2, temperature=0.8, max_tokens=4))
            case "select":
                s += kv.assistant(kv.select(name, ["red", "green", "dark blue"], temperature=0.1 * step.number))
                names.append(name)
            case "form":
                s += kv.assistant(kv.gen(name, regex="[0-9]+"))
                names.append(name)
            case "read" if names:
                text = str(s[names[step.number % len(names)]])
                s += kv.user(f"You said {text}." if "a" in text else "You said nothing.")
            case "ref" if names:
                s += kv.user(f"Recall {s.ref(names[step.number % len(names)])}!")
            case "fork":
                forks = s.fork(1 + step.number)
                for number, branch in enumerate(forks):
                    branch += kv.user(f"Branch {number}.")
                    _take(branch, step.inner, list(names))
                forks.join()


@kv.function
def random_program(s: kv.State, steps: list[Step], title: str) -> None:
    s += kv.system(f"Title {title}. " + "You are a careful assistant. " * 10)
    _take(s, steps, [])


def _outcome(state: kv.ProgramState) -> dict[str, Any]:
    found = {name: state[name] for name in list(state._variables)}
    return {"text": state.text(), **found}


def _run(server: FakeServer, programs: list[list[Step]], *, plan: bool, seed: int) -> list[dict[str, Any]]:
    endpoint = kv.Endpoint(lambda: server, name="fake")
    try:
        batch = [{"steps": steps, "title": str(index)} for index, steps in enumerate(programs)]
        states = random_program.run_batch(batch, backend=endpoint, plan=plan, seed=seed)
        assert not server.leases
        return [_outcome(state) for state in states]
    finally:
        endpoint.close()


@settings(max_examples=budget(20, long=500))
@given(st.lists(_STEPS, min_size=1, max_size=3), st.integers(0, 2**31), st.sets(st.sampled_from(Native)))
def test_random_programs_give_the_same_texts_with_and_without_a_plan(
    programs: list[list[Step]], seed: int, native: set[Native]
) -> None:
    with_plan = _run(FakeServer(native=frozenset(native)), programs, plan=True, seed=seed)
    assert with_plan == _run(FakeServer(), programs, plan=False, seed=seed)


class _Flaky:
    """Refuses every third request of a prompt that it has not refused yet."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, prompt: Prompt) -> KvistError | None:
        del prompt
        self._count += 1
        return Overloaded("too many requests", retry_after_s=0.001) if self._count % 3 == 0 else None


@settings(max_examples=budget(6, long=100))
@given(st.lists(_STEPS, min_size=1, max_size=2), st.integers(0, 2**31))
def test_refused_requests_are_sent_again_and_give_the_same_texts(programs: list[list[Step]], seed: int) -> None:
    flaky = _run(FakeServer(failures=_Flaky()), programs, plan=True, seed=seed)
    assert flaky == _run(FakeServer(), programs, plan=False, seed=seed)


@in_rounds(3)
def test_a_plan_computes_a_shared_prompt_once_and_no_plan_sends_one_request_at_a_time() -> None:
    @kv.function
    def few_shot(s: kv.State, question: str) -> None:
        s += kv.system("Example question and answer. " * 60)
        s += kv.user(question)
        s += kv.assistant(kv.gen("answer", max_tokens=4))

    batch = [{"question": f"Number {index}?"} for index in range(30)]
    workers = (*FAKE_PAIR, Worker(name="prefill-1", role=Role.PREFILL))  # without a plan, each computes the prompt
    planned, plain = FakeServer(workers=workers), FakeServer(workers=workers)
    endpoints = [kv.Endpoint(lambda: planned, name="planned"), kv.Endpoint(lambda: plain, name="plain")]
    texts = [
        [state.text() for state in few_shot.run_batch(batch, backend=endpoint, plan=index == 0, num_threads=8)]
        for index, endpoint in enumerate(endpoints)
    ]
    one_by_one = few_shot.run(question="Number 0?", backend=endpoints[1], plan=False)
    for endpoint in endpoints:
        endpoint.close()
    assert texts[0] == texts[1]
    assert one_by_one.text() == texts[0][0]
    ideal = 60 * 29 / 4 + 30 * 12
    assert plain.seen.num_computed_tokens > 1.1 * ideal
    num_computed = planned.seen.num_computed_tokens  # more, if the threads are too slow to be planned together
    check_time(num_computed <= 1.1 * ideal, f"{num_computed} tokens were computed, {ideal} are needed")
    assert planned.seen.most_at_once == 8


@pytest.mark.parametrize("plan", [True, False])
def test_every_choice_is_scored_on_prefill_and_in_one_request_where_there_is_a_plan(plan: bool) -> None:
    @kv.function
    def judge(s: kv.State, criteria: list[str]) -> None:
        s += kv.user("Essay: " + "some words " * 100)
        forks = s.fork(len(criteria))
        for branch, criterion in zip(forks, criteria, strict=True):
            branch += kv.user(f"Is it {criterion}?")
            branch += kv.assistant(kv.select("verdict", ["yes", "no", "partly"]))
        forks.join()

    server = FakeServer()
    endpoint = kv.Endpoint(lambda: server, name="fake")
    judge.run(criteria=["clear", "short", "true", "kind", "new"], backend=endpoint, plan=plan)
    endpoint.close()
    assert len(server.seen.scored) == (5 if plan else 15)
    assert server.seen.num_scores_on_decode == 0
    assert not server.seen.generated
