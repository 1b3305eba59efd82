"""The router: connects the gateway to engines.

Chooses workers (policies, route), tracks them (registry, discovery, fleet), and dispatches requests (dispatch, attempt,
merge).
"""

from __future__ import annotations

import httpx

from kvist.channel import ChannelConfig
from kvist.clock import MonotonicClock
from kvist.request import Role
from kvist.router.config import LinkOptions, RouterConfig, RoutingOptions, WorkerUrls
from kvist.router.discovery import normal_url
from kvist.router.dispatch import Dispatcher
from kvist.router.fleet import Fleet
from kvist.router.registry import GatewayTokenizer, Registry

__all__ = [
    "Dispatcher",
    "GatewayTokenizer",
    "LinkOptions",
    "RouterConfig",
    "RoutingOptions",
    "WorkerUrls",
    "build_dispatcher",
]


def build_dispatcher(
    config: RouterConfig,
    channel: ChannelConfig,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    api_key: str | None = None,
    tokenizer: GatewayTokenizer | None = None,
) -> Dispatcher:
    """Build a dispatcher over the workers named in the config.

    The caller starts it with `await dispatcher.start()` inside the loop. Raises `ConfigError` for an invalid URL or a
    worker named twice. `transport` fetches /server_info (None: the network). `api_key` is sent to the workers' HTTP
    servers. Workers with another vocabulary than `tokenizer` are refused.
    """
    clock = MonotonicClock()
    registry = Registry(config, tokenizer)
    fleet = Fleet(registry=registry, config=config, channel=channel, clock=clock, transport=transport, api_key=api_key)
    named = ((config.urls.worker_urls, None), (config.urls.prefill, Role.PREFILL), (config.urls.decode, Role.DECODE))
    for urls, role in named:
        for url in urls:
            registry.add(normal_url(url), role, clock.now_s())
    return Dispatcher(config=config, registry=registry, engines=fleet, clock=clock)
