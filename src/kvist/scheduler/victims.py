"""Chooses the requests that lose their pages and places to others: one order, for every reason.

    ungranted PREFILLs ──► the highest `priority` value ──► the key with the most places for its weight ──► the youngest

A running request loses its pages to another running request that needs a page, or to a claimant. A claimant is the
head of the queue, without a free place or without pages, if it has a lower `priority` value than the victim; or the
same, and its API key has fewer places for its weight: after the exchange not more than the victim's key (shares.py).
Two keys thus never take places from each other in turn, and the requests of one key take none from each other.

A request that lost its place to a claimant keeps the next one until it has sampled 16 tokens, or an eighth of the
tokens that were computed again for it. Therefore claims are bounded by the tokens that are sampled.
"""

from __future__ import annotations

from collections import Counter

from kvist.request import Mode
from kvist.scheduler.active import ActiveRequest
from kvist.scheduler.states import Requests

_LEAST_PROGRESS = 16  # tokens between two claims of a request's place
_PROGRESS_FRACTION = 8  # at least 1/8 of the tokens that were computed again


class Victims:
    """Mutable; its one owner is the allocator, which preempts the requests."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._shares = requests.shares

    def ungranted(self) -> ActiveRequest | None:
        """Return the least urgent ungranted PREFILL with pages."""
        running, computed = self._requests.running, self._requests.awaiting_transfer
        if not running.num_prefills and not len(computed):
            return None  # most engines run hundreds of requests and no PREFILL
        ungranted = [each for each in (*running, *computed) if each.ungranted]
        return max(ungranted, key=lambda request: request.urgency, default=None)

    def for_page_of(self, request: ActiveRequest) -> ActiveRequest | None:
        """Return the running request, perhaps `request` itself, whose pages `request` gets; None if only one request
        grows.

        Requests are added to a batch most urgent first, and `request` is not in it yet: only it and less urgent ones
        can be victims. The most urgent of all never is: its key has another place, or no key has more than one."""
        running = self._requests.running
        if running.num_growing <= 1:
            return None
        urgency = request.urgency
        candidates = [each for each in running if each.mode is not Mode.PREFILL and each.urgency >= urgency]
        return max(candidates, key=lambda each: self._rank(each, Counter()))

    def for_claimant(self, claimant: ActiveRequest, num_pages: int) -> list[ActiveRequest]:
        """Return the running requests that lose their places to a waiting one: at least one, and further ones until
        they have `num_pages` together, with those in reserve for them. Return none if it may not have that many."""
        if not self._may_claim(claimant):
            return []
        victims: list[ActiveRequest] = []
        taken: Counter[str] = Counter()  # places by key
        candidates = [each for each in self._requests.running if each.mode is not Mode.PREFILL and not _is_kept(each)]
        # no page is kept in reserve for a victim any more
        while not victims or sum(len(each.page_ids) + 1 for each in victims) < num_pages:
            candidates = [each for each in candidates if self._gives_way(each, claimant, taken)]
            if not candidates:
                return []
            victim = max(candidates, key=lambda each: self._rank(each, taken))
            candidates.remove(victim)
            victims.append(victim)
            taken[victim.caller[0]] += 1
        return victims

    def _may_claim(self, claimant: ActiveRequest) -> bool:
        """Return False if no running request gives way, in the usual cases without a look at each."""
        if claimant.ungranted or not len(self._requests.running):
            return False
        if self._requests.running.least_urgent.priority > claimant.priority:
            return True
        return self._shares.greatest_with_one_less() >= self._shares.with_more(claimant.caller[0], 1)

    def _gives_way(self, running: ActiveRequest, claimant: ActiveRequest, taken: Counter[str]) -> bool:
        if running.priority != claimant.priority:
            return running.priority > claimant.priority
        left = self._shares.with_more(running.caller[0], -1 - taken[running.caller[0]])
        return running.caller[0] != claimant.caller[0] and left >= self._shares.with_more(claimant.caller[0], 1)

    def _rank(self, request: ActiveRequest, taken: Counter[str]) -> tuple[int, float, int]:
        left = self._shares.with_more(request.caller[0], -1 - taken[request.caller[0]])
        return request.priority, left, request.number


def keep_place(request: ActiveRequest) -> None:
    """Record that the request begins to run: if it has lost a place, it keeps this one for a while."""
    if request.lost_place:
        num_again = len(request.token_ids) - request.num_computed
        request.kept_until = len(request.token_ids) + max(_LEAST_PROGRESS, num_again // _PROGRESS_FRACTION)


def _is_kept(request: ActiveRequest) -> bool:
    return len(request.token_ids) < request.kept_until
