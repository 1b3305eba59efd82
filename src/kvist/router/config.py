"""Settings of the router: its workers, its routing policy and its time limits."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.config import option
from kvist.door import Given, choice_of, options_of_choice
from kvist.router.addresses import HostRule
from kvist.router.policies import POLICIES
from kvist.router.sources import discovery_of

HANDOFFS = ("auto", "direct", "store")
AUTO, NEVER = "auto", "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUrls:
    """The workers of a router."""

    prefill: tuple[str, ...] = option((), "URLs of prefill workers, http://HOST:PORT (unified workers are allowed too)")
    decode: tuple[str, ...] = option((), "URLs of decode workers, http://HOST:PORT")
    worker_urls: tuple[str, ...] = option((), "URLs of workers; each is used in the role that it was started with")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberOptions:
    """Which workers may join while the router runs."""

    discovery: tuple[str, ...] = option(
        (),
        "places that list workers, which are watched for changes: file:PATH (one URL per line) or dns:NAME:PORT (all "
        "addresses of the name)",
    )
    max_workers: int = option(256, "maximum number of workers, however they are named", unit="workers", minimum=1)
    allowed_worker_hosts: tuple[str, ...] = option(
        (),
        "hosts that POST /workers and announcements may name, beside the sender's own address and those of private "
        "networks: addresses, networks (203.0.113.0/24), names, or *.SUFFIX",
    )

    def __post_init__(self) -> None:
        HostRule(self.allowed_worker_hosts)  # raises for a wrong entry
        for place in self.discovery:
            discovery_of(place)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions:
    """The options of the choice of a worker for each request."""

    policy: str = choice_of(POLICIES, "cache_aware", "routing policy")
    policy_options: Given = options_of_choice(POLICIES, chosen_by="policy", title="routing policy")
    handoff: str = option(
        "auto",
        "how pages go from prefill to decode: directly (direct), through the store that both workers use "
        "(store; directly if there is none), or directly if they have a transport in common, else through the store "
        "(auto)",
        choices=HANDOFFS,
    )
    aggregate: str = option(
        AUTO,
        "whether a prefill or decode worker may serve a whole request without a handoff: auto when the policy finds it "
        "cheaper (--policy cost), and while no prefill worker is ready; never",
        choices=(AUTO, NEVER),
        flag="routing-aggregate",
    )
    auto_balance: bool = option(
        False,
        "switch workers between prefill and decode by the time that requests wait for each, and keep at least one of "
        "each; for one router of a cluster",
    )
    auto_balance_wait_s: float = option(
        2.0, "shorter waits for a role switch no worker (--auto-balance)", unit="seconds", minimum=0.1
    )
    max_known_pages: int = option(
        16_777_216,
        "maximum number of different cached pages that routing knows, of all workers together; each worker has an "
        "equal share, and the gateway needs about 50 bytes of memory for each page",
        unit="pages",
        minimum=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """The time limits of the connections to workers, and of requests to workers."""

    keepalive_s: float = option(
        2.0, "interval between the keep-alive messages to each engine", unit="seconds", minimum=0.05
    )
    worker_silence_s: float = option(
        1.5,
        "after this long without a message of an engine, its worker is asked over HTTP; if the worker does not answer "
        "within a second, or says that the engine is down or suspended, the engine is considered lost",
        unit="seconds",
        minimum=0.1,
    )
    worker_timeout_s: float = option(
        5.0,
        "an engine without messages and without progress for this long is considered lost (a closed connection is "
        "detected at once; a long step on a CPU counts as progress)",
        unit="seconds",
        minimum=0.1,
    )
    discovery_timeout_s: float = option(
        5.0, "time limit for one GET /server_info request to a worker", unit="seconds", minimum=0.1
    )
    request_timeout_s: float = option(600.0, "time limit for one request", unit="seconds", minimum=0.1)
    migration_limit: int = option(
        3,
        "how often in a row a request goes on at another worker after its worker has failed; tokens in between begin a "
        "new row; 0: a failed worker fails its requests",
        unit="times",
        minimum=0,
    )
    migration_timeout_s: float = option(
        5.0,
        "how long a request waits for another worker after its worker has failed, before it ends with an error",
        unit="seconds",
        minimum=0.0,
    )
    storage_timeout_s: float = option(
        90.0,
        "time limit for a request to /hicache/storage-backend, for all workers together; attaching a store may include "
        "a scan of the store",
        unit="seconds",
        minimum=0.1,
    )
    flush_timeout_s: float = option(
        10.0, "time limit for the workers to answer /flush_cache, and calls about leases", unit="seconds", minimum=0.1
    )
    retry_after_s: float = option(
        1.0, "Retry-After of refused requests if there is no better estimate", unit="seconds", minimum=0.0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    urls: WorkerUrls = field(default_factory=WorkerUrls)
    members: MemberOptions = field(default_factory=MemberOptions)
    routing: RoutingOptions = field(default_factory=RoutingOptions)
    links: LinkOptions = field(default_factory=LinkOptions)
