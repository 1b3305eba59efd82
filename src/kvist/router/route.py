"""Which workers serve a request: the policies applied to what the registry knows. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvist.errors import KvistError, Overloaded, Unavailable
from kvist.kv.keys import page_digests
from kvist.request import EngineRequest, Mode
from kvist.router.config import RouterConfig
from kvist.router.policies import Policy, Prompt, decode_policy, num_hit_tokens, prompt_policy
from kvist.router.registry import Registry, Worker, WorkerState, WorkerUse

_START = {
    WorkerUse.PREFILL: "start one with `kvist serve --role prefill`",
    WorkerUse.DECODE: "start one with `kvist serve --decode-only`",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    mode: Mode  # FULL, or PREFILL for a pair
    prefill: Worker
    decode: Worker  # the same worker with FULL
    num_prompt_tokens_left: int  # to compute at `prefill`, by what we know of its cache


class Router:
    def __init__(self, config: RouterConfig, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self._prompt_policy = prompt_policy(config)
        self._decode_policy = decode_policy(config)

    def can_serve(self) -> bool:
        """A request of any length of answer has somewhere to go (which may be full now)."""
        ready = self._registry.ready
        return bool(ready(WorkerUse.UNIFIED)) or bool(ready(WorkerUse.PREFILL) and ready(WorkerUse.DECODE))

    def choose(self, request: EngineRequest, excluded: frozenset[Worker] = frozenset()) -> Route:
        """Raises `Unavailable` naming the missing role, or `Overloaded` when all that could take it are full."""
        unified, prefill, decode = (
            [w for w in self._registry.ready(use) if w not in excluded]
            for use in (WorkerUse.UNIFIED, WorkerUse.PREFILL, WorkerUse.DECODE)
        )
        # One token needs no handoff: a prefill worker answers it alone.
        single = request.sampling.max_tokens == 1 and not request.output_token_ids
        open_decode = [w for w in decode if not w.is_full]
        first = [w for w in unified if not w.is_full]
        if open_decode or single:
            first += [w for w in prefill if not w.is_full]
        if not first:
            raise self._refusal(unified, prefill, decode, single)
        prompt = self._prompt(request, first + open_decode)
        chosen = _pick(self._prompt_policy, prompt, first)
        left = max(1, prompt.num_tokens - num_hit_tokens(prompt, chosen.view()))
        if single or chosen.use is WorkerUse.UNIFIED:
            return Route(mode=Mode.FULL, prefill=chosen, decode=chosen, num_prompt_tokens_left=left)
        partner = _pick(self._decode_policy, prompt, open_decode)
        return Route(mode=Mode.PREFILL, prefill=chosen, decode=partner, num_prompt_tokens_left=left)

    def _prompt(self, request: EngineRequest, workers: Sequence[Worker]) -> Prompt:
        digests: dict[str, list[bytes]] = {}
        for worker in workers:
            spec = worker.spec
            if spec is not None and worker.known_pages and spec.namespace not in digests:
                digests[spec.namespace] = page_digests(
                    request.prompt_token_ids, spec.page_size, spec.namespace, request.cache_salt
                )
        return Prompt(num_tokens=request.num_prompt_tokens, digests=digests)

    def _refusal(self, unified: list[Worker], prefill: list[Worker], decode: list[Worker], single: bool) -> KvistError:
        retry_after_s = self._config.retry_after_s
        if unified or (prefill and (decode or single)):
            return Overloaded(
                "every worker that could take the request has its queue full: retry later, or add workers",
                retry_after_s=retry_after_s,
            )
        if prefill or decode:
            missing = WorkerUse.DECODE if prefill else WorkerUse.PREFILL
            problem = f"no {missing.value} worker is ready: {_START[missing]}"
        else:
            problem = "no worker is ready: start one with `kvist serve`, or a prefill and a decode worker"
        known = [
            f"{worker.url} is {worker.state.value} ({worker.problem})"
            for worker in self._registry.workers
            if worker.state is not WorkerState.READY
        ]
        return Unavailable("; ".join([problem, *known[:4]]), retry_after_s=retry_after_s)


def _pick(policy: Policy, prompt: Prompt, workers: Sequence[Worker]) -> Worker:
    worker_id = policy.choose(prompt, [worker.view() for worker in workers])
    return next(worker for worker in workers if worker.worker_id == worker_id)
