"""The events of a scheduler: messages as they arrived, and reports on finished steps, transfers and tier jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvist.plan.tiers import TierReport
from kvist.plan.transfers import PeerDied, TransferReport
from kvist.request import SampledToken, TokenLogprobs
from kvist.wire import Abort, FlushCache, SourceToTarget, Submit, TargetToSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """The tokens sampled by a step, a row for each batch item with `samples`, in their order.

    Columns instead of an object a row: with hundreds of rows a step, creating the objects would cost more than passing
    the results on."""

    token_ids: Sequence[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)  # by row, for requests with logprobs
    # of the scored tokens of items with `score_from`, by the item's index in the batch
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    invalid_rows: frozenset[int] = frozenset()  # logits were NaN or infinite: `token_ids` has no valid token there

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, row: int) -> SampledToken:
        return SampledToken(token_id=self.token_ids[row], logprobs=self.logprobs.get(row))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """The batch of an earlier plan is finished: its K/V is in the pages, and these tokens were sampled.

    Batches are reported in the order of their plans."""

    step_id: int
    sampled: SampledTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """The batch raised an error. Its requests fail; the pages it wrote are not trusted. A batch that was started after
    the failed one is reported too; its results for the failed requests are ignored."""

    step_id: int
    message: str


StepReport = StepFinished | StepFailed
Event = (
    Submit | Abort | FlushCache | TargetToSource | SourceToTarget | StepReport | TransferReport | PeerDied | TierReport
)
