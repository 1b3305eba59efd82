"""The queue of requests without pages: strictly first come, first served within a rank.

Rank 0 may claim pages: everything but an eager PREFILL (one whose Grant has not come), which is rank 1 and is looked
at only when rank 0 is empty. A preempted request keeps its arrival number, so it returns to the head.
"""

from __future__ import annotations

import heapq

from kvist.scheduler.active import ActiveRequest, RequestState


class WaitingQueue:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, ActiveRequest]] = []  # rank, number, ticket, request
        self._tickets = 0
        self._size = 0
        self.num_tokens = 0  # of all that wait to be computed here

    def __len__(self) -> int:
        return self._size

    def push(self, request: ActiveRequest) -> None:
        """Also moves a request that waits already to the rank it has now."""
        if request.ticket == 0:
            self._size += 1
            self.num_tokens += _num_to_compute(request)
        self._tickets += 1
        request.ticket = self._tickets
        heapq.heappush(self._heap, (int(request.eager), request.number, request.ticket, request))

    def head(self) -> ActiveRequest | None:
        while self._heap:
            _, _, ticket, request = self._heap[0]
            if request.ticket == ticket:
                assert request.state is RequestState.WAITING
                return request
            heapq.heappop(self._heap)  # moved or removed since
        return None

    def remove(self, request: ActiveRequest) -> None:
        if request.ticket:
            request.ticket = 0
            self._size -= 1
            self.num_tokens -= _num_to_compute(request)


def _num_to_compute(request: ActiveRequest) -> int:
    """The pages of a request that waits for granted ones are computed by another engine."""
    return 0 if request.awaits_grant_of_pages else len(request.token_ids)
