"""The routing policies, one file each. policy.py has their interface.

The router makes two of the configured policy: one chooses the worker for prefill or the unified worker, the other the
worker for decode.
"""

from __future__ import annotations

from kvist.door import Door, backend, backend_with
from kvist.router.policies.cache_aware import CacheAware, CacheAwareOptions
from kvist.router.policies.least_loaded import LeastLoaded
from kvist.router.policies.round_robin import RoundRobin
from kvist.router.policy import Policy

POLICIES: Door[[], Policy] = {
    "cache_aware": backend_with(CacheAwareOptions, CacheAware, text="by cached prefix and load"),
    "least_loaded": backend(LeastLoaded, text="by load alone"),
    "round_robin": backend(RoundRobin, text="each worker in turn"),
}
