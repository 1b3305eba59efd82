"""The scheduler's settings: how much it takes on at once, and how long anything may wait.

`SchedulerOptions` are what a user may set, where None is "auto". `SchedulerConfig` is what a scheduler is given:
numbers, made of the options by worker/limits.py once the device is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option
from kvist.errors import ConfigError

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Raises `ConfigError` when two settings contradict each other."""

    max_running_requests: int | None = option(
        None,
        "requests computed together; more of them wait; auto is 128 on a CPU, 256 on a GPU",
        unit="requests",
        aliases=("max-num-seqs",),
        minimum=1,
        unset=AUTO,
    )
    max_queued_requests: int = option(
        512,
        "requests that may wait, beside those that run; one more is refused as overloaded, or the newest one of the "
        "caller with the most of them",
        unit="requests",
        minimum=1,
    )
    chunked_prefill_size: int | None = option(
        None,
        "tokens of a step as a rule, when many streams wait for it; auto is made for the device and the role",
        unit="tokens",
        aliases=("max-num-batched-tokens",),
        minimum=1,
        unset=AUTO,
    )
    max_prefill_tokens: int | None = option(
        None,
        "the most tokens of one step, decodes (one each) first: taken when few streams wait for it or many prompts do; "
        "auto is made for the device and the role",
        unit="tokens",
        minimum=1,
        unset=AUTO,
    )
    overlap: bool | None = option(
        None,
        "plan the next step while one is computed; auto does so on a GPU, where the CPU has the time",
        unset=AUTO,
    )
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
        1.0, "Grant, Done and Revoke are said again after this long without an answer", unit="s", minimum=0.001
    )
    max_remembered_handoffs: int = option(
        4096, "early grants, and closed handoffs whose peers may still ask, kept at most", unit="handoffs", minimum=1
    )

    def __post_init__(self) -> None:
        budget, num_running = self.max_prefill_tokens, self.max_running_requests
        if budget is not None and num_running is not None and budget < num_running:
            raise ConfigError(
                f"--max-prefill-tokens {budget} is below --max-running-requests {num_running}: each running request "
                "needs one token a step; raise the first or lower the second",
                param="max_prefill_tokens",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig(SchedulerOptions):
    """The options with every "auto" resolved, and what the model says. Raises `ConfigError` as they do."""

    max_running_requests: int
    chunked_prefill_size: int
    max_prefill_tokens: int
    overlap: bool = False
    max_model_len: int = 4096  # prompt and answer together
    eos_token_ids: tuple[int, ...] = ()  # tokens that end an answer
