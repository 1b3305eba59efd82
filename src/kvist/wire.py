"""The typed messages between processes: msgspec MessagePack, one union per direction, strict decode, never pickle.

    gateway → engine   Hello Submit Abort FlushCache StorageCommand
    engine → gateway   Welcome StepOutputs LoadReport Flushed StorageAnswer
    decode → prefill   Grant Ack Revoke            (docs/handoff.md tells the protocol)
    prefill → decode   Done Closed

Every engine binds one ROUTER socket; gateways and decode engines connect DEALER sockets to it. A message that cannot
be decoded is logged and dropped by its receiver: its sender's own bounded wait then reports the failure.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from kvist.errors import WireError
from kvist.request import (
    EngineRequest,
    EpochId,
    FinishReason,
    HandoffId,
    Mode,
    Outcome,
    RequestId,
    SampledToken,
    TokenLogprobs,
    WorkerId,
)

PROTOCOL_VERSION = 2


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    pass


# ---------------------------------------------------------------- gateway → engine


FlushTier = Literal["device", "host"]


class Hello(_Message, frozen=True):
    """First message and keep-alive. An engine that has not heard one for `gateway_timeout_s` aborts the gateway's
    requests. `resync` asks for all cached page digests again."""

    gateway_id: str
    protocol_version: int = PROTOCOL_VERSION
    resync: bool = False


class PrefillPeer(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prefill half of a request runs; sent to the decode engine."""

    worker_id: WorkerId
    endpoint: str  # the prefill engine's ROUTER address
    epoch: EpochId


class Submit(_Message, frozen=True):
    request: EngineRequest
    mode: Mode
    handoff_id: HandoffId | None = None  # set for PREFILL and DECODE
    prefill: PrefillPeer | None = None  # set for DECODE
    target_epoch: EpochId | None = None  # set for PREFILL: the decode life whose Grant will be honoured, and no other's


class Abort(_Message, frozen=True):
    """The client left. Unknown ids are ignored: the request may have ended already."""

    request_id: RequestId


class FlushCache(_Message, frozen=True):
    """Drop every cached page that no request uses. Answered by `Flushed`, when no restart can bring them back."""

    call_id: str
    tier: FlushTier | None = None  # None: the device and the host


class AttachStoreRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The body of `PUT /hicache/storage-backend`, with SGLang's names. What is None is as the engine's flags say."""

    hicache_storage_backend: str | None = None
    hicache_storage_path: str | None = None
    hicache_storage_size: float | None = None  # GB
    hicache_storage_prefetch_policy: str | None = None


class StorageCommand(_Message, frozen=True):
    """Tell of the storage tier, attach a store to it, or detach it. Answered by `StorageAnswer`."""

    call_id: str
    action: Literal["status", "attach", "detach"]
    wish: AttachStoreRequest = AttachStoreRequest()


# ---------------------------------------------------------------- engine → gateway


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway must know of an engine before it sends a request. Also in `/server_info`."""

    worker_id: WorkerId
    epoch: EpochId
    role: str  # "unified" | "prefill" | "decode"
    endpoint: str
    model_fingerprint: str
    tokenizer_fingerprint: str = ""  # of the model's own vocabulary; "": not known
    model_name: str
    vocab_size: int
    max_model_len: int  # tokens, prompt and answer together
    page_size: int  # tokens
    num_pages: int
    namespace: str  # prefix of every page digest: same tokens and same namespace, same page
    dtype: str
    tp_size: int
    max_running_requests: int
    max_queued_requests: int


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent of an engine process knows of it. In `/server_info`, beside the spec."""

    turn_s: float = 0.0  # how long the loop's turn has lasted; a step of a large model on a CPU may take long
    stalled_s: float = 0.0  # how long there has been no sign of progress: the process is stopped, or its loop hangs
    problem: str = ""  # why there is no engine now, for people
    doing: str = ""  # while it starts, for people: "loading weights 40%"


class Welcome(_Message, frozen=True):
    """Answer to `Hello`; sent once the engine can produce tokens."""

    spec: EngineSpec
    protocol_version: int = PROTOCOL_VERSION


class HandoffReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one handoff moved, as the decode engine saw it."""

    num_pages: int  # pages written by prefill
    num_pages_reused: int  # pages decode already had
    num_bytes: int
    duration_s: float  # grant sent → pages verified
    wait_s: float  # of that: Done received → pages verified (what the stream waited for beyond prefill)


class TokenChunk(_Message, frozen=True, tag=False, gc=False):  # hundreds in each step; none holds another
    """Consecutive output tokens of one request. `position` counts output tokens from 0, across engines, so that the
    gateway can merge and de-duplicate what prefill and decode send."""

    request_id: RequestId
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one a token, when asked for
    finish_reason: FinishReason | None = None  # with STOP the last token is the stop token
    num_cached_tokens: int | None = None  # with position 0: prompt tokens not computed, by the engine that computed
    num_cached_host_tokens: int = 0  # of those: from the host tier, and
    num_cached_storage_tokens: int = 0  # from the storage tier; the rest was in the device pool
    handoff: HandoffReport | None = None  # with decode's first chunk


class Ended(_Message, frozen=True, tag=False):
    """The request is over at this engine; exactly one for each `Submit` that arrived."""

    request_id: RequestId
    outcome: Outcome
    error_code: str | None = None  # errors.py's code, with FAILED
    message: str = ""
    retry_after_s: float | None = None


class StepOutputs(_Message, frozen=True):
    """All that one engine step has for one gateway: one message, however many streams it advances."""

    chunks: tuple[TokenChunk, ...] = ()
    ended: tuple[Ended, ...] = ()


class StorageStatus(_Message, frozen=True, tag=False):
    """The storage tier of one engine."""

    hicache_storage_backend: str | None  # None: no store is attached
    hicache_storage_path: str | None
    hicache_storage_size: float  # GB
    hicache_storage_prefetch_policy: str
    state: str  # "detached" | "attaching" | "attached" | "detaching"
    breaker: str  # "closed" | "open" | "half_open"
    num_quarantined_pages: int  # host pages that calls which hang may still touch
    stored_bytes: int  # everybody's, as of the last call of the store
    errors: dict[str, int]  # by the name of the errno
    note: str = ""  # for people


PageDigest = Annotated[bytes, msgspec.Meta(max_length=32)]  # 32 bytes; a gateway remembers many


class LoadReport(_Message, frozen=True):
    """Sent at least once a second, and with the step in which the cached pages changed.

    `sequence` grows by one each report to one gateway; a gap, or `snapshot`, means the digest set must be replaced.
    Counters in `totals` only grow (see metrics.py for the names).
    """

    sequence: int
    num_running: int
    num_waiting: int
    num_free_pages: int
    num_cached_pages: int
    num_owned_pages: int
    num_in_flight_pages: int
    service_s: float | None = None  # of a request lately, from its first turn to its end
    num_host_pages: dict[str, int] = {}  # by state: free, cached, in_flight; empty without a host tier
    storage: StorageStatus | None = None  # None without a host tier
    draining: bool = False  # it takes no new request, and ends after its last one
    snapshot: bool = False
    cached_added: tuple[PageDigest, ...] = ()
    cached_removed: tuple[PageDigest, ...] = ()
    totals: dict[str, float] = {}


class Flushed(_Message, frozen=True):
    call_id: str
    num_pages: int


class StorageAnswer(_Message, frozen=True):
    call_id: str
    status: StorageStatus | None = None  # None: refused, or it failed
    error_code: str | None = None  # errors.py's
    message: str = ""
    param: str | None = None


# ---------------------------------------------------------------- decode → prefill


class PoolAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a page pool can be written by a peer. `transport` names the door ("shm", "cuda-ipc"); `location`
    is its own address (for both: the path of the pool's file)."""

    transport: str
    location: str
    num_pages: int
    page_bytes: int
    layout: str  # kv/layout.py's description; both sides must agree


class Grant(_Message, frozen=True):
    """Decode's leave to write. `page_ids` are decode's pages for prompt pages [first_page, first_page + len)."""

    handoff_id: HandoffId
    request_id: RequestId
    target_epoch: EpochId  # decode's life
    source_epoch: EpochId  # the prefill life this is meant for
    pool: PoolAddress
    first_page: int  # pages [0, first_page) are already in decode's cache
    page_ids: tuple[int, ...]


class Ack(_Message, frozen=True):
    """The pages arrived and were verified: prefill may let go of its own."""

    handoff_id: HandoffId
    target_epoch: EpochId


class Revoke(_Message, frozen=True):
    """Stop writing and say `Closed`; until then decode keeps the pages out of use."""

    handoff_id: HandoffId
    target_epoch: EpochId  # who to answer, even when the handoff is not known
    reason: str
    cancelled: bool = False  # the request was aborted at decode: nothing has failed


# ---------------------------------------------------------------- prefill → decode


class Done(_Message, frozen=True):
    """Every granted page is written. Repeated until acknowledged; receiving it twice is harmless."""

    handoff_id: HandoffId
    target_epoch: EpochId
    source_epoch: EpochId
    num_pages: int
    checksum: str  # transfer.checksum over the written pages, in order
    first_token: SampledToken
    finish_reason: FinishReason | None = None  # set: the first token was the last


class Closed(_Message, frozen=True):
    """No byte will be written for this handoff any more: refused, failed, or in answer to `Revoke`. Also the answer
    to a Grant or Revoke for a handoff that prefill does not know."""

    handoff_id: HandoffId
    target_epoch: EpochId
    source_epoch: EpochId
    error_code: str | None = None  # None: the request was aborted at prefill, or the handoff was acknowledged before
    message: str = ""


GatewayToEngine = Hello | Submit | Abort | FlushCache | StorageCommand
EngineToGateway = Welcome | StepOutputs | LoadReport | Flushed | StorageAnswer
TargetToSource = Grant | Ack | Revoke
SourceToTarget = Done | Closed
ToEngine = GatewayToEngine | TargetToSource  # what an engine's ROUTER socket receives


def encode(message: GatewayToEngine | EngineToGateway | TargetToSource | SourceToTarget) -> bytes:
    return msgspec.msgpack.encode(message)


class Decoder:
    """Decodes one direction's union. Raises `WireError` on anything that is not exactly one of its messages."""

    def __init__(self, union: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(type=union)

    def decode(self, payload: bytes | memoryview) -> object:
        try:
            return self._decoder.decode(payload)
        except Exception as error:  # msgspec's own, and UnicodeDecodeError, RecursionError, OverflowError, MemoryError
            message = f"cannot decode a message of {len(payload)} bytes: {type(error).__name__}: {error}"
            raise WireError(message) from None
