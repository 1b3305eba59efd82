"""The output of a scheduler: one `Plan` per step. The engine loop carries the plan out in the order of its fields."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.lease_messages import LeaseAnswer
from kvist.plan.batch import Batch
from kvist.plan.grammars import CompileGrammar
from kvist.plan.tiers import TierJob
from kvist.plan.transfers import StopWrites, ToSource, ToTarget, VerifyPages, WritePages
from kvist.request import EpochId
from kvist.wire import Ended, PageTier, TokenChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Flush:
    """The answer to a `FlushCache`: the flush is complete."""

    call_id: str
    num_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedPages:
    """The pages that entered and left one tier, net: a digest is in one of the two at most."""

    tier: PageTier
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenInStore:
    """Digests that were stored in the store or found there, and digests that were not found there."""

    found: tuple[bytes, ...] = ()
    missing: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    chunks: tuple[TokenChunk, ...] = ()  # to the gateways
    ended: tuple[Ended, ...] = ()
    flushes: tuple[Flush, ...] = ()
    lease_answers: tuple[LeaseAnswer, ...] = ()
    messages: tuple[ToSource | ToTarget, ...] = ()  # to peer engines
    transfers: tuple[WritePages | VerifyPages | StopWrites, ...] = ()
    tier_jobs: tuple[TierJob, ...] = ()  # copies between device pool, host tier and store
    grammar_jobs: tuple[CompileGrammar, ...] = ()
    watched_epochs: frozenset[EpochId] = frozenset()  # peers whose death must be reported
    changed_pages: tuple[ChangedPages, ...] = ()  # in this step, at most one for each tier
    seen_in_store: SeenInStore | None = None
    batch: Batch | None = None  # to be launched; runs after the pending batch, if any
    wake_at_s: float | None = None  # the latest time of the next call of `step`
