"""Traces and explanations before a run: which part of a program is known without results."""

from __future__ import annotations

import pytest

import kvist.lang as kv
from kvist.execution.fake_server import FAKE_PAIR
from kvist.planning.fleet import Fleet, Native
from kvist.planning.graph import Extend, Fork, Generate, Join, Score, Tool
from kvist.planning.prompt import holes_of

PAIR = Fleet(workers=FAKE_PAIR, native=frozenset(Native), num_lease_tokens=1 << 16)


@kv.tool
def search(query: str) -> str:
    raise AssertionError(f"a trace calls no tool: {query}")


@kv.function
def review(s: kv.State, text: str, criteria: list[str]) -> None:
    s += kv.system("You grade essays. " * 20)
    s += kv.user("Essay: " + text)
    branches = s.fork(len(criteria))
    for branch, criterion in zip(branches, criteria, strict=True):
        branch += kv.user(f"Is it {criterion}?")
        branch += kv.assistant(kv.select("verdict", ["yes", "no"]))
    branches.join()
    s += kv.user("Summarise: " + ", ".join(str(one).strip() for one in s["verdict"]))  # type: ignore[attr-defined]
    s += kv.assistant(kv.gen("summary", max_tokens=80))
    s += kv.user(search(f"about {s['summary']}"))
    s += kv.assistant(kv.gen("grade", regex="[A-F]"))
    if s["grade"] == "A":
        s += kv.user("Congratulate.") + kv.assistant(kv.gen("praise"))


def test_a_trace_holds_everything_up_to_the_first_decision() -> None:
    graph = review.trace(text="words " * 100, criteria=["clear", "short"])
    graph.check()
    kinds = [type(each) for each in graph.operations]
    assert kinds.count(Score) == 2
    assert kinds.count(Generate) == 2
    assert [kinds.count(kind) for kind in (Fork, Join, Tool)] == [1, 1, 1]
    assert graph.stopped.startswith("test_tracing.py:")
    assert graph.stopped.endswith("decides about a result")
    verdicts = [each.operation_id for each in graph.operations if isinstance(each, Score)]
    (summarise,) = (each for each in graph.operations if isinstance(each, Extend) and "Summarise" in each.text)
    assert list(holes_of(summarise.text)) == verdicts
    assert "praise" not in str(graph)


def test_a_trace_ends_at_conversions_and_lengths_and_reports_real_mistakes() -> None:
    for decide in (int, len, bool, list, lambda text: text.split(), lambda text: "a" in text, lambda text: {text: 1}):

        def body(s: kv.State, decide: object = decide) -> None:
            s += "Q" + kv.gen("x")
            decide(s["x"])  # type: ignore[operator]
            s += kv.gen("never")

        assert "decides about a result" in kv.function(body).trace().stopped

    def later_error(s: kv.State) -> None:
        s += "Q" + kv.gen("x")
        raise KeyError(f"no {s['x']}")

    assert "KeyError with a result that is not known yet" in kv.function(later_error).trace().stopped

    def early_error(s: kv.State) -> None:
        raise KeyError(f"a mistake of {s.path}")

    with pytest.raises(KeyError, match="a mistake"):
        kv.function(early_error).trace()


def test_an_explanation_before_a_run_names_work_lines_and_what_is_computed_ahead() -> None:
    explanation = review.explain(text="words " * 200, criteria=["clear", "short"], fleet=PAIR)
    table = str(explanation)
    assert not explanation.happened
    scores = [row for row in explanation.rows if row.what.startswith("Score")]
    assert {row.work for row in scores} == {"prefill"}
    assert all((row.num_computed_tokens or 0) < 30 for row in scores)
    assert any(row.work == "warm" for row in explanation.rows)
    assert "kept cached until its last use" in table
    assert "the rest is planned while the program runs" in table
    page = explanation.html()
    assert page.count("<rect") == sum(row.start_ms is not None for row in explanation.rows)
    assert "&lt;" not in explanation.svg()


def test_a_batch_is_explained_in_depth_first_order() -> None:
    @kv.function
    def ask(s: kv.State, topic: str) -> None:
        s += kv.user(f"Tell me about {topic}.") + kv.assistant(kv.gen("x"))

    explanation = ask.explain(batch=[{"topic": topic} for topic in ("b", "a", "c")], fleet=PAIR)
    starts = {row.state: row.start_ms or 0.0 for row in explanation.rows if row.what.startswith("Generate")}
    assert starts["1"] <= starts["0"] <= starts["2"]
