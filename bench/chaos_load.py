"""The streams of a chaos run: what is asked, how an answer is read, and how it is compared with its twin.

A case is one request body. Its twin is the answer of an undisturbed worker. Under bf16 on GPUs the tokens depend on the
shape of the batch: there `Comparison.LENGTHS` compares only counts, reasons and positions.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvist.http_client import HttpClient, HttpFailure

LOGPROB_TOLERANCE = 2e-3  # of fp32, for batches of different shapes
PATH = "/v1/completions"
_TEXT = "one page of the cache holds sixteen tokens and every worker knows where the others keep theirs"
_WORDS = _TEXT.split(" ")


class Comparison(enum.StrEnum):
    TOKENS = "tokens"
    LENGTHS = "lengths"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    body: Mapping[str, Any]
    comparison: Comparison = Comparison.TOKENS


@dataclass(slots=True, kw_only=True)
class Choice:
    """One of the answers of a request, joined from all its events."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprob_tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True, kw_only=True)
class Answer:
    """Mutable while its stream is read."""

    choices: dict[int, Choice] = field(default_factory=dict)
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int = 0
    num_failovers: int = 0
    is_whole: bool = False  # ended as a whole answer, by [DONE] or as one body
    error: str = ""

    def add(self, event: Mapping[str, Any]) -> None:
        """Add an event of a stream, or the body of an answer that is not streamed."""
        if "error" in event:
            self.error = f"{event['error'].get('code')}: {event['error'].get('message')}"
        for part in event.get("choices", ()):
            choice = self.choices.setdefault(part["index"], Choice())
            choice.text += part["text"]
            choice.token_ids += part.get("token_ids") or ()
            if part.get("logprobs"):
                choice.logprob_tokens += part["logprobs"]["tokens"]
                choice.logprobs += part["logprobs"]["token_logprobs"]
            choice.finish_reason = part["finish_reason"] or choice.finish_reason
        if usage := event.get("usage"):
            self.num_prompt_tokens, self.num_output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            self.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self.num_failovers = (event.get("kvist") or {}).get("failovers", self.num_failovers)


class StreamReader:
    """Joins the pieces of a response into its `answer`, and notes when each event came. Mutable; of one response."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.event_times_s: list[float] = []
        self._rest = b""

    def on_piece(self, piece: bytes, now_s: float) -> None:
        """Read a piece of a stream of server-sent events."""
        *blocks, self._rest = (self._rest + piece).split(b"\n\n")
        for block in blocks:
            line = block.rpartition(b"data: ")[2]
            if line == b"[DONE]":
                self.answer.is_whole = not self.answer.error
                continue
            self.event_times_s.append(now_s)
            self.answer.add(msgspec.json.decode(line))

    def on_body(self, body: bytes) -> None:
        """Read a response that is not a stream."""
        self.answer.add(msgspec.json.decode(body))
        self.answer.is_whole = not self.answer.error


def difference(twin: Answer, found: Answer, comparison: Comparison) -> str | None:
    """Return how a whole answer differs from its twin, in words; None if it does not."""
    if set(twin.choices) != set(found.choices):
        return f"choices {sorted(found.choices)} instead of {sorted(twin.choices)}"
    counts = (twin.num_prompt_tokens, twin.num_output_tokens), (found.num_prompt_tokens, found.num_output_tokens)
    if counts[0] != counts[1]:
        return f"prompt and output tokens {counts[1]} instead of {counts[0]}"
    for index, right in twin.choices.items():
        choice = found.choices[index]
        if len(right.token_ids) != len(choice.token_ids) or right.finish_reason != choice.finish_reason:
            return (
                f"choice {index}: {len(choice.token_ids)} tokens, {choice.finish_reason}, instead of "
                f"{len(right.token_ids)}, {right.finish_reason}"
            )
        if comparison is Comparison.TOKENS and (words := _other_content(right, choice)):
            return f"choice {index}: {words}"
    return None


def prefix_difference(twin: Answer, found: Answer, comparison: Comparison) -> str | None:
    """Return how the beginning of an answer differs from its twin, in words; None if it does not."""
    for index, choice in found.choices.items():
        right = twin.choices.get(index, Choice())
        if len(choice.token_ids) > len(right.token_ids):
            return f"choice {index}: {len(choice.token_ids)} tokens, more than {len(right.token_ids)}"
        if (
            comparison is Comparison.TOKENS
            and (place := _first_difference(right.token_ids, choice.token_ids)) is not None
        ):
            return f"choice {index}: another token at {place}"
    return None


def _other_content(right: Choice, found: Choice) -> str | None:
    if (place := _first_difference(right.token_ids, found.token_ids)) is not None:
        return f"token {found.token_ids[place]} at {place} instead of {right.token_ids[place]}"
    if right.text != found.text:
        return f"text {found.text!r} instead of {right.text!r}"
    if right.logprob_tokens != found.logprob_tokens:
        return "other tokens in its logprobs"
    for place, (one, other) in enumerate(zip(right.logprobs, found.logprobs, strict=True)):
        if one is None or other is None:
            if one is not other:
                return f"logprob {other} at {place} instead of {one}"
        elif abs(one - other) > LOGPROB_TOLERANCE:
            return f"logprob {other} at {place} instead of {one}"
    return None


def _first_difference(right: list[int], found: list[int]) -> int | None:
    return next((place for place, (one, two) in enumerate(zip(right, found, strict=False)) if one != two), None)


# ---------------------------------------------------------------- cases


def make_cases(*, seed: int, count: int, max_tokens: tuple[int, int], comparison: Comparison) -> list[Case]:
    """Return `count` cases of every kind; their stop strings are still to be chosen (`with_stop_string`).

    A third of the prompts begin with one of four long prefixes, which workers cache, hand over and evict."""
    draw = random.Random(seed)
    prefixes = [_sentence(draw, 60) for _ in range(4)]
    kinds = [kind for kind in _KINDS if comparison is Comparison.TOKENS or kind not in _OF_TOKENS]
    cases = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        start = draw.choice(prefixes) if draw.random() < 0.35 else ""
        prompt = f"{start} {number}: {_sentence(draw, draw.randrange(2, 40))}"
        fields = dict(_KINDS[kind](draw))
        body = {
            "prompt": prompt,
            "max_tokens": draw.randint(*max_tokens),
            "ignore_eos": comparison is Comparison.LENGTHS or draw.random() < 0.7,
            "stream": True,
            "return_token_ids": True,
            "kvist": {"report": True},
            **fields,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        seedless = kind == "no seed"
        cases.append(Case(name=kind, body=body, comparison=Comparison.LENGTHS if seedless else comparison))
    return cases


def with_stop_string(case: Case, twin: Answer, seed: int) -> Case:
    """Return the case with a stop string from the second half of its twin, so that it ends the answer early."""
    text = twin.choices[0].text
    places = [place for place in range(len(text) // 2, len(text) - 2) if "\ufffd" not in text[place : place + 2]]
    if not places:
        return case
    place = random.Random(seed).choice(places)
    return Case(name=case.name, body={**case.body, "stop": [text[place : place + 2]]}, comparison=case.comparison)


def _sentence(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(num_words))


def _seeded(draw: random.Random) -> dict[str, Any]:
    return {"temperature": draw.uniform(0.5, 1.2), "top_p": 0.95, "top_k": 100, "seed": draw.randrange(1 << 31)}


_GREEDY: dict[str, Any] = {"temperature": 0}
STOPPED = "stop string"
_KINDS: dict[str, Any] = {
    "greedy": lambda _draw: _GREEDY,
    "seeded": _seeded,
    "logprobs": lambda draw: {**_seeded(draw), "logprobs": 3},
    STOPPED: lambda draw: {**_seeded(draw), "include_stop_str_in_output": True},
    "penalties": lambda draw: {
        **_seeded(draw),
        "frequency_penalty": 0.8,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.15,
        "logit_bias": {"97": 1.5, "101": -2.0},
    },
    "constrained": lambda draw: {**_seeded(draw), "structured_outputs": {"regex": "([a-z]{2,9} [0-9]{1,3}; )*"}},
    "n": lambda draw: {**_seeded(draw), "n": 3},
    "echo": lambda _draw: {**_GREEDY, "echo": True, "logprobs": 1},
    "not streamed": lambda draw: {**_seeded(draw), "stream": False, "logprobs": 1},
    "no seed": lambda _draw: {"temperature": 1.0, "ignore_eos": True},
}
_OF_TOKENS = frozenset({STOPPED})  # kinds whose length depends on their tokens


# ---------------------------------------------------------------- requests


async def read_answer(client: HttpClient, case: Case, reader: StreamReader, clock: Any) -> int:
    """Send the request; return the status. Raises `HttpFailure` without a complete response, and
    `asyncio.CancelledError`; the part that has come is in the reader."""
    pieces: list[bytes] = []
    is_stream = bool(case.body["stream"])

    def on_piece(status: int, piece: bytes) -> None:
        if is_stream and status == 200:
            reader.on_piece(piece, clock.now_s())
        else:
            pieces.append(piece)

    reply = await client.post(PATH, msgspec.json.encode(case.body), on_piece)
    if pieces:
        try:
            reader.on_body(b"".join(pieces))
        except msgspec.DecodeError as error:
            raise HttpFailure("bad_response", f"status {reply.status} and a body that is not JSON") from error
    return reply.status
