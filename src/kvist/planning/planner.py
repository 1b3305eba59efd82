"""The planner: graph + fleet + what is out -> plan. Pure.

| decision | rule |
|---|---|
| order | depth first over the prefix tree of all prompts: a prefix is used up before the next one needs its room |
| work | a Score is prefill work; a Generate is decoded where its prompt is computed, unless prefill apart is faster |
| worker | where the request is expected to be done first, by its cached prefix and the work that is placed there |
| warm | a prefix that several requests wait for, where that costs less than computing it with each of them |
| ahead | the known part of a turn that waits for a tool, or for results of other requests |
| pin | a prefix with more than one use to come on a worker, until its last use was sent, within the room for leases |
| width | as many requests as the client may have out, and as fit into the page pools |

Predictions use the measured length of answers. The executor compares them with what happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from kvist.planning.fleet import Fleet, Native, Role, Running, Worker
from kvist.planning.graph import Generate, Graph, Operation, Request, Score, Tool
from kvist.planning.plan import Pin, Placement, Plan, Warm, Work
from kvist.planning.prefixes import CachedPrompts, SharedPrefix, depth_first, shared_prefixes
from kvist.planning.prompt import Prompt

_LEAST_PAGES = 2  # shorter prefixes are not worth a request of their own
_ROUND_TRIP_S = 0.005  # of a request that computes nothing
_LOAD_S = 0.01  # weight of the load where times are about equal


def plan(graph: Graph, fleet: Fleet, running: Running) -> Plan:
    """Return the plan of the graph's operations. The graph holds those that are not done: requests whose prompts are
    known, and later ones whose prompts have holes."""
    return _Planner(graph, fleet, running).plan()


class _Worker:
    """A worker during one plan: its work is queued, its cache grows. Mutable; owned by the planner."""

    def __init__(self, worker: Worker, cached: Sequence[str]) -> None:
        self.worker = worker
        self.free_s = worker.queue_s  # when its next prefill can begin
        self.cached = CachedPrompts(cached)
        self.handed_over = CachedPrompts()  # by requests of this plan: there for those that need their results
        self.num_streams = max(worker.num_running, 1)  # that decode there now, or soon

    def num_uncached(self, prompt: Prompt, fleet: Fleet, *, later: bool = False) -> int:
        """`later`: the request is sent after others of this plan."""
        num_cached = self.cached.longest(prompt).num_chars
        if later:
            num_cached = max(num_cached, self.handed_over.longest(prompt).num_chars)
        return fleet.num_tokens(prompt.num_chars - num_cached)

    def prefill_s(self, num_tokens: int) -> float:
        return num_tokens / self.worker.prefill_tokens_per_s


class _Planner:
    def __init__(self, graph: Graph, fleet: Fleet, running: Running) -> None:
        self._graph, self._fleet, self._running = graph, fleet, running
        self._workers = [_Worker(worker, running.cached.get(worker.name, ())) for worker in fleet.workers]
        self._answered_s: dict[int, float] = {}  # when the result of each placed request is there
        self._warm_s: dict[str, float] = {}  # when each prefix that is computed ahead is there

    def plan(self) -> Plan:
        fleet = self._fleet
        known = depth_first((each.operation_id, each.prompt.known) for each in self._graph.requests())
        least_chars = round(_LEAST_PAGES * fleet.page_size * fleet.chars_per_token)
        nodes = shared_prefixes(known, least_chars=least_chars)
        operations = self._graph.by_id()
        warm = self._warm_shared(nodes, operations)
        gates = _gates(warm)
        warm += self._warm_during_tools()
        node_of = _innermost(nodes)
        placements = []
        for operation_id, _ in _in_possible_order(known, operations):
            operation = operations[operation_id]
            assert isinstance(operation, Generate | Score)
            node = node_of.get(operation_id)
            session = "" if node is None else _session(_outermost(nodes, node).prompt)
            if not operation.prompt.is_known:  # after the requests that give its results: their prompts are cached then
                warm += self._warm_ahead(operation.prompt.known, "the next turn, while it waits for other results")
            placements.append(self._place(operation, session=session, gate=gates.get(operation_id)))
        return Plan(
            placements=tuple(placements),
            warm=tuple(warm),
            pin=tuple(self._pins(nodes, placements)),
            width=self._width(placements),
            notes=tuple(self._notes()),
        )

    def _warm_shared(self, nodes: Sequence[SharedPrefix], operations: dict[int, Operation]) -> list[Warm]:
        """Decide which shared prefixes are computed first, outer ones before inner ones."""
        if Native.PREFILL not in self._fleet.native:
            return []
        found: list[Warm] = []
        warmed: dict[int, str] = {}  # node -> its outline
        for index, node in enumerate(nodes):
            above = None if node.parent is None else warmed.get(node.parent)
            warmed_above = above
            waiting = [one for one in node.users if not operations[one].needs]
            worker = self._warm_worker(node.prompt)
            if worker is None or len(waiting) < 2 or node.prompt.outline in self._running.warmed:
                warmed |= {} if warmed_above is None else {index: warmed_above}
                continue
            num_tokens = worker.num_uncached(node.prompt, self._fleet)
            saved_s = (len(waiting) - 1) * worker.prefill_s(num_tokens) / len(self._prefill_workers())
            if num_tokens < _LEAST_PAGES * self._fleet.page_size or saved_s < _ROUND_TRIP_S:
                warmed |= {} if warmed_above is None else {index: warmed_above}
                continue
            found.append(
                Warm(
                    prompt=node.prompt,
                    worker=worker.worker.name,
                    num_tokens=num_tokens,
                    users=node.users,
                    after_warm=above,
                    duration_ms=1000 * worker.prefill_s(num_tokens),
                    reason=f"{len(node.users)} requests share it",
                )
            )
            worker.free_s += worker.prefill_s(num_tokens)
            worker.cached.add(node.prompt)
            self._warm_s[node.prompt.outline] = worker.free_s
            warmed[index] = node.prompt.outline
        return found

    def _warm_during_tools(self) -> list[Warm]:
        """The known part of the turn after a tool is computed while the tool runs, if prefill would be idle."""
        if self._running.num_in_flight >= len(self._prefill_workers()):
            return []
        tools = [each for each in self._graph.operations if isinstance(each, Tool)]
        return [
            warm
            for each in tools
            for warm in self._warm_ahead(each.prompt.known, f"the next turn, while {each.name} runs")
        ]

    def _warm_ahead(self, prompt: Prompt, reason: str) -> list[Warm]:
        """Return the computation of a prompt that no request waits for yet, if it is worth a request of its own.

        Servers do it after all other work."""
        fleet = self._fleet
        worker = self._warm_worker(prompt)
        if Native.PREFILL not in fleet.native or worker is None or prompt.outline in self._running.warmed:
            return []
        num_tokens = worker.num_uncached(prompt, fleet)
        if num_tokens < _LEAST_PAGES * fleet.page_size:
            return []
        worker.cached.add(prompt)
        return [
            Warm(
                prompt=prompt,
                worker=worker.worker.name,
                num_tokens=num_tokens,
                users=(),
                after_warm=None,
                duration_ms=1000 * worker.prefill_s(num_tokens),
                reason=reason,
            )
        ]

    def _prefill_workers(self) -> list[_Worker]:
        return [each for each in self._workers if each.worker.prefills] or self._workers

    def _warm_worker(self, prompt: Prompt) -> _Worker | None:
        return min(
            self._prefill_workers(),
            key=lambda one: one.free_s + one.prefill_s(one.num_uncached(prompt, self._fleet)),
            default=None,
        )

    def _place(self, operation: Request, *, session: str, gate: str | None) -> Placement:
        """Choose the workers by the time until the answer is done, and add the work to theirs."""
        ready_s = max((self._answered_s.get(needed, 0.0) for needed in operation.needs), default=0.0)
        if gate is not None:  # the request waits for its prefix, wherever it runs
            ready_s = max(ready_s, self._warm_s[gate])
        later = bool(operation.needs)
        num_output = (
            0 if isinstance(operation, Score) else max(1, round(operation.max_tokens * self._fleet.answer_fraction))
        )
        added = sum(map(len, operation.choices)) if isinstance(operation, Score) else 0
        ways = self._ways(operation)
        if not ways:
            return Placement(operation_id=operation.operation_id, work=Work.CLIENT, reason="no worker is known")

        def cost_s(way: tuple[_Worker, _Worker | None]) -> float:
            first, second = way
            num_uncached = first.num_uncached(operation.prompt, self._fleet, later=later)
            prefill_s = first.prefill_s(num_uncached)
            if second is not None:
                after_s = second.worker.handoff_s
            else:  # the streams that decode there wait meanwhile
                after_s = prefill_s * first.num_streams if first.worker.role is Role.DECODE else 0.0
            loaded = (second or first).worker.num_running / max((second or first).worker.max_running, 1)
            return max(first.free_s, ready_s) + prefill_s + after_s + _LOAD_S * loaded

        first, second = min(ways, key=cost_s)
        num_uncached = first.num_uncached(operation.prompt, self._fleet, later=later) + self._fleet.num_tokens(added)
        num_prompt = self._fleet.num_tokens(operation.prompt.num_chars + added)
        start_s = max(first.free_s, ready_s)
        prefill_s = first.prefill_s(num_uncached)
        decoder = (second or first).worker
        decode_s = num_output / decoder.decode_tokens_per_s + (0.0 if second is None else decoder.handoff_s)
        first.free_s = start_s + prefill_s
        first.cached.add(operation.prompt)
        (second or first).num_streams += 0 if isinstance(operation, Score) else 1
        if second is not None:
            second.handed_over.add(operation.prompt)
        self._answered_s[operation.operation_id] = start_s + prefill_s + decode_s
        return Placement(
            operation_id=operation.operation_id,
            work=self._work(operation, second),
            prefill_worker=first.worker.name,
            decode_worker=None if isinstance(operation, Score) else decoder.name,
            num_cached_tokens=max(num_prompt - num_uncached, 0),
            num_computed_tokens=num_uncached,
            num_output_tokens=num_output,
            start_ms=1000 * start_s,
            duration_ms=1000 * (prefill_s + decode_s),
            reason=self._reason(operation, first, second, num_uncached),
            session=session,
            after_warm=gate,
        )

    def _ways(self, operation: Request) -> list[tuple[_Worker, _Worker | None]]:
        """Return (worker of the prompt, worker of the answer where it is another one)."""
        if isinstance(operation, Score):
            return [(each, None) for each in self._prefill_workers()]
        together: list[tuple[_Worker, _Worker | None]] = [
            (each, None) for each in self._workers if each.worker.role in (Role.UNIFIED, Role.DECODE)
        ]
        apart = [(one, other) for one in self._workers for other in self._workers if _is_pair(one.worker, other.worker)]
        return together + apart

    @staticmethod
    def _work(operation: Request, second: _Worker | None) -> Work:
        if isinstance(operation, Score):
            return Work.PREFILL
        return Work.DECODE if second is None else Work.SPLIT

    @staticmethod
    def _reason(operation: Request, first: _Worker, second: _Worker | None, num_uncached: int) -> str:
        if isinstance(operation, Score):
            return f"all {len(operation.choices)} choices in one step; nothing is generated"
        if second is not None:
            return f"{num_uncached} new tokens: prefill apart, then a handoff, is faster"
        if first.worker.role is Role.UNIFIED:
            return "prompt and answer on one worker"
        return f"{num_uncached} new tokens: decode computes them itself, without a handoff"

    def _pins(self, nodes: Sequence[SharedPrefix], placements: Sequence[Placement]) -> list[Pin]:
        fleet, running = self._fleet, self._running
        if Native.LEASE not in fleet.native:
            return []
        room = fleet.num_lease_tokens - running.num_pinned_tokens
        workers = {each.operation_id: each.prefill_worker for each in placements}
        found: list[Pin] = []
        for node in sorted(nodes, key=lambda one: (len(one.users) - 1) * one.num_own_chars, reverse=True):
            num_tokens = fleet.num_tokens(node.num_chars)
            for worker in dict.fromkeys(workers.get(user) for user in node.users):
                users = tuple(user for user in node.users if workers.get(user) == worker)
                if node.prompt.outline in running.pinned or num_tokens > room or len(users) < 2:
                    continue
                room -= num_tokens
                found.append(Pin(prompt=node.prompt, worker=worker, num_tokens=num_tokens, until=users))
        return found

    def _width(self, placements: Sequence[Placement]) -> int:
        """Return how many requests fit: into the client's width, and with their own tokens into the page pools."""
        if not placements:
            return self._running.width
        room = sum(each.worker.num_cache_tokens for each in self._workers if each.worker.decodes)
        largest = max(each.num_computed_tokens + each.num_output_tokens for each in placements)
        fitting = room // max(largest, 1) if room else 1
        return max(1, min(self._running.width, fitting))

    def _notes(self) -> list[str]:
        native, requests = self._fleet.native, list(self._graph.requests())
        found = []
        if Native.SCORE not in native and any(isinstance(each, Score) for each in requests):
            found.append(
                "the server has no /v1/continuations/score: each choice of a select is a request for prompt logprobs"
            )
        if Native.PREFILL not in native:
            found.append("the server has no prefill without generation: nothing is computed ahead")
        if Native.LEASE not in native:
            found.append("the server has no leases: shared prefixes may be evicted between their uses")
        return found


def _is_pair(first: Worker, second: Worker) -> bool:
    return first.role is Role.PREFILL and second.role is Role.DECODE


def _gates(warm: Sequence[Warm]) -> dict[int, str]:
    """Return for each request the innermost prefix that is computed before it."""
    return {user: each.prompt.outline for each in warm for user in each.users}  # inner ones come later


def _innermost(nodes: Sequence[SharedPrefix]) -> dict[int, int]:
    return {user: index for index, node in enumerate(nodes) for user in node.users}


def _outermost(nodes: Sequence[SharedPrefix], index: int) -> SharedPrefix:
    node = nodes[index]
    while node.parent is not None:
        node = nodes[node.parent]
    return node


def _session(prompt: Prompt) -> str:
    """Return a name for the requests that share a prefix. The name does not show the text."""
    return blake2b(prompt.outline.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _in_possible_order(
    known: Sequence[tuple[int, Prompt]], operations: dict[int, Operation]
) -> list[tuple[int, Prompt]]:
    """Return the requests depth first, each after the requests whose results it needs."""
    requests = {operation_id for operation_id, _ in known}
    prompts = dict(known)
    placed: dict[int, None] = {}

    def place(operation_id: int) -> None:
        waiting = [operation_id]
        while waiting:
            needs = [each for each in operations[waiting[-1]].needs if each in requests and each not in placed]
            if needs:
                waiting += needs
            else:
                placed[waiting.pop()] = None

    for operation_id, _ in known:
        place(operation_id)
    return [(operation_id, prompts[operation_id]) for operation_id in placed]
