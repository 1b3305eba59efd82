"""The routing policies, one file each. policy.py has their interface."""

from __future__ import annotations

from kvist.door import Door, backend, backend_with
from kvist.router.policies.by_worker import ByWorker
from kvist.router.policies.cache_aware import CacheAware, CacheAwareOptions
from kvist.router.policies.cost import Cost
from kvist.router.policies.least_loaded import LeastLoaded
from kvist.router.policies.round_robin import RoundRobin
from kvist.router.policy import Policy

POLICIES: Door[[], Policy] = {
    "cache_aware": backend_with(
        CacheAwareOptions, lambda options: ByWorker(lambda: CacheAware(options)), text="by cached prefix and load"
    ),
    "cost": backend(Cost, text="by the time that each route takes, from measured rates; one worker or two"),
    "least_loaded": backend(lambda: ByWorker(LeastLoaded), text="by load alone"),
    "round_robin": backend(lambda: ByWorker(RoundRobin), text="each worker in turn"),
}
