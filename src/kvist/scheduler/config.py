"""The scheduler's settings: how much it takes on at once, and how long anything may wait."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option
from kvist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Raises ConfigError when two settings contradict each other."""

    max_running_requests: int = option(128, "requests computed together; more of them wait", unit="requests", minimum=1)
    max_queued_requests: int = option(
        512, "requests that may wait; one more is refused as overloaded", unit="requests", minimum=1
    )
    chunked_prefill_size: int = option(
        512, "the most prompt tokens of one request in one step", unit="tokens", minimum=1
    )
    max_prefill_tokens: int = option(
        1024, "the token budget of one step: decodes (one each) first, then prompt chunks", unit="tokens", minimum=1
    )
    overlap: bool | None = option(
        None, "plan the next step while one is computed; by default on a GPU, where the CPU has the time"
    )
    max_model_len: int = option(4096, "prompt and answer together", unit="tokens", minimum=2)
    eos_token_ids: tuple[int, ...] = option((), "tokens that end an answer; from the model when empty")
    queue_timeout_s: float = option(60.0, "the longest wait for a first turn", unit="s", minimum=0.001)
    grant_timeout_s: float = option(
        90.0, "prefill: the longest wait for the decode worker's pages", unit="s", minimum=0.001
    )
    handoff_timeout_s: float = option(
        120.0,
        "decode: from granting pages to having them verified; prefill: from the last page computed to the Ack",
        unit="s",
        minimum=0.001,
    )
    ack_timeout_s: float = option(
        1.0, "Done and Revoke are said again after this long without an answer", unit="s", minimum=0.001
    )
    overload_retry_s: float = option(1.0, "Retry-After of a request refused as overloaded", unit="s", minimum=0.0)
    max_remembered_handoffs: int = option(
        4096, "early grants, and closed handoffs whose peers may still ask, kept at most", unit="handoffs", minimum=1
    )

    def __post_init__(self) -> None:
        if self.max_prefill_tokens < self.max_running_requests:
            raise ConfigError(
                f"max_prefill_tokens ({self.max_prefill_tokens}) is below max_running_requests "
                f"({self.max_running_requests}): each running request needs one token a step; raise the first or "
                "lower the second",
                param="max_prefill_tokens",
            )
