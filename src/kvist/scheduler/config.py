"""The scheduler's settings: limits on running and queued requests, step sizes, and timeouts.

`SchedulerOptions` are the options of the user; None means "auto". `SchedulerConfig` has the resolved numbers;
engine/limits.py computes them once the device is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option
from kvist.errors import ConfigError
from kvist.request import FCFS, PRIORITY

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Raises `ConfigError` when two settings contradict each other."""

    context_length: int | None = option(
        None,
        "maximum length of prompt plus answer; by default the model's own maximum",
        unit="tokens",
        aliases=("max-model-len",),
        minimum=2,
    )
    max_running_requests: int | None = option(
        None,
        "maximum number of requests computed together; further requests wait in the queue. auto is 128 on a CPU, 256 "
        "on a GPU",
        unit="requests",
        aliases=("max-num-seqs",),
        minimum=1,
        unset=AUTO,
    )
    max_queued_requests: int = option(
        512,
        "maximum number of requests that wait in the queue, not counting the running ones. When the queue is full, "
        "either the new request or the newest request of the caller with the most waiting requests is refused as "
        "overloaded",
        unit="requests",
        minimum=1,
    )
    max_queue_wait_s: float | None = option(
        None,
        "a request whose turn would come later than this is refused as overloaded at once. The wait is estimated from "
        "the tokens and the requests ahead, and measured rates. By default the limit is --queue-timeout-s",
        unit="s",
        minimum=0.001,
    )
    scheduling_policy: str = option(
        FCFS,
        "fcfs: callers are served in turn, and the requests of one caller in order of arrival; `priority` of a request "
        "has no effect. priority: requests with a lower `priority` (default 0) are served first, and preempted last; "
        "callers take turns among requests of equal priority",
        choices=(FCFS, PRIORITY),
    )
    chunked_prefill_size: int | None = option(
        None,
        "usual size of a step, decodes included; a step is larger (up to --max-prefill-tokens) only when few streams "
        "run or many prompts wait. auto depends on the device and the role",
        unit="tokens",
        aliases=("max-num-batched-tokens",),
        minimum=1,
        unset=AUTO,
    )
    max_prefill_tokens: int | None = option(
        None,
        "largest size of a step, used when few streams run or many prompts wait; decodes (one token each) are included "
        "first. auto depends on the device and the role",
        unit="tokens",
        minimum=1,
        unset=AUTO,
    )
    overlap: bool | None = option(
        None,
        "plan the next step while the current step is computed; auto is on for a GPU, off for a CPU",
        unset=AUTO,
    )
    queue_timeout_s: float = option(
        60.0, "maximum time that a request waits in the queue for its first step", unit="s", minimum=0.001
    )
    grant_timeout_s: float = option(
        90.0, "on a prefill worker: maximum wait for the decode worker to grant pages", unit="s", minimum=0.001
    )
    handoff_timeout_s: float = option(
        120.0,
        "maximum duration of a handoff: on a decode worker from its Grant until all pages are verified, on a prefill "
        "worker from its last computed page until the Ack",
        unit="s",
        minimum=0.001,
    )
    ack_timeout_s: float = option(
        1.0, "Grant, Done and Revoke are sent again if there is no answer within this time", unit="s", minimum=0.001
    )
    store_handoff_timeout_s: float = option(
        5.0,
        "on a prefill worker: maximum time to store the pages of a prompt for a decode worker, from the first token "
        "on; the decode worker then computes the pages that are not stored",
        unit="s",
        minimum=0.001,
    )
    max_lease_fraction: float = option(
        0.25,
        "share of the page pool that leased prompts may pin together (/v1/leases); 0: no prompt can be leased",
        minimum=0.0,
        maximum=0.9,
    )
    max_lease_fraction_per_key: float = option(
        0.125, "share of the page pool that the leases of one API key may pin", minimum=0.0, maximum=0.9
    )
    max_remembered_handoffs: int = option(
        4096,
        "maximum number of remembered handoffs: grants that arrived before their request, and closed handoffs, whose "
        "late messages must still be answered",
        unit="handoffs",
        minimum=1,
    )

    def __post_init__(self) -> None:
        if self.max_prefill_tokens is not None and self.max_running_requests is not None:
            _check_budget(self.max_prefill_tokens, self.max_running_requests)


_DEFAULTS = SchedulerOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The scheduler's limits as numbers, for one device and one model. Raises `ConfigError` as the options do."""

    max_running_requests: int
    max_queued_requests: int = _DEFAULTS.max_queued_requests
    max_queue_wait_s: float | None = _DEFAULTS.max_queue_wait_s
    scheduling_policy: str = _DEFAULTS.scheduling_policy
    chunked_prefill_size: int
    max_prefill_tokens: int
    overlap: bool = False
    queue_timeout_s: float = _DEFAULTS.queue_timeout_s
    grant_timeout_s: float = _DEFAULTS.grant_timeout_s
    handoff_timeout_s: float = _DEFAULTS.handoff_timeout_s
    ack_timeout_s: float = _DEFAULTS.ack_timeout_s
    store_handoff_timeout_s: float = _DEFAULTS.store_handoff_timeout_s
    max_lease_fraction: float = _DEFAULTS.max_lease_fraction
    max_lease_fraction_per_key: float = _DEFAULTS.max_lease_fraction_per_key
    max_remembered_handoffs: int = _DEFAULTS.max_remembered_handoffs
    grammar_compile_timeout_s: float = 10.0
    max_model_len: int = 4096  # prompt and answer together
    eos_token_ids: tuple[int, ...] = ()  # tokens that end an answer

    def __post_init__(self) -> None:
        _check_budget(self.max_prefill_tokens, self.max_running_requests)


def _check_budget(budget: int, num_running: int) -> None:
    if budget < num_running:
        raise ConfigError(
            f"--max-prefill-tokens {budget} is below --max-running-requests {num_running}: each running request "
            "needs one token a step; raise the first or lower the second",
            param="max_prefill_tokens",
        )
