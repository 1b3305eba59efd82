"""Graphs: edges, what is printed, and graphs that no program records."""

from __future__ import annotations

import pytest

from kvist.planning.graph import (
    Edge,
    Extend,
    Fork,
    Generate,
    Graph,
    GraphError,
    Join,
    Place,
    Position,
    Score,
    Tool,
    describe,
    state_name,
)
from kvist.planning.prompt import Prompt, hole


def _place(operation_id: int, *, after: int | None = None, path: tuple[int, ...] = ()) -> Place:
    return Place(operation_id=operation_id, position=Position("/x/essay.py", 10 + operation_id), after=after, path=path)


def _generate(operation_id: int, prompt: str, *, after: int | None = None) -> Generate:
    return Generate(place=_place(operation_id, after=after), name="answer", prompt=Prompt(prompt), max_tokens=8)


def test_edges_say_whose_text_is_needed_which_order_holds_and_what_is_shared() -> None:
    graph = Graph(
        operations=(
            Extend(place=_place(0), text="Q: "),
            _generate(1, "Q: ", after=0),
            _generate(2, f"Q: {hole(1)} A: ", after=1),
        )
    )
    assert graph.edges() == [
        Edge("after", 0, 1),
        Edge("text of", 1, 2),
        Edge("after", 1, 2),
        Edge("shares", 1, 2, 3),
    ]
    graph.check()


def test_a_graph_prints_one_line_an_operation_with_the_programs_line() -> None:
    score = Score(place=_place(4, path=(0, 2)), name="verdict", prompt=Prompt("Q"), choices=("yes", "no"))
    graph = Graph(operations=(Extend(place=_place(3), text=f"see {hole(1)}"), score), stopped="essay.py:20 decides")
    first, second, last = str(graph).splitlines()
    assert first.split() == ["3", "essay.py:13", "0", "Extend", "'see", "{1}'", "needs", "1"]
    assert second.split() == ["4", "essay.py:14", "0/0.2", "Score", "verdict", "(2", "choices)"]
    assert last == "(the trace ends here: essay.py:20 decides)"


def test_every_kind_of_operation_has_a_description() -> None:
    assert describe(Fork(place=_place(0), prompt=Prompt(), num_branches=3)) == "Fork into 3"
    assert describe(Join(place=_place(0), last_operations=(1, 2))) == "Join 2"
    assert describe(Tool(place=_place(0), name="search")) == "Tool search"
    assert state_name(Tool(place=_place(0, path=(1, 0, 0, 2)), name="search")) == "0/1.0/0.2"


def test_a_cycle_is_an_error_that_names_the_lines() -> None:
    graph = Graph(operations=(_generate(1, f"{hole(2)}"), _generate(2, f"{hole(1)}")))
    with pytest.raises(GraphError, match=r"essay\.py:12: a cycle: the operations at essay\.py:11 -> essay\.py:12"):
        graph.check()


def test_a_result_that_does_not_exist_is_an_error_that_names_the_line() -> None:
    with pytest.raises(GraphError, match=r"essay\.py:11: needs the result of operation 7"):
        Graph(operations=(_generate(1, hole(7)),)).check()
    with pytest.raises(GraphError, match="one id"):
        Graph(operations=(_generate(1, "a"), _generate(1, "b"))).check()


def test_a_long_graph_is_checked_without_recursion() -> None:
    operations = [_generate(0, "a"), *(_generate(n, f"a{hole(n - 1)}", after=n - 1) for n in range(1, 3000))]
    Graph(operations=tuple(reversed(operations))).check()
