"""The events of a scheduler: messages as they arrived, and reports on finished steps, transfers and tier jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvist.kv.moves import TierReport
from kvist.request import EpochId, HandoffId, SampledToken, TokenLogprobs
from kvist.wire import Abort, FlushCache, SourceToTarget, Submit, TargetToSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """The tokens sampled by a step, a row for each batch item with `sampling`, in their order.

    Columns instead of an object a row: with hundreds of rows a step, creating the objects would cost more than passing
    the results on."""

    token_ids: Sequence[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)  # by row, for requests with logprobs
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


# ---- handoff, prefill side


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesCompleted:
    """The first `num_pages` pages requested so far for this handoff are in the peer's pool."""

    handoff_id: HandoffId
    num_pages: int  # cumulative
    checksum: str  # over those pages, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesFailed:
    """The transport failed; it writes no more bytes for this handoff."""

    handoff_id: HandoffId
    message: str


# ---- handoff, decode side


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesVerified:
    handoff_id: HandoffId
    checksum: str  # over the granted pages as they are in our pool now


# ---- both


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDied:
    """The process with this epoch is certainly dead: it can neither write nor read any more."""

    epoch: EpochId


StepReport = StepFinished | StepFailed
TransferReport = WritesCompleted | WritesFailed | PagesVerified
Event = (
    Submit | Abort | FlushCache | TargetToSource | SourceToTarget | StepReport | TransferReport | PeerDied | TierReport
)
