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

    A row is nearly always one token. A row of several tokens continues the sequence with all of them, although K/V is
    computed only up to the item's `end`. No pending batch may continue an item with such a row.

    The data is in columns: with hundreds of rows in a step, creating an object for each row would cost more than all
    other work on the results."""

    token_ids: Sequence[int]  # of all rows, one row after the other
    num_tokens: Sequence[int] | None = None  # of each row, at least 1; None: every row is one token
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)  # by index in token_ids, if requested
    # logprobs of the scored tokens of items with `score_from`, by the item's index in the batch
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    invalid_rows: frozenset[int] = (
        frozenset()
    )  # rows without a valid token: NaN or infinite logits, or every token was banned
    # by row: why its constraint cannot be followed any further; these rows have no valid token either
    constraint_errors: Mapping[int, str] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) if self.num_tokens is None else len(self.num_tokens)

    def rows(self, first: int = 0) -> Iterator[tuple[SampledToken, ...]]:
        """Yield the tokens of each row from `first` on."""
        counts = self.num_tokens
        if counts is None:
            for index in range(first, len(self.token_ids)):
                yield (self[index],)
            return
        start = sum(counts[:first])
        for count in counts[first:]:
            yield tuple(self[index] for index in range(start, start + count))
            start += count

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: int) -> SampledToken:
        return SampledToken(token_id=self.token_ids[index], logprobs=self.logprobs.get(index))


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
