"""PURE interface of a routing policy: chooses a worker for a request. The policies are in router/policies/.

A policy gets `WorkerView`s of the workers that can serve the request now, never of lost or full ones. Equal views in an
equal order of calls give equal choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from kvist.request import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDigests:
    """A prompt, as a policy sees it."""

    num_tokens: int
    digests: Mapping[str, Sequence[bytes]]  # by namespace of a worker: one per full page, in order
    hit_weight: float = 1.0  # saving of a cached token, in computed tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    worker_id: WorkerId
    namespace: str
    page_size: int  # tokens
    num_requests: int  # running or waiting there
    num_pending_tokens: int  # prompt tokens sent there by this gateway and not known to be computed
    cached_pages: AbstractSet[bytes]  # digests


class Policy(Protocol):
    def choose(self, prompt: PromptDigests, candidates: Sequence[WorkerView]) -> WorkerId:
        """Return the id of one candidate. `candidates` is not empty."""


def num_hit_tokens(prompt: PromptDigests, worker: WorkerView) -> int:
    """Return the number of tokens in the longest leading run of pages that the worker has cached."""
    num_pages = 0
    for digest in prompt.digests.get(worker.namespace, ()):
        if digest not in worker.cached_pages:
            break
        num_pages += 1
    return num_pages * worker.page_size
