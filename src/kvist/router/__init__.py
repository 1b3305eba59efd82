"""The router: connects the gateway to engines.

Knows which workers to use (membership, members), tracks them (registry, discovery, fleet), chooses among them
(policies, route), and dispatches requests (dispatch, attempt, merge).
"""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from kvist.channel import ChannelConfig, ClusterProof
from kvist.clock import MonotonicClock
from kvist.errors import ConfigError
from kvist.request import Role
from kvist.router.addresses import HostRule, normal_url
from kvist.router.balance import BalanceRules
from kvist.router.balancer import Balancer
from kvist.router.config import LinkOptions, MemberOptions, RouterConfig, RoutingOptions, WorkerUrls
from kvist.router.dispatch import Dispatcher
from kvist.router.fleet import Fleet
from kvist.router.members import Members
from kvist.router.membership import Announcement, Membership
from kvist.router.registry import GatewayTokenizer, Registry
from kvist.router.sources import discovery_of

__all__ = [
    "Announcement",
    "Dispatcher",
    "GatewayTokenizer",
    "LinkOptions",
    "MemberOptions",
    "Members",
    "RouterConfig",
    "RouterParts",
    "RoutingOptions",
    "WorkerUrls",
    "build_router",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterParts:
    dispatcher: Dispatcher
    members: Members
    balancer: Balancer | None = None  # with --auto-balance


def build_router(
    config: RouterConfig,
    channel: ChannelConfig,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    api_key: str | None = None,
    tokenizer: GatewayTokenizer | None = None,
) -> RouterParts:
    """Build a dispatcher, and the set of its workers: at first the workers named in the config.

    The caller starts both inside the loop. Raises `ConfigError` for an invalid URL, a worker named twice, and more
    workers than allowed. `transport` fetches /server_info (None: the network). `api_key` is sent to the workers' HTTP
    servers. Workers with another vocabulary than `tokenizer` are refused.
    """
    clock = MonotonicClock()
    registry = Registry(config, tokenizer)
    fleet = Fleet(registry=registry, config=config, channel=channel, clock=clock, transport=transport, api_key=api_key)
    members = Members(
        membership=Membership(max_workers=config.members.max_workers),
        registry=registry,
        links=fleet,
        hosts=HostRule(config.members.allowed_worker_hosts),
        proof=ClusterProof(channel.cluster_key or ""),
        discoveries=[discovery_of(place) for place in config.members.discovery],
        clock=clock,
    )
    urls = config.urls
    num_named = len(urls.worker_urls) + len(urls.prefill) + len(urls.decode)
    if num_named > config.members.max_workers:
        raise ConfigError(f"{num_named} workers are named, and --max-workers is {config.members.max_workers}")
    for named, role in ((urls.worker_urls, None), (urls.prefill, Role.PREFILL), (urls.decode, Role.DECODE)):
        for url in map(normal_url, named):
            if registry.find(url) is not None:
                raise ConfigError(f"the worker {url} is named twice")
            members.name_by_flag(url, role)
    dispatcher = Dispatcher(config=config, registry=registry, engines=fleet, clock=clock)
    routing = config.routing
    rules = BalanceRules(wait_s=routing.auto_balance_wait_s)
    balancer = Balancer(registry, dispatcher, rules, clock) if routing.auto_balance else None
    return RouterParts(dispatcher=dispatcher, members=members, balancer=balancer)
