"""What a scheduler is told: messages as they came, and what the worker loop says of finished steps and transfers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvist.kv.moves import TierReport
from kvist.request import EpochId, HandoffId, SampledToken, TokenLogprobs
from kvist.wire import Abort, FlushCache, SourceToTarget, Submit, TargetToSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What a step chose: a token for each batch item with `sampling`, in their order. Columns, since an object for each
    of hundreds in each step would cost more than to tell them."""

    token_ids: Sequence[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)  # by place, of those that want them
    invalid_rows: frozenset[int] = frozenset()  # their logits were no numbers, so what `token_ids` has there is none

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, place: int) -> SampledToken:
        return SampledToken(token_id=self.token_ids[place], logprobs=self.logprobs.get(place))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """The batch of an earlier plan was carried out: its K/V is in the pages, and these tokens were chosen.

    Batches are reported in the order of their plans."""

    step_id: int
    sampled: SampledTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """The batch raised. Its requests fail; the pages it wrote are not trusted. One that was begun behind it is reported
    too: what it computed for those requests is ignored."""

    step_id: int
    message: str


# ---- handoff, prefill side


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesCompleted:
    """Every write asked for so far with this id up to `num_pages` in all is in the peer's pool."""

    handoff_id: HandoffId
    num_pages: int  # cumulative
    checksum: str  # over those pages, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesFailed:
    """The transport gave up; no more bytes will be written for this handoff."""

    handoff_id: HandoffId
    message: str


# ---- handoff, decode side


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesVerified:
    handoff_id: HandoffId
    checksum: str  # over the granted pages as they now are in our pool


# ---- both


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDied:
    """The process with this epoch is certainly gone: it can neither write nor read any more."""

    epoch: EpochId


StepReport = StepFinished | StepFailed
TransferReport = WritesCompleted | WritesFailed | PagesVerified
Event = (
    Submit | Abort | FlushCache | TargetToSource | SourceToTarget | StepReport | TransferReport | PeerDied | TierReport
)
