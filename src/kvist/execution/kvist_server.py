"""A Kvist server as a backend: with scores in one step, prefill without generation, leases, sessions and its fleet.

A server that turns out not to be Kvist gets plain requests of OpenAI's API.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from kvist.errors import Overloaded, RequestError
from kvist.execution.argument_names import named
from kvist.execution.backend import Hints, Leased, Scored, ScoreRequest, prefix_fields, prompt_fields, total
from kvist.execution.choices import ScoredChoice
from kvist.execution.fleet_report import fleet_of
from kvist.execution.openai_server import NEUTRAL, OpenAIServer
from kvist.execution.results import Served
from kvist.planning.fleet import Fleet, Native
from kvist.planning.prompt import Prompt

_SCORE, _PREFILL, _LEASES, _INFO = "/v1/continuations/score", "/v1/prefill", "/v1/leases", "/server_info"


class KvistServer(OpenAIServer):
    """Mutable (its connections, and what the server can do); used in one event loop."""

    _native: frozenset[Native] = frozenset()

    async def fleet(self) -> Fleet:
        try:
            info = await self._get(_INFO)
        except RequestError:  # the 404 of a server of another kind
            info = None
        found = fleet_of(info)
        self._native = frozenset() if found is None else found.native
        return found or await super().fleet()

    def hint_fields(self, hints: Hints) -> dict[str, object]:
        if not self._native:
            return {}
        place = _place(hints)
        found: dict[str, object] = {"kvist": {"report": True, **place}}
        return found | ({"session_id": hints.session} if hints.session else {})

    async def score(self, request: ScoreRequest) -> Scored:
        if Native.SCORE not in self._native:
            return await super().score(request)
        prompts = [request.prompt, *([NEUTRAL] if request.unconditional else [])]
        answers = await asyncio.gather(*(self._continuations(each, request) for each in prompts))
        logprobs = [[_logprobs(result) for result in answer["results"]] for answer in answers]
        choices = tuple(
            ScoredChoice(
                token_ids=tuple(result["token_ids"]),
                logprobs=logprobs[0][index],
                unconditional=logprobs[1][index] if request.unconditional else (),
            )
            for index, result in enumerate(answers[0]["results"])
        )
        return Scored(choices=choices, served=total([_served(answer) for answer in answers]))

    async def _continuations(self, prompt: Prompt, request: ScoreRequest) -> Any:
        body = _with_hints(prompt_fields(prompt), request.hints)
        with named({"continuations": "choices"}):
            return await self._post(_SCORE, body | {"continuations": list(request.choices)})

    async def prefill(self, prompt: Prompt, hints: Hints) -> Served:
        body = _with_hints(prefix_fields(prompt), hints)
        if not hints.in_background:
            body["priority"] = 0
        return _served(await self._post(_PREFILL, body))

    async def lease(self, prompt: Prompt, lease_id: str | None, ttl_s: float, hints: Hints) -> Leased | None:
        if ttl_s == 0:
            with contextlib.suppress(RequestError):  # 404: the lease has ended
                await self._delete(f"{_LEASES}/{lease_id}")
            return None
        if lease_id is not None:
            with contextlib.suppress(RequestError):  # 404: the lease has ended, or its worker is gone: take a new one
                return Leased(lease_id=(await self._post(f"{_LEASES}/{lease_id}/renew", {"ttl_s": ttl_s}))["id"])
        try:
            taken = await self._post(_LEASES, _with_hints(prefix_fields(prompt), hints) | {"ttl_s": ttl_s})
        except (Overloaded, RequestError):  # no room; less than a page, or more pages than one key may lease
            return None
        return Leased(lease_id=taken["id"], served=_served(taken))


def _with_hints(body: dict[str, object], hints: Hints) -> dict[str, object]:
    if hints.session:
        body["session_id"] = hints.session
    if place := _place(hints):
        body["kvist"] = place
    return body


def _place(hints: Hints) -> dict[str, object]:
    found = {"worker": hints.worker, "role": None if hints.role is None else hints.role.value}
    return {name: value for name, value in found.items() if value is not None}


def _logprobs(result: Any) -> tuple[float, ...]:
    return tuple(float("-inf") if each is None else each for each in result["logprobs"])  # null: an impossible token


def _served(answer: Any) -> Served:
    cached = answer.get("cached_tokens") or {}
    num_cached = sum(cached.values())
    return Served(
        num_prompt_tokens=num_cached + answer.get("computed_tokens", 0),
        num_cached_tokens=num_cached,
        prefill_worker=answer.get("worker"),
    )
