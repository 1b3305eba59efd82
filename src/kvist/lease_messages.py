"""The messages about leased prefixes between a gateway and an engine. kv/prefix_leases.py has the leases themselves."""

from __future__ import annotations

from typing import Literal

import msgspec


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A leased prefix."""

    lease_id: str
    num_pages: int
    num_tokens: int
    left_s: float  # until the lease ends, unless it is renewed


class LeaseCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The leases of one engine."""

    num_leases: int = 0
    num_pages: int = 0  # different leased pages, a part of the cached ones
    max_pages: int = 0


class LeaseCommand(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Renew or end a lease, or list one lease or (`lease_id` "") all leases of an owner. Answered by `LeaseAnswer`."""

    call_id: str
    action: Literal["renew", "end", "list"]
    owner: str  # as the first name of `EngineRequest.client`
    lease_id: str = ""
    ttl_s: float = 0.0  # with "renew": from now on


class LeaseAnswer(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    call_id: str
    leases: tuple[LeaseStatus, ...] = ()  # an ended lease as it was before
    error_code: str | None = None  # of errors.py: there is no such lease
    message: str = ""
