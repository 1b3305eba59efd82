"""The interface between the executor and a server, and the values that cross it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvist.errors import RequestError
from kvist.execution.choices import ScoredChoice
from kvist.execution.results import Answer, Served
from kvist.execution.sampling import Sampling
from kvist.planning.fleet import Fleet, Role
from kvist.planning.prompt import ChatMessage, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """Hints of the plan about the place of a request. A server that cannot honour a hint ignores it."""

    worker: str | None = None
    role: Role | None = None
    session: str = ""
    in_background: bool = False  # after all other requests, for work that may turn out to be needless


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    prompt: Prompt
    sampling: Sampling
    form: str = ""  # of the answer: "" (any text), "regex" or "json_schema"
    form_source: str = ""
    form_argument: str = ""  # the argument of the program that gives the form, for errors
    hints: Hints = Hints()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    prompt: Prompt
    choices: tuple[str, ...]
    unconditional: bool = False
    hints: Hints = Hints()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    choices: tuple[ScoredChoice, ...]
    served: Served


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A lease that was taken or renewed. `served`: the computation of its prompt; None after a renewal."""

    lease_id: str
    served: Served | None = None


class Backend(Protocol):
    """A server. All methods run in the executor's event loop, take bounded time, and raise `KvistError`."""

    async def fleet(self) -> Fleet:
        """Return what the server says of its workers now."""

    async def generate(self, request: GenerateRequest, push: Callable[[str], None] | None) -> Answer:
        """Return the answer; `push` gets its pieces as they arrive (None: in one piece)."""

    async def score(self, request: ScoreRequest) -> Scored:
        """Return the log probabilities of the choices' tokens."""

    async def prefill(self, prompt: Prompt, hints: Hints) -> Served:
        """Compute a prompt, so that its pages are cached. Only for a fleet with `Native.PREFILL`."""

    async def lease(self, prompt: Prompt, lease_id: str | None, ttl_s: float, hints: Hints) -> Leased | None:
        """Compute a prompt and keep its pages for `ttl_s`, or renew that lease. `ttl_s` 0 ends the lease. None:
        the server has too little room for it. Only for a fleet with `Native.LEASE`."""

    async def close(self) -> None:
        """Close all connections."""


def prompt_fields(prompt: Prompt) -> dict[str, object]:
    """Return the fields of a request that hold the prompt: `prompt`, or `messages` and how they end. Raises
    `RequestError` for a message that cannot be continued, because it has no text yet."""
    if prompt.is_chat and prompt.open_role not in (None, "assistant") and not prompt.messages()[-1].text:
        raise RequestError(f"a {prompt.open_role} message that is continued needs some text before gen()")
    return prefix_fields(prompt)


def prefix_fields(prompt: Prompt) -> dict[str, object]:
    """Return the fields for a prompt that is the beginning of others: the beginning of a message without text yet is
    left out."""
    if not prompt.is_chat:
        return {"prompt": prompt.outline}
    messages, role = prompt.messages(), prompt.open_role
    if role is not None and not messages[-1].text and len(messages) > 1:
        return {"messages": _bodies(messages[:-1]), "add_generation_prompt": role == "assistant"}
    if role is None:
        return {"messages": _bodies(messages), "add_generation_prompt": False}
    return {"messages": _bodies(messages), "add_generation_prompt": False, "continue_final_message": True}


def _bodies(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]


def total(parts: Sequence[Served]) -> Served:
    """Return the figures of several requests as those of one."""
    return Served(
        num_prompt_tokens=sum(each.num_prompt_tokens for each in parts),
        num_cached_tokens=sum(each.num_cached_tokens for each in parts),
        num_output_tokens=sum(each.num_output_tokens for each in parts),
        prefill_worker=parts[0].prefill_worker if parts else None,
        decode_worker=parts[0].decode_worker if parts else None,
        num_requests=sum(each.num_requests for each in parts),
        num_scored_tokens=sum(each.num_scored_tokens for each in parts),
    )
