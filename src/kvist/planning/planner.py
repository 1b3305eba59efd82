"""The planner: graph + fleet + what is out -> plan. Pure.

| decision | rule |
|---|---|
| order | depth first over the prefix tree of all prompts: a prefix is used up before the next one needs its room |
| work | a Score is prefill work; a Generate is decoded where its prompt is computed, unless prefill apart is faster |
| worker | where the request is expected to be done first, by its cached prefix and the work that is placed there |
| affinity | tokens that another worker has cached cost four times their time: branches stay with their parent |
| warm | a prefix that several requests wait for, where that costs less than computing it with each of them |
| ahead | the known part of a turn that waits for a tool, or for results of other requests |
| pin | a prefix that may be unused until a later use, until its last use was sent, within the room for leases |
| width | as many requests as the client may have out, and as fit into the page pools |

Predictions use the measured length of answers. The executor compares them with what happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from kvist.planning.fleet import Fleet, Native, Role, Running, Worker
from kvist.planning.graph import Generate, Graph, Operation, Request, Score, Tool
from kvist.planning.plan import Pin, Placement, Plan, Warm, Work
from kvist.planning.prefixes import CachedPrompts, SharedPrefix, common_beginning, depth_first, shared_prefixes
from kvist.planning.prompt import Prompt
from kvist.wording import amount

_LEAST_PAGES = 2  # shorter prefixes are not worth a request of their own
_ROUND_TRIP_S = 0.005  # of a request that computes nothing
_LOAD_S = 0.01  # weight of the load where times are about equal
# Time that a token takes from other requests, in its own time, where it is computed although another worker has it: as
# in the policy of the router (kvist.router.policies.cost).
_OTHERS = 3.0
# A server computes a prefix of this many tokens once, also for requests that arrive at the same time: the others wait
# there (kvist.scheduler.shared_prefix). Of shorter ones it does so only if the first request is alone in its step.
_SHARED_TOKENS = 1024


def plan(graph: Graph, fleet: Fleet, running: Running) -> Plan:
    """Return the plan of the graph's operations. The graph holds those that are not done: requests whose prompts are
    known, and later ones whose prompts have holes."""
    return _Planner(graph, fleet, running).plan()


class _Worker:
    """A worker during one plan: its work is queued, its cache grows. Mutable; owned by the planner."""

    def __init__(self, worker: Worker, cached: Sequence[str], shared: Prompt) -> None:
        """All prompts of the plan begin with `shared`."""
        self.worker = worker
        self.free_s = worker.queue_s  # when its next prefill can begin
        self.cached = CachedPrompts(cached, shared=shared)
        self.handed_over = CachedPrompts(shared=shared)  # by requests of this plan: for those that need their results
        self.num_streams = max(worker.num_running, 1)  # that decode there now, or soon

    def num_uncached(self, prompt: Prompt, fleet: Fleet, *, later: bool = False) -> int:
        """`later`: the request is sent after others of this plan."""
        cached = self.cached.longest(prompt)
        if later:
            cached = max(cached, self.handed_over.longest(prompt), key=lambda one: len(one.outline))
        return fleet.num_tokens(prompt.num_chars_after(cached))

    def prefill_s(self, num_tokens: int) -> float:
        return num_tokens / self.worker.prefill_tokens_per_s


class _Planner:
    def __init__(self, graph: Graph, fleet: Fleet, running: Running) -> None:
        self._graph, self._fleet, self._running = graph, fleet, running
        prompts = (each.prompt.known for each in graph.operations if isinstance(each, Generate | Score | Tool))
        self._shared = common_beginning(prompts)
        self._num_shared_chars = self._shared.num_chars
        self._workers = [_Worker(one, running.cached.get(one.name, ()), self._shared) for one in fleet.workers]
        self._ids = frozenset(each.operation_id for each in graph.operations)
        self._answered_s: dict[int, float] = {}  # when the result of each placed request is there
        self._warm_s: dict[str, float] = {}  # when each prefix that is computed ahead is there

    def plan(self) -> Plan:
        fleet = self._fleet
        num_shared = len(self._shared.outline)
        prompts = ((each.operation_id, each.prompt.known) for each in self._graph.requests())
        known = depth_first(prompts, known=num_shared)
        least_chars = round(_LEAST_PAGES * fleet.page_size * fleet.chars_per_token)
        nodes = shared_prefixes(known, least_chars=least_chars, known=num_shared)
        operations = self._graph.by_id()
        warm = self._warm_shared(nodes, operations)
        gates = _gates(warm)
        warm += self._warm_during_tools()
        sessions = _sessions(nodes)
        placements = []
        for operation_id, _ in _in_possible_order(known, operations):
            operation = operations[operation_id]
            assert isinstance(operation, Generate | Score)
            if not operation.prompt.is_known:  # after the requests that give its results: their prompts are cached then
                warm += self._warm_ahead(operation.prompt.known, "the next turn, while it waits for other results")
            session, gate = sessions.get(operation_id, ""), gates.get(operation_id)
            placements.append(self._place(operation, session=session, gate=gate))
        return Plan(
            placements=tuple(placements),
            warm=tuple(warm),
            pin=tuple(self._pins(nodes, placements, frozenset(each.prompt.outline for each in warm))),
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
            waiting = [one for one in node.users if not operations[one].needs]
            worker = self._warm_worker(node.prompt)
            if worker is None or len(waiting) < 2 or node.prompt.outline in self._running.warmed:
                warmed |= {} if above is None else {index: above}
                continue
            num_tokens = worker.num_uncached(node.prompt, self._fleet)
            saved_s = (len(waiting) - 1) * worker.prefill_s(num_tokens) / len(self._prefill_workers())
            if num_tokens < _LEAST_PAGES * self._fleet.page_size or saved_s < _ROUND_TRIP_S:
                warmed |= {} if above is None else {index: above}
                continue
            is_first = not worker.free_s and not self._running.num_in_flight  # alone in its step
            is_awaited = num_tokens < _SHARED_TOKENS and not is_first
            found.append(
                Warm(
                    prompt=node.prompt,
                    worker=worker.worker.name,
                    num_tokens=num_tokens,
                    users=node.users,
                    after_warm=above,
                    duration_ms=1000 * worker.prefill_s(num_tokens),
                    reason=f"{len(node.users)} requests share it",
                    is_awaited=is_awaited,
                )
            )
            worker.free_s += worker.prefill_s(num_tokens)
            worker.cached.add(node.prompt)
            self._warm_s[node.prompt.outline] = worker.free_s
            warmed |= {index: node.prompt.outline} if is_awaited else {}
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
        fewest = min(each.num_uncached(prompt, fleet, later=True) for each in self._workers)
        if fewest < _LEAST_PAGES * fleet.page_size:  # the turn goes to the worker that has nearly all of it
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
            key=lambda one: one.free_s + (1 + _OTHERS) * one.prefill_s(one.num_uncached(prompt, self._fleet)),
            default=None,
        )

    def _place(self, operation: Request, *, session: str, gate: str | None) -> Placement:
        """Choose the workers by the time until the answer is done, and add the work to theirs."""
        ready_s = max((self._answered_s.get(needed, 0.0) for needed in operation.needs), default=0.0)
        if gate is not None:
            ready_s = max(ready_s, self._warm_s[gate])
        later = bool(operation.needs)
        num_output = (
            0 if isinstance(operation, Score) else max(1, round(operation.max_tokens * self._fleet.answer_fraction))
        )
        added = sum(map(len, operation.choices)) if isinstance(operation, Score) else 0
        ways = self._ways(operation)
        if not ways:
            return Placement(operation_id=operation.operation_id, work=Work.CLIENT, reason="no worker is known")

        firsts = {first.worker.name: first for first, _ in ways}
        uncached = {
            name: first.num_uncached(operation.prompt, self._fleet, later=later) for name, first in firsts.items()
        }
        fewest = min(uncached.values())

        def cost_s(way: tuple[_Worker, _Worker | None]) -> float:
            first, second = way
            num_uncached = uncached[first.worker.name]
            prefill_s = first.prefill_s(num_uncached)
            if second is not None:
                after_s = second.worker.handoff_s
            else:  # the streams that decode there wait meanwhile
                after_s = prefill_s * first.num_streams if first.worker.role is Role.DECODE else 0.0
            loaded = (second or first).worker.num_running / max((second or first).worker.max_running, 1)
            again_s = _OTHERS * first.prefill_s(num_uncached - fewest)  # another worker has these tokens
            return max(first.free_s, ready_s) + prefill_s + again_s + after_s + _LOAD_S * loaded

        first, second = min(ways, key=cost_s)
        num_uncached = uncached[first.worker.name] + self._fleet.num_tokens(added)
        num_chars = self._num_shared_chars + operation.prompt.num_chars_after(self._shared)
        num_prompt = self._fleet.num_tokens(num_chars + added)
        start_s = max(first.free_s, ready_s)
        prefill_s = first.prefill_s(num_uncached)
        decoder = (second or first).worker
        decode_s = num_output / decoder.decode_tokens_per_s + (0.0 if second is None else decoder.handoff_s)
        first.free_s += prefill_s  # other work is done while a request waits for results
        first.cached.add(operation.prompt)
        (second or first).num_streams += 0 if isinstance(operation, Score) else 1
        if second is not None:
            second.handed_over.add(operation.prompt)
        self._answered_s[operation.operation_id] = start_s + prefill_s + decode_s
        return Placement(
            operation_id=operation.operation_id,
            work=_work(operation, first, second),
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
            (each, None)
            for each in self._workers
            if each.worker.decodes or operation.max_tokens <= each.worker.max_answer_tokens
        ]
        apart = [(one, other) for one in self._workers for other in self._workers if _is_pair(one.worker, other.worker)]
        return together + apart

    @staticmethod
    def _reason(operation: Request, first: _Worker, second: _Worker | None, num_uncached: int) -> str:
        if isinstance(operation, Score):
            return f"all {len(operation.choices)} choices in one step; nothing is generated"
        new = amount(num_uncached, "new token")
        if second is not None:
            return f"{new}: prefill apart, then a handoff, is faster"
        if first.worker.role is Role.UNIFIED:
            return "prompt and answer on one worker"
        if first.worker.role is Role.PREFILL:
            return f"{new} and a short answer: prefill may write it itself, without a handoff"
        return f"{new}: decode computes them itself, without a handoff"

    def _pins(
        self, nodes: Sequence[SharedPrefix], placements: Sequence[Placement], warmed: frozenset[str]
    ) -> list[Pin]:
        """Keep the prefixes that are computed ahead, and those that no request may need for a while. Requests that are
        out hold their pages themselves: so do uses that are sent at once, and uses that follow one another."""
        fleet, running = self._fleet, self._running
        operations = self._graph.by_id()
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
                is_always_used = len(users) <= running.width and all(
                    self._follows_at_once(operations[user], users) for user in users
                )
                if is_always_used and node.prompt.outline not in warmed:
                    continue
                room -= num_tokens
                found.append(Pin(prompt=node.prompt, worker=worker, num_tokens=num_tokens, until=users))
        return found

    def _follows_at_once(self, operation: Operation, users: Sequence[int]) -> bool:
        """Return whether a request can be sent as soon as some of `users`, and requests of earlier plans, are done."""
        return self._ids.intersection(operation.needs) <= set(users)

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


def _work(operation: Request, first: _Worker, second: _Worker | None) -> Work:
    if second is not None:
        return Work.SPLIT
    return Work.PREFILL if isinstance(operation, Score) or not first.worker.decodes else Work.DECODE


def _gates(warm: Sequence[Warm]) -> dict[int, str]:
    """Return for each request the innermost prefix that is computed before it is sent."""
    return {user: each.prompt.outline for each in warm if each.is_awaited for user in each.users}  # inner come later


def _sessions(nodes: Sequence[SharedPrefix]) -> dict[int, str]:
    """Return for each request that shares a prefix the name of its outermost one."""
    outer = [(node, _session(node.prompt)) for node in nodes if node.parent is None]
    return {user: session for node, session in outer for user in node.users}


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
