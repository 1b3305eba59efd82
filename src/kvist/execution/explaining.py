"""The explanation of a run: its plan beside what happened."""

from __future__ import annotations

from collections.abc import Iterable

from kvist.execution.report import Done, DoneWarm, Report
from kvist.planning.explanation import Explanation, Row, plain_row
from kvist.planning.graph import Graph, Operation, describe, state_name


def explained(graph: Graph, report: Report) -> Explanation:
    """Return the operations of the graph with their requests, and the prefixes that were computed ahead for them."""
    done = {each.operation.operation_id: each for each in report.of_graph(graph)}
    ids = {each.operation_id for each in graph.operations}
    warms = [each for each in report.warms if not each.warm.users or ids & set(each.warm.users)]
    rows = [_warm_row(each) for each in warms]
    requests = [_row(operation, done.get(operation.operation_id)) for operation in graph.operations]
    notes = list(report.notes)
    for pin in report.pins:
        if ids & set(pin.until):
            notes.append(f"kept cached until its last use: a prefix of {pin.num_tokens} tokens, {len(pin.until)} uses")
    if report.num_refusals:
        notes.append(
            f"the server refused {report.num_refusals} requests as overloaded; fewer were sent at once after that"
        )
    if expected := _token_note(done.values(), warms):
        notes.append(expected)
    if report.num_planned:
        took, cpu = (1000 * each / report.num_planned for each in (report.planning_s, report.planning_cpu_s))
        notes.append(f"planning took {took:.2f} ms an operation, {cpu:.2f} ms of it with a processor")
    return Explanation(rows=(*rows, *requests), notes=tuple(notes), happened=True)


def _token_note(requests: Iterable[Done], warms: Iterable[DoneWarm]) -> str:
    """Return the prompt tokens that the plan expected to compute beside those that were; "" without a plan."""
    pairs = [(each.placement.num_computed_tokens, each.served) for each in requests if each.placement is not None]
    pairs += [(each.warm.num_tokens, each.served) for each in warms]
    served = [(expected, each.num_computed_tokens) for expected, each in pairs if each is not None]
    if not served:
        return ""
    expected, computed = map(sum, zip(*served, strict=True))
    return f"{computed} prompt tokens were computed; the plan expected {expected}"


def _warm_row(done: DoneWarm) -> Row:
    warm, served = done.warm, done.served
    return Row(
        what=f"prefix of {warm.num_tokens} tokens",
        place="",
        state="",
        work="warm",
        worker=(served and served.prefill_worker) or warm.worker or "",
        num_cached_tokens=None if served is None else served.num_cached_tokens,
        num_computed_tokens=None if served is None else served.num_computed_tokens,
        start_ms=1000 * done.start_s,
        predicted_ms=warm.duration_ms,
        took_ms=1000 * (done.end_s - done.start_s),
        reason=done.problem or warm.reason,
    )


def _row(operation: Operation, done: Done | None) -> Row:
    if done is None:
        return plain_row(operation)
    served, placement = done.served, done.placement
    workers = [] if served is None else [one for one in (served.prefill_worker, served.decode_worker) if one]
    if not workers and placement is not None:
        workers = [one for one in (placement.prefill_worker, placement.decode_worker) if one]
    attempts = f"{done.num_attempts} attempts; " if done.num_attempts > 1 else ""
    return Row(
        what=describe(operation),
        place=str(operation.position),
        state=state_name(operation),
        work="one by one" if placement is None else str(placement.work),
        worker=" > ".join(dict.fromkeys(workers)),
        num_cached_tokens=None if served is None else served.num_cached_tokens,
        num_computed_tokens=None if served is None else served.num_computed_tokens,
        start_ms=1000 * done.start_s,
        predicted_ms=None if placement is None else placement.duration_ms,
        took_ms=1000 * (done.end_s - done.start_s),
        reason=done.problem or attempts + ("" if placement is None else placement.reason),
    )
