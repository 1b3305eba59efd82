"""A deterministic server in this process, for tests of programs without a model.

Its text is a function of (prompt, parameters, seed), one word a token; its prefix cache, workers, leases and costs are
simulated. Tests read what it computed and inject its failures. `time_scale` 0 answers at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from kvist.errors import KvistError, RequestError
from kvist.execution.backend import GenerateRequest, Hints, Leased, Scored, ScoreRequest, prefix_fields, prompt_fields
from kvist.execution.choices import ScoredChoice
from kvist.execution.results import Answer, Served
from kvist.planning.fleet import Fleet, Native, Role, Worker
from kvist.planning.prefixes import RememberedPrefixes
from kvist.planning.prompt import Prompt, common_length

ALL_NATIVE = frozenset(Native)
_WORDS = (
    *("amber", "birch", "cloud", "delta", "ember", "fjord", "grove", "haven"),
    *("inlet", "jetty", "knoll", "lagoon", "marsh", "north", "ocean", "pines"),
)
_CHARS_PER_TOKEN = 4
_PREFILL_TOKENS_PER_S, _DECODE_TOKENS_PER_S = 4000.0, 50.0
_MAX_CACHED = 4096
_MAX_ANSWER_TOKENS = 16  # that a prefill worker writes itself

FAKE_PAIR = (
    Worker(name="prefill-0", role=Role.PREFILL, max_answer_tokens=_MAX_ANSWER_TOKENS),
    Worker(name="decode-0", role=Role.DECODE),
)


@dataclass(slots=True)
class Seen:
    """The requests that the server got. Mutable; the server adds, tests read."""

    generated: list[GenerateRequest] = field(default_factory=list)
    scored: list[ScoreRequest] = field(default_factory=list)
    prefilled: list[Prompt] = field(default_factory=list)
    leased: list[Prompt] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_scores_on_decode: int = 0
    most_at_once: int = 0


class FakeServer:
    """Mutable; used in one event loop. A `Backend`."""

    def __init__(
        self,
        *,
        native: frozenset[Native] = ALL_NATIVE,
        workers: Sequence[Worker] = FAKE_PAIR,
        num_lease_tokens: int = 1 << 16,
        time_scale: float = 0.0,
        failures: Callable[[Prompt], KvistError | None] = lambda _prompt: None,
    ) -> None:
        """`failures` returns the error of a generation or choice with this prompt, or None."""
        self.seen = Seen()
        self.leases: dict[str, tuple[Prompt, float]] = {}  # id -> prefix, end on the loop's clock
        self._native, self._workers, self._num_lease_tokens = native, tuple(workers), num_lease_tokens
        self._time_scale, self._failures = time_scale, failures
        self._cached = RememberedPrefixes(_MAX_CACHED)
        self._num_now = 0
        self._lease_ids = itertools.count()
        self._turns = itertools.count()  # of requests without a hint
        self._steps = {each.name: asyncio.Lock() for each in self._workers}

    async def fleet(self) -> Fleet:
        room = self._num_lease_tokens - sum(
            len(prompt.outline) // _CHARS_PER_TOKEN for prompt, _ in self.leases.values()
        )
        return Fleet(workers=self._workers, native=self._native, num_lease_tokens=max(room, 0))

    async def generate(self, request: GenerateRequest, push: Callable[[str], None] | None) -> Answer:
        self.seen.generated.append(request)
        answers = request.sampling.n or 1
        async with _Counted(self):
            self._check(request.prompt)
            served = await self._prefilled(request.prompt, request.hints)
            texts, reasons = [], []
            for index in range(answers):
                text, reason = _text(request, index)
                texts.append(text)
                reasons.append(reason)
            num_output = sum(len(text.split()) for text in texts)
            pieces = [word for word in re.split(r"(?<=\s)", texts[0]) if word]
            for piece in pieces:
                await asyncio.sleep(self._time_scale / _DECODE_TOKENS_PER_S)
                if push is not None:
                    push(piece)
        meta: dict[str, object] = {
            "finish_reason": reasons[0],
            "prompt_tokens": served.num_prompt_tokens,
            "cached_tokens": served.num_cached_tokens,
            "completion_tokens": num_output,
        }
        if request.sampling.return_logprob:
            meta["logprobs"] = [-1.0] * num_output
        decode = self._decode_worker(request, served)
        self._cached.add(decode, Prompt(request.prompt.outline + texts[0]))
        figures = Served(
            num_prompt_tokens=served.num_prompt_tokens,
            num_cached_tokens=served.num_cached_tokens,
            num_output_tokens=num_output,
            prefill_worker=served.prefill_worker,
            decode_worker=decode,
        )
        return Answer(texts=tuple(texts), served=figures, meta=meta)

    async def score(self, request: ScoreRequest) -> Scored:
        self.seen.scored.append(request)
        async with _Counted(self):
            self._check(request.prompt)
            served = await self._prefilled(request.prompt, request.hints)
            if request.hints.role is Role.DECODE:
                self.seen.num_scores_on_decode += 1
        scored = tuple(
            ScoredChoice(
                token_ids=tuple(map(_number, each.split())) or (0,),
                logprobs=_logprobs(request.prompt.outline, each),
                unconditional=_logprobs("", each) if request.unconditional else (),
            )
            for each in request.choices
        )
        return Scored(choices=scored, served=served)

    async def prefill(self, prompt: Prompt, hints: Hints) -> Served:
        self.seen.prefilled.append(prompt)
        prefix_fields(prompt)
        return await self._prefilled(prompt, hints)

    async def lease(self, prompt: Prompt, lease_id: str | None, ttl_s: float, hints: Hints) -> Leased | None:
        self.expire()
        if ttl_s == 0:
            self.leases.pop(lease_id or "", None)
            return None
        served = None
        if lease_id is None:
            prefix_fields(prompt)
            self.seen.leased.append(prompt)
            served = await self._prefilled(prompt, hints)
        name = lease_id or f"lease-{next(self._lease_ids)}"
        self.leases[name] = (prompt, asyncio.get_running_loop().time() + ttl_s)
        return Leased(lease_id=name, served=served)

    def expire(self) -> None:
        """Drop the leases that were not renewed in time."""
        now_s = asyncio.get_running_loop().time()
        self.leases = {name: held for name, held in self.leases.items() if held[1] > now_s}

    async def close(self) -> None:
        self.leases.clear()

    def _check(self, prompt: Prompt) -> None:
        if (error := self._failures(prompt)) is not None:
            raise error
        if not prompt.is_known:
            raise RequestError("the prompt has a hole")
        prompt_fields(prompt)  # raises for a prompt that cannot be sent

    async def _prefilled(self, prompt: Prompt, hints: Hints) -> Served:
        """Compute what the worker has not cached. A decode worker computes prompts if it is asked to."""
        names = [each.name for each in self._workers if each.prefills or hints.role is Role.DECODE]
        worker = hints.worker if hints.worker in names else names[next(self._turns) % len(names)]
        num_tokens = -(-len(prompt.outline) // _CHARS_PER_TOKEN)
        async with self._steps[worker]:  # one prompt after the other, so a common prefix is computed once
            known = self._cached.snapshot().get(worker, ())
            cached = max((common_length(one, prompt.outline) for one in known), default=0)
            num_cached = min(cached // _CHARS_PER_TOKEN, num_tokens - 1)
            self.seen.num_computed_tokens += num_tokens - num_cached
            await asyncio.sleep(self._time_scale * (num_tokens - num_cached) / _PREFILL_TOKENS_PER_S)
            self._cached.add(worker, prompt)
        return Served(num_prompt_tokens=num_tokens, num_cached_tokens=num_cached, prefill_worker=worker)

    def _decode_worker(self, request: GenerateRequest, served: Served) -> str:
        """Return the worker that writes the answer: the one that computed the prompt, if it may."""
        found = next(each for each in self._workers if each.name == served.prefill_worker)
        if found.decodes or (request.sampling.max_tokens or 0) <= found.max_answer_tokens:
            return found.name
        return next((each.name for each in self._workers if each.decodes), found.name)

    def count(self, change: int) -> None:
        self._num_now += change
        self.seen.most_at_once = max(self.seen.most_at_once, self._num_now)


class _Counted:
    """Counts a request while it runs."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    async def __aenter__(self) -> None:
        self._server.count(1)

    async def __aexit__(self, *_: object) -> None:
        self._server.count(-1)


def _text(request: GenerateRequest, index: int) -> tuple[str, str]:
    """Return the answer and its finish reason: a function of prompt, parameters and seed."""
    sampling = request.sampling
    greedy = not sampling.temperature
    seed = 0 if greedy else (sampling.seed or 0) + index
    key = f"{request.prompt.outline}|{seed}|{sampling.temperature}|{request.form_source}"
    if request.form:
        return _formed(request.form, request.form_source, key), "stop"
    num_words = min(sampling.max_tokens or 1, 1 + _number(key) % 12)
    words = [_WORDS[_number(f"{key}|{position}") % len(_WORDS)] for position in range(num_words)]
    text = " ".join(words)
    ends = [text.find(stop) for stop in sampling.stops() if stop in text]
    for pattern in sampling.stop_patterns():
        ends += [found.start() for found in [re.search(pattern, text)] if found]
    if ends:
        return text[: min(ends)], "stop"
    return text, "length" if num_words == sampling.max_tokens else "stop"


def _formed(form: str, source: str, key: str) -> str:
    """Return a text of the form, for the forms that tests use: scalars, and objects of texts and numbers."""
    number = _number(key) % 100
    if form == "json_schema":
        return _of_schema(source, number)
    for candidate in (str(number), f"{number}.5", "true", f'"{_WORDS[number % 16]}"', _WORDS[number % 16], "B+"):
        if re.fullmatch(source, candidate):
            return candidate
    options = source.strip("()").split("|")
    return options[number % len(options)]


def _of_schema(source: str, number: int) -> str:
    schema = json.loads(source)
    while "$ref" in schema:
        schema = json.loads(source)["$defs"][schema["$ref"].rpartition("/")[2]]
    values: dict[str, object] = {}
    for name, wanted in schema.get("properties", {}).items():
        kind = wanted.get("type")
        values[name] = {"integer": number, "number": number / 2, "boolean": True, "array": []}.get(
            kind, _WORDS[number % 16]
        )
    return json.dumps(values)


def _logprobs(prompt: str, choice: str) -> tuple[float, ...]:
    return tuple(-0.1 - (_number(f"{prompt}|{word}") % 1000) / 250 for word in choice.split() or [choice])


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest())
