"""Chooses the workers for a request by applying a policy to the registry's workers. PURE.

A request that goes on elsewhere has an answer so far (`output_token_ids`): its pages are looked for like those of the
prompt."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kvist.errors import KvistError, Overloaded, PromptTooLong, Unavailable
from kvist.fairness import CallerPath, caller_path
from kvist.fit import limit_text, num_tokens_needed
from kvist.page_index.page_runs import NOTHING_HELD, HeldPages
from kvist.page_index.prompt_digests import PromptDigests
from kvist.request import MAX_SHORT_ANSWER, EngineRequest, Mode, Role, WorkerId, fields_in_use
from kvist.router.config import NEVER, RouterConfig
from kvist.router.handoff_ways import HandoffWay
from kvist.router.pairs import Pairs
from kvist.router.placement import ANYWHERE, Placement
from kvist.router.policies import POLICIES
from kvist.router.policies.cost import num_missing_tokens
from kvist.router.policy import FleetView, Path, Prompt, Reason, WorkerView
from kvist.router.registry import Registry, Worker, WorkerState
from kvist.router.sessions import Sessions

_AWAY = frozenset({WorkerState.LOST, WorkerState.DRAINING})
_MOST_OTHERS = 6  # workers that a decision shows beside those that it chose
_START = {
    Role.PREFILL: "start one with `kvist serve --role prefill`",
    Role.DECODE: "start one with `kvist serve --decode-only`",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    mode: Mode  # FULL, or PREFILL for a pair
    prefill: Worker
    decode: Worker  # the same worker with FULL
    token_ids: tuple[int, ...]  # of the prompt and of the answer so far
    num_prompt_tokens_left: int  # of `token_ids`: still to compute at `prefill`, by the cached pages known here
    reason: Reason
    cost_ms: float | None = None  # by the policy's own measure, if it has one
    handoff: HandoffWay | None = None  # of a pair
    considered: Sequence[WorkerView] = ()  # the workers chosen, and those of the others that hold most of the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Workers that may serve a request, by role."""

    unified: Sequence[Worker]
    prefill: Sequence[Worker]
    decode: Sequence[Worker]
    alone: Sequence[Worker] = ()  # of prefill and decode: those that can serve the whole request

    @staticmethod
    def only(alone: Sequence[Worker]) -> Candidates:
        return Candidates(unified=(), prefill=(), decode=(), alone=alone)

    @staticmethod
    def of(registry: Registry, states: Container[WorkerState], excluded: frozenset[Worker]) -> Candidates:
        found = [w for w in registry.workers if w.state in states and w.spec is not None and w not in excluded]
        return Candidates(
            unified=[w for w in found if w.role is Role.UNIFIED],
            prefill=[w for w in found if w.role is Role.PREFILL],
            decode=[w for w in found if w.role is Role.DECODE],
        )

    def all(self) -> Sequence[Worker]:
        return list(dict.fromkeys((*self.unified, *self.prefill, *self.decode, *self.alone)))

    def has_route(self, *, single: bool) -> bool:
        return bool(self.unified) or bool(self.prefill and (self.decode or single))

    def keep(self, keeps: Callable[[Worker], bool]) -> Candidates:
        return Candidates(
            unified=[w for w in self.unified if keeps(w)],
            prefill=[w for w in self.prefill if keeps(w)],
            decode=[w for w in self.decode if keeps(w)],
        )

    def around(self, wanted: Worker, *, single: bool) -> Candidates:
        """Keep the routes through one worker. `single`: the request runs on one worker alone."""
        if single or wanted.role is Role.UNIFIED:
            return self.keep(lambda worker: worker is wanted)
        return self.keep(lambda worker: worker is wanted or worker.role not in (wanted.role, Role.UNIFIED))

    def of_role(self, role: Role, *, single: bool) -> Candidates:
        """Keep the workers of a role, and with PREFILL those that it hands over to."""
        with_decode = role is Role.PREFILL and not single
        return self.keep(lambda worker: worker.role is role or (with_decode and worker.role is Role.DECODE))

    def that_know(self, request: EngineRequest) -> Candidates:
        """Keep the workers that know every field of the request. An older worker would ignore a newer field."""
        return self.keep(lambda worker: worker.knows(request))

    def that_fit(self, request: EngineRequest) -> Candidates:
        """Keep the workers that can hold the request; for prefill workers, the prompt and one token."""
        whole, prompt = num_tokens_needed(request, Mode.FULL), num_tokens_needed(request, Mode.PREFILL)
        return self.keep(lambda worker: worker.holds(prompt if worker.role is Role.PREFILL else whole))

    def with_room_for(self, caller: CallerPath) -> Candidates:
        return self.keep(lambda worker: worker.has_room_for(caller))

    def paired_by(self, pairs: Pairs) -> Candidates:
        """Keep the unified workers, and those that can hand a request over to another candidate or take one over."""
        prefill, decode = pairs.with_partner(self.prefill, self.decode)
        return Candidates(unified=self.unified, prefill=prefill, decode=decode)

    def with_alone(self, alone: Sequence[Worker]) -> Candidates:
        return replace(self, alone=alone)

    def joined_by(self, others: Candidates) -> Candidates:
        return Candidates(
            unified=[*self.unified, *others.unified],
            prefill=[*self.prefill, *others.prefill],
            decode=[*self.decode, *others.decode],
        )


class _LookUp:
    """A request for which workers are looked for, and what its routing depends on."""

    __slots__ = ("num_cacheable_tokens", "request", "session_workers", "single", "token_ids")

    def __init__(self, request: EngineRequest, session_workers: frozenset[WorkerId]) -> None:
        sampling, output = request.sampling, request.output_token_ids
        self.request = request
        self.session_workers = session_workers
        self.token_ids = (*request.prompt_token_ids, *output) if output else request.prompt_token_ids
        # A request for at most one token needs no handoff: a prefill worker serves it alone.
        self.single = sampling.max_tokens <= 1 and not output
        # Tokens that are scored are computed, also where they are cached.
        scores = sampling.prompt_logprobs is not None and not output
        self.num_cacheable_tokens = max(0, sampling.prompt_logprobs_start - 1) if scores else len(self.token_ids)


class Router:
    def __init__(self, config: RouterConfig, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self._pairs = Pairs(config.routing.handoff)
        self._policy = POLICIES[config.routing.policy].make(config.routing.policy_options)
        self._digests = PromptDigests()
        self._sessions = Sessions()
        self._groups = Sessions()

    @property
    def num_remembered_chunks(self) -> int:
        """Number of prompt chunks whose digests are remembered."""
        return self._digests.num_chunks

    def can_serve(self) -> bool:
        """Return whether the ready workers can serve a request with an answer of any length. They may be full."""
        ready = Candidates.of(self._registry, {WorkerState.READY}, frozenset())
        return ready.paired_by(self._pairs).has_route(single=False) or (
            self._config.routing.aggregate != NEVER
            and (bool(ready.decode) or any(worker.writes_alone for worker in ready.prefill))
        )

    def remember(self, placement: Placement, route: Route) -> None:
        """Remember the workers of a request, for the next one of its session and of its group."""
        workers = route.prefill.worker_id, route.decode.worker_id
        self._sessions.remember(placement.session, *workers)
        self._groups.remember(placement.group, *workers)

    def choose(
        self,
        request: EngineRequest,
        excluded: frozenset[Worker] = frozenset(),
        *,
        placement: Placement = ANYWHERE,
        is_stored: bool = False,
    ) -> Route:
        """Choose the workers for a request: those of its placement, if they can serve it now.

        `is_stored`: the pages of the prompt are in a store, so one worker is enough. Raises
        `PromptTooLong` if no route can hold the request, `Unavailable` naming the missing role, the difference between
        the workers of every pair, or the lost worker that could hold the request, `Overloaded` if the queues of all
        suitable workers are full."""
        look = _LookUp(request, self._sessions.last(placement.session))
        ready = Candidates.of(self._registry, {WorkerState.READY}, excluded)
        if placement.is_bound:
            for wanted, may_be_alone in self._wanted(ready, placement, single=look.single):
                with contextlib.suppress(KvistError):
                    return self._choose(look, wanted, may_be_alone, is_stored=is_stored)
        return self._choose(look, ready, lambda _: True, is_stored=is_stored)

    def _wanted(
        self, ready: Candidates, placement: Placement, *, single: bool
    ) -> Iterator[tuple[Candidates, Callable[[Worker], bool]]]:
        """Yield the candidates that a placement asks for, the most wanted first, and which of them may serve the whole
        request."""
        last, role = self._groups.last(placement.group), placement.role
        if last:
            yield ready.keep(lambda worker: worker.worker_id in last), lambda _: True
        wanted = next((w for w in ready.all() if placement.worker in (w.url, w.worker_id)), None)
        if placement.worker and wanted is not None:
            around = ready.around(wanted, single=single)
            if role is not None:
                yield around.of_role(role, single=single), lambda worker: worker is wanted
            yield around, lambda worker: worker is wanted
        if role is not None:
            yield ready.of_role(role, single=single), lambda worker: worker.role is role

    def _choose(
        self, look: _LookUp, ready: Candidates, may_be_alone: Callable[[Worker], bool], *, is_stored: bool
    ) -> Route:
        request, single = look.request, look.single
        known = ready.that_know(request)
        alone = [worker for worker in self._alone(request, known) if may_be_alone(worker)]
        if is_stored and (writers := [each for each in alone if each.role is not Role.PREFILL]):
            return self._choose_path(look, Candidates.only(writers))
        if not ready.has_route(single=single):
            if alone:
                return self._choose_path(look, Candidates.only(alone))
            raise self._no_worker_error(ready)
        if not known.has_route(single=single):
            raise self._no_field_error(request, ready)
        able = self._able(known, single=single)
        fit = self._able(able.that_fit(request), single=single)
        if not fit.has_route(single=single):
            if alone:  # no pair has a way to hand over, or none can hold the request
                return self._choose_path(look, Candidates.only(alone))
            raise self._too_long_error(request, able) if able.has_route(single=single) else self._no_pair_error(known)
        caller = caller_path(request.client)
        free = self._able(fit.with_room_for(caller), single=single)
        if not free.has_route(single=single):
            retry_after_s = min(w.retry_after_s() for w in fit.all() if not w.has_room_for(caller))
            raise Overloaded(
                "the queues of all workers that could serve the request are full: retry later, or add workers",
                retry_after_s=retry_after_s,
            )
        return self._choose_path(look, free if single else free.with_alone(alone))

    def _able(self, candidates: Candidates, *, single: bool) -> Candidates:
        """Keep the workers that can take part in a route. `single`: the request needs no handoff, so no partner."""
        return candidates if single else candidates.paired_by(self._pairs)

    def _choose_path(self, look: _LookUp, free: Candidates) -> Route:
        salt, token_ids, single = look.request.cache_salt, look.token_ids, look.single
        workers = {worker.worker_id: worker for worker in free.all()}
        held, caller = self._held_pages(look, list(workers.values())), caller_path(look.request.client)
        views = {
            worker_id: worker.view(
                held.get(worker_id, NOTHING_HELD),
                caller,
                num_coming_tokens=worker.coming.num_common_tokens(token_ids, salt),
                served_session=worker_id in look.session_workers,
            )
            for worker_id, worker in workers.items()
        }
        prompt = Prompt(num_tokens=len(token_ids), num_cacheable_tokens=look.num_cacheable_tokens)
        pairs = free.prefill and free.decode and not single
        path = self._policy.choose(
            prompt,
            FleetView(
                alone=[views[w.worker_id] for w in (*free.unified, *(free.prefill if single else ()))],
                prefill=[views[w.worker_id] for w in free.prefill] if pairs else (),
                decode=[views[w.worker_id] for w in free.decode] if pairs else (),
                also_alone=[views[w.worker_id] for w in free.alone],
                may_pair=lambda p, d: self._pairs.may_pair(workers[p], workers[d]),
            ),
        )
        prefill, decode = (workers[worker_id] for worker_id in path.worker_ids)
        writes_long = path.reason is Reason.SHORT_ANSWER and look.request.sampling.max_tokens > MAX_SHORT_ANSWER
        return Route(
            mode=Mode.FULL if path.is_alone else Mode.PREFILL,
            prefill=prefill,
            decode=decode,
            token_ids=token_ids,
            num_prompt_tokens_left=num_missing_tokens(prompt, path.prefill),
            handoff=None if path.is_alone else self._pairs.way(prefill, decode),
            reason=Reason.NO_DECODE if writes_long else path.reason,
            cost_ms=path.cost_ms,
            considered=_considered(path, views),
        )

    def _alone(self, request: EngineRequest, candidates: Candidates) -> list[Worker]:
        """Return the workers of pairs that can serve the whole request without a handoff. A prefill worker writes long
        answers only where no other worker could."""
        if self._config.routing.aggregate == NEVER:
            return []
        whole, caller = num_tokens_needed(request, Mode.FULL), caller_path(request.client)
        able = [
            worker
            for worker in (*candidates.prefill, *candidates.decode)
            if worker.holds(whole) and worker.has_room_for(caller)
        ]
        short = [worker for worker in able if worker.admits_whole(request.sampling.max_tokens)]
        if short or candidates.decode or candidates.unified:
            return short
        return [worker for worker in able if worker.writes_alone]

    def _held_pages(self, look: _LookUp, workers: Sequence[Worker]) -> dict[WorkerId, HeldPages]:
        """Return the leading pages of the prompt and the answer so far that each worker holds."""
        held: dict[WorkerId, HeldPages] = {}
        kinds = {(w.spec.namespace, w.spec.page_size) for w in workers if w.spec is not None}
        for namespace, page_size in kinds if self._registry.index.num_entries else ():
            pieces = self._digests.pieces(look.token_ids, page_size, namespace, look.request.cache_salt)
            held.update(self._registry.index.match(pieces))
        return held

    def _no_worker_error(self, ready: Candidates) -> Unavailable:
        if ready.prefill or ready.decode:
            missing = Role.DECODE if ready.prefill else Role.PREFILL
            problem = f"no {missing.value} worker is ready: {_START[missing]}"
        else:
            problem = "no worker is ready: start one with `kvist serve`, or a prefill and a decode worker"
        known = [
            f"{worker.url} is {worker.state.value} ({worker.problem})"
            for worker in self._registry.workers
            if worker.state is not WorkerState.READY
        ]
        return Unavailable("; ".join([problem, *known[:4]]), retry_after_s=self._config.links.retry_after_s)

    def _no_field_error(self, request: EngineRequest, ready: Candidates) -> Unavailable:
        unknown = frozenset[str]().union(*(worker.unknown_fields for worker in ready.all())) & fields_in_use(request)
        return Unavailable(
            f"no ready worker knows {' and '.join(sorted(unknown))}: run the gateway's version of Kvist on the workers",
            retry_after_s=self._config.links.retry_after_s,
        )

    def _no_pair_error(self, ready: Candidates) -> Unavailable:
        problems = self._pairs.problems(ready.prefill, ready.decode)
        more = f"; and {len(problems) - 2} more differences" if len(problems) > 2 else ""
        return Unavailable(
            f"no prefill worker can hand requests over to a decode worker: {'; '.join(problems[:2])}{more}",
            retry_after_s=self._config.links.retry_after_s,
        )

    def _too_long_error(self, request: EngineRequest, ready: Candidates) -> KvistError:
        """Build the error for a request that fits no ready route; retryable if a lost or draining worker would fit."""
        single = request.sampling.max_tokens <= 1 and not request.output_token_ids
        away = Candidates.of(self._registry, _AWAY, frozenset())
        if ready.joined_by(away).that_fit(request).has_route(single=single):
            names = ", ".join(f"{worker.worker_id} is {worker.state.value}" for worker in away.all())
            return Unavailable(
                f"no ready worker can hold a request of this length, and {names}: retry later",
                retry_after_s=self._config.links.retry_after_s,
            )
        num_prompt, num_output = request.num_prompt_tokens, request.sampling.max_tokens
        writers = [*ready.unified, *(ready.decode if ready.prefill else ready.prefill)]
        best = max((worker.spec for worker in writers if worker.spec is not None), key=lambda spec: spec.max_model_len)
        whole = num_tokens_needed(request, Mode.FULL)
        if whole > best.max_model_len:
            limit = limit_text(best.max_model_len, best.num_pages, best.page_size)
            return PromptTooLong(
                f"the prompt has {num_prompt} tokens and the request asks for {num_output} more; the largest worker "
                f"({best.worker_id}) can hold {limit}"
            )
        readers = [worker.spec for worker in ready.prefill if worker.spec is not None]
        reader = max(readers, key=lambda spec: spec.max_model_len)
        limit = limit_text(reader.max_model_len, reader.num_pages, reader.page_size)
        return PromptTooLong(
            f"the prompt has {num_prompt} tokens; the largest prefill worker ({reader.worker_id}) can hold {limit}, "
            f"and no unified worker can hold all {whole} tokens of the request"
        )


def _considered(path: Path, views: Mapping[WorkerId, WorkerView]) -> Sequence[WorkerView]:
    """Return the workers of the path first, and then those of the others that hold most of the prompt."""
    others = [view for view in views.values() if view.worker_id not in path.worker_ids]
    chosen = (path.prefill,) if path.is_alone else (path.prefill, path.decode)
    return *chosen, *heapq.nlargest(_MOST_OTHERS, others, key=lambda view: view.num_hit_tokens)
