"""The events of a scheduler: received messages, and reports on finished steps, transfers and tier jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvist.plan.grammars import GrammarCompiled
from kvist.plan.tiers import TierReport
from kvist.plan.transfers import PeerDied, TransferReport
from kvist.request import Mode, Role, SampledToken, TokenLogprobs
from kvist.wire import SourceToTarget, TargetToSource, ToScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """The tokens sampled by a step: one row for each batch item with `samples`, in the order of the items.

    A row is one token, and nearly always nothing else. Further tokens of a row continue the sequence, although K/V is
    computed only up to the item's `end`. A pending batch that continues such an item samples the same tokens again.

    The data is in columns: with hundreds of rows in a step, creating an object for each row would cost more than all
    other work on the results."""

    token_ids: Sequence[int]  # the first token of each row
    following: Mapping[int, Sequence[int]] = field(default_factory=dict)  # by row: its further tokens, at least one
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)  # by row, of its first token, if requested
    # logprobs of the scored tokens of items with `score_from`, by the item's index in the batch
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    invalid_rows: frozenset[int] = (
        frozenset()
    )  # rows without a valid token: NaN or infinite logits, or every token was banned
    # by row: why its constraint cannot be followed any further; these rows have no valid token either
    constraint_errors: Mapping[int, str] = field(default_factory=dict)

    def row(self, row: int) -> tuple[SampledToken, ...]:
        """Return the tokens of a row."""
        first = SampledToken(token_id=self.token_ids[row], logprobs=self.logprobs.get(row))
        return (first, *(SampledToken(token_id=token_id) for token_id in self.following.get(row, ())))

    def rows(self, first: int = 0) -> Iterator[tuple[SampledToken, ...]]:
        """Yield the tokens of each row from `first` on."""
        return map(self.row, range(first, len(self.token_ids)))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """The batch of an earlier plan is finished: its K/V is in the pages, and these tokens were sampled.

    Batches are reported in the order of their plans."""

    step_id: int
    sampled: SampledTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """The batch raised an error: its requests fail, and the pages that it wrote are not used. A batch that was launched
    after the failed one is reported too; its results for the failed requests are ignored."""

    step_id: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChanged:
    """The engine's role, or the modes that it admits, are other ones from now on. Requests that run end as they are."""

    role: Role
    modes: frozenset[Mode]  # of new requests: those of the role, and of earlier roles that gateways still follow
    usual_step_tokens: int | None = None  # as `SchedulerConfig.chunked_prefill_size`; None: as before


StepReport = StepFinished | StepFailed
Event = (
    RoleChanged
    | ToScheduler
    | TargetToSource
    | SourceToTarget
    | StepReport
    | TransferReport
    | PeerDied
    | TierReport
    | GrammarCompiled
)
