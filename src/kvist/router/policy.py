"""PURE interface of a routing policy: chooses a worker for a request. The policies are in router/policies/.

A policy gets `WorkerView`s of the workers that can serve the request now, never of lost or full ones. Equal views in an
equal order of calls give equal choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvist.request import WorkerId
from kvist.router.prefix_index import HeldPages


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, as a policy sees it."""

    num_tokens: int
    hit_weight: float = 1.0  # saving of a cached token, in computed tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    worker_id: WorkerId
    page_size: int  # tokens
    num_requests: int  # running or waiting there
    num_pending_tokens: int  # prompt tokens sent there by this gateway and not known to be computed
    num_known_pages: int  # cached there, by the index
    held: HeldPages  # the leading pages of the prompt that the worker has cached

    @property
    def num_hit_tokens(self) -> int:
        return self.held.num_pages * self.page_size


class Policy(Protocol):
    def choose(self, prompt: Prompt, candidates: Sequence[WorkerView]) -> WorkerId:
        """Return the id of one candidate. `candidates` is not empty."""
