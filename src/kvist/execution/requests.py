"""Sends one request, again if the server could not serve it, within a bounded time.

A request has its seed, so a second attempt gives the same tokens: pieces that were passed on already are skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from kvist.errors import KvistError, Overloaded, ProgramError, ProgramTimeout
from kvist.execution.backend import Backend, GenerateRequest, Hints, Scored, ScoreRequest, total
from kvist.execution.choices import decide
from kvist.execution.job import ExecutionConfig, Job
from kvist.execution.results import Answer
from kvist.planning.graph import Generate

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 5.0
_DRAW_BITS = 53


@dataclass(frozen=True, slots=True)
class Carried:
    answer: Answer
    num_attempts: int


class Carrier:
    """Mutable (it counts refusals); owned by one executor, in its loop."""

    def __init__(self, backend: Backend, config: ExecutionConfig) -> None:
        self._backend, self._config = backend, config
        self.num_refusals = 0  # answers that the server is overloaded

    async def carry(self, job: Job, hints: Hints) -> Carried:
        """Return the answer. Raises `ProgramError` that names the program's line."""
        position, timeout_s = job.operation.position, self._config.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._attempts(job, hints)
        except TimeoutError:
            problem = f"{position}: no answer within {timeout_s:g} s: give the run a longer timeout_s"
            raise ProgramTimeout(problem) from None
        except ProgramError:
            raise
        except KvistError as error:
            message = f"{position}: {error.message}"
            if error.param in job.defaults:
                message += f" (`{error.param}` is not given here, but to the run, or has its default)"
            raise ProgramError(message, param=error.param, retry_after_s=error.retry_after_s) from error

    async def _attempts(self, job: Job, hints: Hints) -> Carried:
        delay_s = _FIRST_DELAY_S
        push = _Once(job.result.push) if job.streams else None
        num_attempts = num_failures = 0
        while True:
            num_attempts += 1
            try:
                if push is not None:
                    push.restart()
                return Carried(await self._send(job, hints, push), num_attempts)
            except Overloaded as error:  # the server asks for patience; the caller's timeout bounds it
                self.num_refusals += 1
                await asyncio.sleep(error.retry_after_s or delay_s)
            except KvistError as error:
                num_failures += 1
                if not error.retryable or num_failures >= self._config.max_attempts:
                    raise
                await asyncio.sleep(error.retry_after_s or delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    async def _send(self, job: Job, hints: Hints, push: Callable[[str], None] | None) -> Answer:
        operation = job.operation
        if isinstance(operation, Generate):
            request = GenerateRequest(
                prompt=operation.prompt,
                sampling=job.sampling,
                form=job.form,
                form_source=job.form_source,
                form_argument=job.form_argument,
                hints=hints,
            )
            return await self._backend.generate(request, push)
        unconditional = operation.scores_without_prompt
        groups = [operation.choices] if self._config.planned else [(choice,) for choice in operation.choices]
        scored: list[Scored] = []
        for choices in groups:
            asked = ScoreRequest(prompt=operation.prompt, choices=choices, unconditional=unconditional, hints=hints)
            scored.append(await self._backend.score(asked))
        return _choice(job, scored)


def _choice(job: Job, scored: list[Scored]) -> Answer:
    operation = job.operation
    assert not isinstance(operation, Generate)
    choices = [one for group in scored for one in group.choices]
    draw = _draw(job.sampling.seed or 0, operation.prompt.outline)
    decision = decide(choices, job.method, temperature=job.sampling.temperature, draw=draw)
    meta: dict[str, object] = {
        "scores": dict(zip(operation.choices, decision.scores, strict=True)),
        "input_token_logprobs": [list(one.logprobs) for one in choices],
        "finish_reason": "select",
    }
    return Answer(
        texts=(operation.choices[decision.index],), served=total([group.served for group in scored]), meta=meta
    )


def _draw(seed: int, outline: str) -> float:
    """Return a number in [0, 1): a function of the seed and the prompt."""
    text = f"{seed}:{outline}".encode("utf-8", "surrogatepass")
    bits = int.from_bytes(blake2b(text, digest_size=8, person=b"kvist select").digest()) >> (64 - _DRAW_BITS)
    return bits / (1 << _DRAW_BITS)


class _Once:
    """Passes pieces on; after `restart`, only what is beyond those that were passed on before."""

    def __init__(self, push: Callable[[str], None]) -> None:
        self._push = push
        self._num_passed = 0
        self._num_received = 0

    def restart(self) -> None:
        self._num_received = 0

    def __call__(self, piece: str) -> None:
        num_known = max(self._num_passed - self._num_received, 0)
        self._num_received += len(piece)
        if len(piece) > num_known:
            self._push(piece[num_known:])
            self._num_passed = self._num_received
