"""PURE. Joins the requests of a group into one message, so that their engine computes them in one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvist import wire
from kvist.router.registry import Worker

FIRST_VERSION = 6  # of engines that know `SubmitTogether`
# Of one message: choosing workers and encoding take 6 ms, in which the gateway's loop does nothing else.
MOST_TOKENS_TOGETHER = 1 << 15

Message = wire.Submit | wire.Abort
Joined = Message | wire.SubmitTogether


def sent_together(sends: Sequence[tuple[Worker, Message]]) -> Iterator[tuple[Worker, Joined]]:
    """Yield the messages, with those joined whose requests share tokens; an Abort stays behind its request."""
    joined: dict[Worker, list[wire.Submit]] = {}
    others: list[tuple[Worker, Message]] = []
    for worker, message in sends:
        if isinstance(message, wire.Submit) and message.request.num_shared_tokens and _knows(worker):
            joined.setdefault(worker, []).append(message)
        else:
            others.append((worker, message))
    for worker, submits in joined.items():
        for part in _parts(submits):
            yield worker, wire.SubmitTogether(submits=tuple(part)) if len(part) > 1 else part[0]
    yield from others


def submits_of(message: wire.GatewayToEngine) -> Sequence[wire.Submit]:
    """Return the requests in a message to an engine."""
    if isinstance(message, wire.SubmitTogether):
        return message.submits
    return (message,) if isinstance(message, wire.Submit) else ()


def _knows(worker: Worker) -> bool:
    return worker.spec is not None and worker.spec.protocol_version >= FIRST_VERSION


def _parts(submits: Sequence[wire.Submit]) -> Iterator[list[wire.Submit]]:
    """Divide requests into parts of at most `MOST_TOKENS_TOGETHER`, or of one request."""
    part, num_tokens = list[wire.Submit](), 0
    for submit in submits:
        num_tokens += submit.request.num_prompt_tokens
        if part and num_tokens > MOST_TOKENS_TOGETHER:
            yield part
            part, num_tokens = [], submit.request.num_prompt_tokens
        part.append(submit)
    yield part
