"""Leases of prefixes: a request with `EngineRequest.lease`, and no answer, leases its pages once they are computed.

    Submit ──refusal: more than a lease may have, or no room now
       └──► computed, cached ──on_computed──► leased ──► its time is over | LeaseCommand "end" | pages are short

Leases never let other requests wait for good: a request that could not go on beside them ends the lease that would end
first (allocation.py). The ledger is kv/prefix_leases.py.
"""

from __future__ import annotations

from kvist.errors import LeaseNotFound, Overloaded, RequestError
from kvist.kv.cache import PageCache
from kvist.kv.lease import PageLease
from kvist.kv.prefix_leases import PrefixLease, PrefixLeases
from kvist.lease_messages import LeaseAnswer, LeaseCommand, LeaseCounts, LeaseStatus
from kvist.request import EngineRequest, Mode
from kvist.scheduler.active import ActiveRequest
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.timers import TimerKind
from kvist.wire import Submit

Refusal = tuple[str, str]  # error code, message


class Leases:
    """Mutable; its one owner is the scheduler."""

    def __init__(self, context: SchedulerContext, cache: PageCache) -> None:
        self._context = context
        self._cache = cache
        config, num_pages = context.config, cache.num_pages
        self.ledger = PrefixLeases(
            cache,
            max_pages=int(config.max_lease_fraction * num_pages),
            max_owner_pages=int(config.max_lease_fraction_per_key * num_pages),
        )

    # ---------------------------------------------------------------- requests that lease their prompt

    def find_refusal(self, event: Submit) -> Refusal | None:
        """Return why the request gets no lease; None if it will get one, or wants none."""
        request = event.request
        if request.lease is None:
            return None
        num_pages, page_size = request.num_prompt_tokens // self._cache.page_size, self._cache.page_size
        most = self.ledger.limit_for(owner_of(request))
        if event.mode is not Mode.FULL or request.sampling.max_tokens:
            return RequestError.code, "only a request without an answer can lease its prompt"
        if not most:
            return RequestError.code, "this worker leases no pages: start it with a higher --max-lease-fraction"
        if not num_pages:
            length = f"the prompt has {request.num_prompt_tokens} tokens, and a page has {page_size}"
            return RequestError.code, f"{length}: there is no full page to lease"
        if num_pages > most:
            flags = "--max-lease-fraction, --max-lease-fraction-per-key"
            return RequestError.code, f"the prompt has {num_pages} full pages; a lease has at most {most} ({flags})"
        digests = self._cache.page_digests(request.prompt_token_ids, request.cache_salt)
        if self.ledger.has_room(owner_of(request), digests):
            return None
        self._context.count("leases_refused")
        return Overloaded.code, self._no_room

    def on_computed(self, request: ActiveRequest) -> LeaseStatus | Refusal | None:
        """Lease the prompt of a request that has ended. Return the lease, or why there is none; None if it wants
        none."""
        terms = request.request.lease
        if terms is None:
            return None
        owner, ends_at_s = owner_of(request.request), self._context.now_s + terms.ttl_s
        # the lease is there already if the request is repeated because its answer was lost
        lease = self.ledger.get(terms.lease_id, owner) or self.ledger.take(
            terms.lease_id,
            owner,
            request.token_ids[: request.num_prompt],
            cache_salt=request.request.cache_salt,
            ends_at_s=ends_at_s,
        )
        if lease is None:
            self._context.count("leases_refused")
            return Overloaded.code, self._no_room
        self._context.count("leases_granted")
        self._set_end(lease, ends_at_s)
        return self._status(lease)

    @property
    def _no_room(self) -> str:
        ledger = self.ledger
        return (
            f"the leases of this worker hold {ledger.num_pages} of at most {ledger.max_pages} pages "
            f"(--max-lease-fraction), and those of one API key at most {ledger.max_owner_pages} "
            "(--max-lease-fraction-per-key): end a lease, or retry later"
        )

    # ---------------------------------------------------------------- commands and time

    def on_command(self, command: LeaseCommand) -> None:
        """Answer a command about the leases of one owner."""
        out, ledger = self._context.out.lease_answers, self.ledger
        if command.action == "list" and not command.lease_id:
            found = [self._status(each) for each in ledger if each.owner == command.owner]
            out.append(LeaseAnswer(call_id=command.call_id, leases=tuple(found)))
            return
        lease = ledger.get(command.lease_id, command.owner)
        if lease is None:
            message = "this worker has no such lease: it has ended, or the worker has restarted. Lease the prompt again"
            out.append(LeaseAnswer(call_id=command.call_id, error_code=LeaseNotFound.code, message=message))
            return
        if command.action == "renew":
            self._context.count("leases_renewed")
            self._set_end(lease, self._context.now_s + command.ttl_s)
        out.append(LeaseAnswer(call_id=command.call_id, leases=(self._status(lease),)))
        if command.action == "end":
            self._end(lease)

    def on_time(self, lease_id: str) -> None:
        """End a lease whose time is over."""
        lease = self.ledger.find(lease_id)
        assert lease is not None, "the timer of a lease ends with it"
        self._context.count("leases_expired")
        self._end(lease)

    def make_room(self, pages: PageLease, num_needed: int) -> bool:
        """End one lease if a request, which has these cached pages and needs further ones, could not have them beside
        the leases, even alone. Return whether a lease ended."""
        num_pinned = self.ledger.num_pages + pages.pin.num_pages - self.ledger.num_leased_in(pages)
        return num_needed > self._cache.num_pages - num_pinned and self.give_up()

    def give_up(self) -> bool:
        """End the lease that would end first, because a request needs its pages. Return whether there was one."""
        lease = self.ledger.soonest()
        if lease is None:
            return False
        self._context.count("leases_given_up")
        self._end(lease)
        return True

    def counts(self) -> LeaseCounts:
        ledger = self.ledger
        return LeaseCounts(num_leases=len(ledger), num_pages=ledger.num_pages, max_pages=ledger.max_pages)

    def _set_end(self, lease: PrefixLease, ends_at_s: float) -> None:
        lease.ends_at_s = ends_at_s
        self._context.timers.set(TimerKind.LEASE, lease.lease_id, ends_at_s)

    def _end(self, lease: PrefixLease) -> None:
        self._context.timers.cancel(TimerKind.LEASE, lease.lease_id)
        self.ledger.end(lease)

    def _status(self, lease: PrefixLease) -> LeaseStatus:
        return LeaseStatus(
            lease_id=lease.lease_id,
            num_pages=len(lease.digests),
            num_tokens=len(lease.digests) * self._cache.page_size,
            left_s=lease.ends_at_s - self._context.now_s,
        )


def owner_of(request: EngineRequest) -> str:
    """Return the API key that the leases of a request are charged to, as a caller path names it; "" without keys."""
    return request.client.partition("/")[0]
