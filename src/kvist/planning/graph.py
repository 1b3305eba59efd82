"""A program as a graph of operations, the planner's input.

An operation knows its place in the program's text. A prompt refers to results by their operation (prompt.hole), so the
edges follow from the operations: *text of* (a prompt or a text needs that result), *after* (the order in one state),
and *shares* (two requests have a common beginning). No operation waits for itself; `Graph.check` proves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from kvist.planning.prompt import Prompt, common_length, holes_of, readable


class Position(NamedTuple):
    """A line of a program. The executor's errors and the explanation name it."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file.rpartition('/')[2]}:{self.line}"


class GraphError(ValueError):
    """A graph that no program records. The message names the program's line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an operation stands: in the text of the program, and in the order of its state."""

    operation_id: int
    position: Position
    program: int = 0  # index of the program in its batch
    path: tuple[int, ...] = ()  # of the state: for each fork on the way, the fork's number and the branch's number
    after: int | None = None  # the operation before this one in its state, or the fork that made the state


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    place: Place

    @property
    def operation_id(self) -> int:
        return self.place.operation_id

    @property
    def position(self) -> Position:
        return self.place.position


@dataclass(frozen=True, slots=True, kw_only=True)
class Extend(_Operation):
    """Constant or computed text that is added to the prompt. The next request carries it."""

    text: str

    @property
    def needs(self) -> tuple[int, ...]:
        return holes_of(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constrain(_Operation):
    """The form of the next generation's result: a kind ("regex", "json_schema") and its source."""

    kind: str
    source: str

    @property
    def needs(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(_Operation):
    name: str
    prompt: Prompt
    max_tokens: int
    num_answers: int = 1
    constraint: int | None = None  # the Constrain

    @property
    def needs(self) -> tuple[int, ...]:
        return self.prompt.holes


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(_Operation):
    """A choice between continuations, by their probabilities: the prompt is computed, nothing is generated."""

    name: str
    prompt: Prompt
    choices: tuple[str, ...]
    scores_without_prompt: bool = False  # also without the prompt (unconditional likelihood)

    @property
    def needs(self) -> tuple[int, ...]:
        return self.prompt.holes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork(_Operation):
    prompt: Prompt  # which all branches share
    num_branches: int

    @property
    def needs(self) -> tuple[int, ...]:
        return self.prompt.holes


@dataclass(frozen=True, slots=True, kw_only=True)
class Join(_Operation):
    last_operations: tuple[int, ...]  # of the branches; empty branches have none

    @property
    def needs(self) -> tuple[int, ...]:
        return self.last_operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool(_Operation):
    """A call of a function of the program. While it runs, `prompt` is the known part of the turn that comes next."""

    name: str
    prompt: Prompt = field(default_factory=Prompt)

    @property
    def needs(self) -> tuple[int, ...]:
        return self.prompt.holes


Operation: TypeAlias = Extend | Constrain | Generate | Score | Fork | Join | Tool
Request: TypeAlias = Generate | Score


class Edge(NamedTuple):
    kind: str  # "text of", "after", "shares"
    source: int
    target: int
    num_chars: int = 0  # of a common beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The operations of one or several programs, in the order of their ids."""

    operations: tuple[Operation, ...]
    stopped: str = ""  # of a trace that is not complete: where and why it ends

    def requests(self) -> Iterator[Request]:
        return (each for each in self.operations if isinstance(each, Generate | Score))

    def by_id(self) -> dict[int, Operation]:
        return {each.operation_id: each for each in self.operations}

    def edges(self) -> list[Edge]:
        found = []
        for each in self.operations:
            found += [Edge("text of", needed, each.operation_id) for needed in each.needs]
            if each.place.after is not None:
                found.append(Edge("after", each.place.after, each.operation_id))
        ordered = sorted(self.requests(), key=lambda one: one.prompt.outline)
        for one, other in pairwise(ordered):
            shared = common_length(one.prompt.outline, other.prompt.outline)
            if shared:
                found.append(Edge("shares", one.operation_id, other.operation_id, shared))
        return found

    def check(self) -> None:
        """Raise `GraphError` for a result that is needed before it exists, a cycle, or an id that occurs twice."""
        known = self.by_id()
        if len(known) != len(self.operations):
            raise GraphError("two operations have one id")
        done: set[int] = set()
        for each in self.operations:
            if not self._earlier(each) <= known.keys():
                missing = min(self._earlier(each) - known.keys())
                raise GraphError(f"{each.position}: needs the result of operation {missing}, which does not exist")
            _visit(each, known, done)

    @staticmethod
    def _earlier(operation: Operation) -> set[int]:
        return {*operation.needs, *([] if operation.place.after is None else [operation.place.after])}

    def __str__(self) -> str:
        lines = [_line(each) for each in self.operations]
        return "\n".join([*lines, f"(the trace ends here: {self.stopped})"] if self.stopped else lines)


def _visit(start: Operation, known: Mapping[int, Operation], done: set[int]) -> None:
    """Walk what `start` needs, depth first. Raises `GraphError` for a cycle."""
    path: list[tuple[Operation, Iterator[int]]] = [(start, iter(sorted(Graph._earlier(start))))]
    on_path = {start.operation_id}
    while path:
        operation, needed = path[-1]
        for each in needed:
            if each in on_path:
                cycle = " -> ".join(str(one.position) for one, _ in path)
                raise GraphError(f"{operation.position}: a cycle: the operations at {cycle} wait for one another")
            if each not in done:
                path.append((known[each], iter(sorted(Graph._earlier(known[each])))))
                on_path.add(each)
                break
        else:
            path.pop()
            on_path.discard(operation.operation_id)
            done.add(operation.operation_id)


def describe(operation: Operation) -> str:
    """Return what the operation does, in a few words."""
    match operation:
        case Extend():
            return f"Extend {_shortened(operation.text)}"
        case Constrain():
            return f"Constrain {operation.kind} {_shortened(operation.source)}"
        case Generate():
            several = f" x{operation.num_answers}" if operation.num_answers > 1 else ""
            return f"Generate {operation.name} (up to {operation.max_tokens} tokens{several})"
        case Score():
            return f"Score {operation.name} ({len(operation.choices)} choices)"
        case Fork():
            return f"Fork into {operation.num_branches}"
        case Join():
            return f"Join {len(operation.last_operations)}"
        case Tool():
            return f"Tool {operation.name}"


def state_name(operation: Operation) -> str:
    """Return the program's number and the state's path: "0", "0/1.2" for branch 2 of the fork 1."""
    path = operation.place.path
    steps = [f"{fork}.{branch}" for fork, branch in zip(path[::2], path[1::2], strict=True)]
    return "/".join([str(operation.place.program), *steps])


def _line(operation: Operation) -> str:
    needs = f"  needs {', '.join(map(str, operation.needs))}" if operation.needs else ""
    place = f"{operation.position!s:<20} {state_name(operation):<8}"
    return f"{operation.operation_id:4}  {place} {describe(operation)}{needs}"


def _shortened(text: str, num_chars: int = 40) -> str:
    shown = readable(text)
    return repr(shown if len(shown) <= num_chars else shown[: num_chars - 3] + "...")
