"""Collects the decisions of one step, which become its `Plan`."""

from __future__ import annotations

from kvist.lease_messages import LeaseAnswer
from kvist.plan.batch import Batch
from kvist.plan.grammars import CompileGrammar
from kvist.plan.plan import ChangedPages, Flush, Plan, SeenInStore
from kvist.plan.tiers import TierJob
from kvist.plan.transfers import StopWrites, ToSource, ToTarget, VerifyPages, WritePages
from kvist.request import EpochId
from kvist.wire import Ended, SourceToTarget, TargetToSource, TokenChunk


class Outbox:
    """Mutable; filled by all parts of one scheduler, emptied by `take` at the end of each step."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.chunks: list[TokenChunk] = []
        self.num_tokenless_chunks = 0  # prompt logprobs, and the ends of requests with `max_tokens` 0
        self.ended: list[Ended] = []
        self.flushes: list[Flush] = []
        self.lease_answers: list[LeaseAnswer] = []
        self.messages: list[ToSource | ToTarget] = []
        self.transfers: list[WritePages | VerifyPages | StopWrites] = []
        self.grammar_jobs: list[CompileGrammar] = []

    def to_source(self, endpoint: str, message: TargetToSource, *, repeated: bool = False) -> None:
        self.messages.append(ToSource(endpoint=endpoint, message=message, repeated=repeated))

    def to_target(self, target_epoch: EpochId, message: SourceToTarget) -> None:
        self.messages.append(ToTarget(target_epoch=target_epoch, message=message))

    def take(
        self,
        *,
        batch: Batch | None,
        tier_jobs: list[TierJob],
        watched_epochs: frozenset[EpochId],
        changed_pages: tuple[ChangedPages, ...],
        seen_in_store: SeenInStore | None,
        wake_at_s: float | None,
    ) -> Plan:
        plan = Plan(
            chunks=tuple(self.chunks),
            ended=tuple(self.ended),
            flushes=tuple(self.flushes),
            lease_answers=tuple(self.lease_answers),
            messages=tuple(self.messages),
            transfers=tuple(self.transfers),
            tier_jobs=tuple(tier_jobs),
            grammar_jobs=tuple(self.grammar_jobs),
            watched_epochs=watched_epochs,
            changed_pages=changed_pages,
            seen_in_store=seen_in_store,
            batch=batch,
            wake_at_s=wake_at_s,
        )
        self._clear()
        return plan
