"""The typed messages between processes: msgspec MessagePack, one union per direction, strict decode, never pickle.

    gateway → engine   Hello ListPages Submit SubmitTogether Abort FlushCache StorageCommand SetRole LeaseCommand
    engine → gateway   Welcome StepOutputs LoadReport PageEvents Flushed StorageAnswer RoleAnswer LeaseAnswer
    decode → prefill   Grant Ack Revoke            (protocol: docs/handoff.md)
    prefill → decode   Done Closed

Every engine binds one ROUTER socket; gateways and decode engines connect DEALER sockets to it. A receiver logs and
drops a message that it cannot decode; the sender's own bounded wait then reports the failure. Versions: protocol.py.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from kvist.errors import WireError
from kvist.flight.handoff_report import HandoffReport, StoredPages
from kvist.flight.stages import StageTime
from kvist.lease_messages import LeaseAnswer, LeaseCommand, LeaseCounts, LeaseStatus
from kvist.pool_status import WatchedPool
from kvist.protocol import PROTOCOL_VERSION
from kvist.request import (
    FCFS,
    REQUEST_FIELDS,
    EngineRequest,
    EpochId,
    FinishReason,
    HandoffId,
    Mode,
    Outcome,
    RequestId,
    Role,
    SampledToken,
    TokenLogprobs,
    WorkerId,
)


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True): ...


# ---------------------------------------------------------------- in several directions


class PoolPart(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one tensor-parallel rank on its own GPU: a part of every page, the rank's heads."""

    location: str  # as `PoolAddress.location`
    offset: int  # in the page, in bytes
    num_bytes: int  # of the part of one page


class PoolAddress(msgspec.Struct, frozen=True, kw_only=True):
    """How a peer can write to a page pool by one transport."""

    transport: str  # a key of `transfer.TRANSPORTS`
    location: str  # the pool's address in that transport; in shm and cuda-ipc the path of its file
    num_pages: int
    page_bytes: int
    layout: str  # `PageLayout.describe`; must be equal on both sides
    device: str = "cpu"  # type of the device that has the pages: "cpu" or "cuda"
    from_devices: tuple[str, ...] = ("cpu", "cuda")  # types of the devices whose pools can be written into this one
    same_host: bool = True  # only processes with an equal `host_id` can use the address
    parts: tuple[PoolPart, ...] = ()  # of the ranks, in their order; empty: `location` has whole pages


class PeerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The part of an `EngineSpec` that another engine needs before a handoff; plan/compat.py compares two of them."""

    worker_id: WorkerId
    protocol_version: int
    model_fingerprint: str
    dtype: str
    page_size: int  # tokens
    layout: str  # `PageLayout.describe` of whole pages, with the heads of all ranks
    page_bytes: int  # of a whole page
    host_id: str  # equal only for processes that can map each other's files (memory/runtime_dir.py)
    transports: tuple[PoolAddress, ...]  # the engine's pool, by each transport that it offers, best first


# ---------------------------------------------------------------- gateway → engine


FlushTier = Literal["device", "host"]


class Hello(_Message, frozen=True):
    """First message of a gateway, and its keep-alive: the engine aborts the requests of a gateway that has sent nothing
    for `gateway_timeout_s`."""

    gateway_id: str
    protocol_version: int = PROTOCOL_VERSION
    known_role: Role | None = None  # that later Submits follow; None: the one of `EngineSpec`


class ListPages(_Message, frozen=True):
    """List the cached pages from the piece `first_piece` on, in `num_pieces` pieces (`PageEvents.listed`).
    The gateway asks for the others when it has applied these. All changes come along, from the first `ListPages` on."""

    first_piece: int = 0
    num_pieces: int = 1


class PrefillPeer(msgspec.Struct, frozen=True, kw_only=True):
    """The prefill engine of a request; sent to its decode engine."""

    worker_id: WorkerId
    endpoint: str  # the prefill engine's ROUTER address
    epoch: EpochId
    spec: PeerSpec | None = None  # None: the gateway does not know it


HandoffWay = Literal["direct", "store"]


class Submit(_Message, frozen=True):
    """A request, and the part of it that this engine runs.
    With the handoff "store" no two engines meet: a PREFILL stores the pages of its prompt, and its decode engine gets
    the request in mode FULL, with the first token in `output_token_ids`, and looks for the pages in the store."""

    request: EngineRequest
    mode: Mode
    handoff: HandoffWay = "direct"
    handoff_id: HandoffId | None = None  # set for PREFILL and DECODE, if the handoff is direct
    prefill: PrefillPeer | None = None  # set for DECODE
    target_epoch: EpochId | None = None  # set for a direct PREFILL: only a Grant of this decode engine is accepted
    # By the gateway's estimate: neither cached here nor computed here for another request. None: it has none.
    num_uncomputed_tokens: int | None = None


class SubmitTogether(_Message, frozen=True):  # to engines of protocol version 6
    """Requests that share tokens. The engine has all of them before it plans its next step."""

    submits: tuple[Submit, ...]


class Abort(_Message, frozen=True):
    """Abort a request whose client has disconnected. Unknown ids are ignored: the request may have ended already."""

    request_id: RequestId


class FlushCache(_Message, frozen=True):
    """Drop every cached page that no request uses. `Flushed` answers once no restart can restore the pages."""

    call_id: str
    tier: FlushTier | None = None  # None: the device and the host


StoreOptionValue = str | int | float | bool | None


class AttachStore(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A store to attach. Fields left None, and options left out, fall back to the engine's flags."""

    backend: str | None = None  # a row of store.STORES
    options: dict[str, StoreOptionValue] = {}  # the backend's own, by name
    prefetch_policy: str | None = None


class StorageCommand(_Message, frozen=True):
    """Return the status of the storage tier, attach a store to it, or detach the store. Answered by `StorageAnswer`."""

    call_id: str
    action: Literal["status", "attach", "detach"]
    store: AttachStore = AttachStore()  # with "attach"


class SetRole(_Message, frozen=True):  # every gateway learns the role from the next `LoadReport`
    call_id: str
    role: Role


# ---------------------------------------------------------------- engine → gateway


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of an engine that a gateway needs before it sends a request. Also in `/server_info`."""

    worker_id: WorkerId
    epoch: EpochId
    role: Role  # that the worker was started with; `LoadReport` has the present one
    endpoint: str
    model_fingerprint: str
    tokenizer_fingerprint: str = ""  # of the model's own vocabulary; "" if unknown
    model_name: str
    vocab_size: int
    max_model_len: int  # tokens, prompt and answer together
    page_size: int  # tokens
    num_pages: int
    num_host_pages: int = 0  # of the host tier
    namespace: str  # prefix of every page digest: equal tokens in one namespace have equal pages
    dtype: str
    tp_size: int
    max_running_requests: int
    max_queued_requests: int
    writes_alone: bool = False  # generates answers of any length without another engine, in any role
    scheduling_policy: str = FCFS  # "priority": the engine serves requests with a lower `priority` first
    protocol_version: int = PROTOCOL_VERSION
    request_fields: tuple[str, ...] = REQUEST_FIELDS  # that the engine knows; another one would be ignored
    layout: str  # `PageLayout.describe` of whole pages, with the heads of all ranks
    page_bytes: int  # of a whole page
    host_id: str  # equal only for processes that can map each other's files
    transports: tuple[PoolAddress, ...]  # the pool, by each transport that the engine offers, best first


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """State of an engine process as its parent sees it. In `/server_info`, beside the spec."""

    turn_s: float = 0.0  # duration of the loop's current iteration; seconds for a step of a large model on a CPU
    stalled_s: float = 0.0  # time without progress: the process is stopped, or its loop hangs
    silent_s: float = 0.0  # time without a heartbeat of the process, which a long step does not stop: it is suspended
    place: str = ""  # where the loop hangs, while it makes no progress: "FUNCTION (FILE:LINE)"
    problem: str = ""  # why the engine is down; a text to be read
    doing: str = ""  # while the engine starts: "loading weights 40%"


class Welcome(_Message, frozen=True):
    """Answer to `Hello`, sent once the engine can produce tokens."""

    spec: EngineSpec
    protocol_version: int = PROTOCOL_VERSION


class TokenChunk(_Message, frozen=True, tag=False, gc=False):  # hundreds in each step, none in a reference cycle
    """Consecutive output tokens of one request. `position` counts output tokens from 0, across engines."""

    request_id: RequestId
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token, if requested
    finish_reason: FinishReason | None = None  # with STOP the last token is the stop token
    num_cached_tokens: int | None = None  # with position 0: cached prompt tokens at the engine that ran prefill
    num_cached_host_tokens: int = 0  # the part of the cached tokens that came from the host tier
    num_cached_storage_tokens: int = 0  # the part from the storage tier; the rest was in the device pool
    handoff: HandoffReport | None = None  # in the first chunk of decode
    lease: LeaseStatus | None = None  # in the last chunk of a request that leases its prompt
    stages: tuple[StageTime, ...] = ()  # of the time since the last chunk that has any, unless all of it was decode
    # Sent before the first token, in pieces without tokens: logprobs of the prompt's tokens from `prompt_position` on.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_position: int = 0


class Ended(_Message, frozen=True, tag=False):
    """The request has ended at this engine. Sent exactly once for each `Submit` received."""

    request_id: RequestId
    outcome: Outcome
    error_code: str | None = None  # errors.py's code, with FAILED
    message: str = ""
    retry_after_s: float | None = None
    stored: StoredPages | None = None  # of a PREFILL whose handoff is through the store
    stages: tuple[StageTime, ...] = ()  # with FAILED: since the last chunk that has any


class StepOutputs(_Message, frozen=True):
    """Output of one engine step for one gateway: one message for all its streams."""

    chunks: tuple[TokenChunk, ...] = ()
    ended: tuple[Ended, ...] = ()


class StorageStatus(_Message, frozen=True, tag=False):
    """The storage tier of one engine."""

    backend: str | None  # None: no store is attached
    options: dict[str, StoreOptionValue]  # of the backend, in full; empty without a store
    prefetch_policy: str
    state: str  # "detached" | "attaching" | "attached" | "detaching"
    breaker: str  # "closed" | "open" | "half_open"
    num_quarantined_pages: int  # host pages that a hung store call may still read or write
    stored_bytes: int  # by all workers, as of the last store call
    errors: dict[str, int]  # count by short name; of system calls, the errno
    note: str = ""  # a text to be read
    location: str = ""  # where the pages are: equal for workers that share them; empty without a store
    pool: WatchedPool | None = None  # of several hosts, behind the store; None for other stores


PageTier = Literal["device", "host"]  # nearest first

DIGEST_BYTES = 16  # of a page digest in page events: its first half (docs/adr/0023-short-digests-in-page-events.md)
MAX_DIGESTS = 4096  # in one field of a message: an engine builds a piece, and a gateway applies it, in about 1 ms
Digests = Annotated[bytes, msgspec.Meta(max_length=MAX_DIGESTS * DIGEST_BYTES)]  # joined


class TierChanges(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The pages that entered and left one tier, net: a page is in one of the two at most."""

    tier: PageTier
    stored: Digests = b""
    removed: Digests = b""


class ListedPages(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of the list of all cached pages, as of this message: the answer to `ListPages`."""

    tier: PageTier
    digests: Digests = b""
    first_piece: int  # the pieces [first_piece, next_piece)
    next_piece: int | None = None  # None: this was the last piece


class TierSum(msgspec.Struct, frozen=True, kw_only=True):
    """Count and XOR of the digests of all pages in one tier: equal sets have equal sums, in any order."""

    tier: PageTier
    num_pages: int
    xor: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class StoreHints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Pages that the engine stored in its store or found there, and pages that it did not find there. Only hints: a
    store that engines share evicts pages without a report."""

    found: Digests = b""
    missing: Digests = b""


class PageEvents(_Message, frozen=True):
    """The changes of the cached pages since the previous message, sent to gateways that have sent `ListPages`.
    `sequence` grows by one with each message to one gateway; after a gap the gateway lists the pages again. The parts
    apply in the order of the fields. `sums` are of all pages after this message; they come about once a second."""

    sequence: int
    changes: tuple[TierChanges, ...] = ()
    listed: tuple[ListedPages, ...] = ()
    sums: tuple[TierSum, ...] = ()
    store: StoreHints | None = None


class LoadReport(_Message, frozen=True):
    """Sent once a second. The counters in `totals` only grow (engine/counters.py)."""

    num_running: int
    num_waiting: int
    num_free_pages: int
    num_cached_pages: int
    num_owned_pages: int
    num_in_flight_pages: int
    leases: LeaseCounts = LeaseCounts()
    service_s: float | None = None  # recent mean time of a request from its first admission to its end
    queue_wait_s: float | None = None  # how long the queue lasts (service_time.py); None: not measured yet
    num_host_pages: dict[str, int] = {}  # by state: free, cached, in_flight; empty without a host tier
    storage: StorageStatus | None = None  # None without a host tier
    draining: bool = False  # the engine takes no new request, and exits after its last one
    role: Role | None = None  # the present one; None: as in `EngineSpec`
    earlier_roles: tuple[Role, ...] = ()  # that gateways still follow: their requests are admitted, too
    totals: dict[str, float] = {}


class Flushed(_Message, frozen=True):
    call_id: str
    num_pages: int


class StorageAnswer(_Message, frozen=True):
    call_id: str
    status: StorageStatus | None = None  # None: the command was refused or failed
    error_code: str | None = None  # of errors.py
    message: str = ""
    param: str | None = None


class RoleAnswer(_Message, frozen=True):
    call_id: str
    error_code: str | None = None  # of errors.py: the switch was refused
    message: str = ""


# ---------------------------------------------------------------- decode → prefill


class Grant(_Message, frozen=True):
    """Permission to write into pages of decode."""

    handoff_id: HandoffId
    request_id: RequestId
    target_epoch: EpochId  # of the decode engine
    source_epoch: EpochId  # of the prefill engine that the Grant is for
    target: PeerSpec  # the decode engine, with the addresses of its pool
    first_page: int  # decode has pages [0, first_page) cached already
    page_ids: tuple[int, ...]  # of decode's pages, for the prompt's pages from `first_page` on

    @property
    def pools(self) -> tuple[PoolAddress, ...]:
        """The addresses of decode's pool, one per transport that it offers."""
        return self.target.transports


class Ping(_Message, frozen=True):
    """Decode has a handoff with this prefill engine on another host, and asks whether the process lives."""

    target_epoch: EpochId
    source_epoch: EpochId


class Ack(_Message, frozen=True):
    """The pages have arrived and are verified: prefill may release its own."""

    handoff_id: HandoffId
    target_epoch: EpochId


class Revoke(_Message, frozen=True):
    """Stop writing and answer `Closed`; until then decode does not reuse the pages."""

    handoff_id: HandoffId
    target_epoch: EpochId  # receives the answer, even if the handoff is unknown
    reason: str
    cancelled: bool = False  # the request was aborted at decode: this is not a failure


# ---------------------------------------------------------------- prefill → decode


class Done(_Message, frozen=True):
    """All granted pages are written. Repeated until acknowledged; duplicates are harmless."""

    handoff_id: HandoffId
    target_epoch: EpochId
    source_epoch: EpochId
    num_pages: int
    checksum: str  # transfer.checksum over the written pages, in order
    first_token: SampledToken
    finish_reason: FinishReason | None = None  # set: the first token is the last one
    transport: str = ""  # that wrote the pages; empty if there were none
    page_digests: bytes = b""  # short ones, by which decode finds a page that differs; empty in local memory
    grant_wait_s: float = 0.0  # first token sampled → Grant received; 0 if the Grant was there before
    last_copy_s: float = 0.0  # from then on → every page written


class Pong(_Message, frozen=True):
    """The answer to `Ping`."""

    target_epoch: EpochId
    source_epoch: EpochId


class Closed(_Message, frozen=True):
    """Prefill writes no more bytes: refused, failed or revoked. Also the answer about a closed or unknown handoff."""

    handoff_id: HandoffId
    target_epoch: EpochId
    source_epoch: EpochId
    error_code: str | None = None  # None: aborted at prefill, or acknowledged before
    message: str = ""
    unsettled: bool = False  # a write failed, and its bytes may still be under way: decode must revoke the access first


ToScheduler = Submit | Abort | FlushCache | LeaseCommand  # the engine handles all others itself
Command = FlushCache | StorageCommand | SetRole | LeaseCommand  # each worker answers with the same `call_id`
Answer = Flushed | StorageAnswer | RoleAnswer | LeaseAnswer
AnswerT = TypeVar("AnswerT", bound=Answer)
GatewayToEngine = Hello | ListPages | ToScheduler | SubmitTogether | Command
EngineToGateway = Welcome | StepOutputs | LoadReport | PageEvents | Answer
TargetToSource = Grant | Ack | Revoke | Ping
SourceToTarget = Done | Closed | Pong
PeerMessage = TargetToSource | SourceToTarget
ToEngine = GatewayToEngine | TargetToSource  # what an engine's ROUTER socket receives


def encode(message: GatewayToEngine | EngineToGateway | TargetToSource | SourceToTarget) -> bytes:
    return msgspec.msgpack.encode(message)


class Decoder:
    """Decoder of the messages of one direction. Raises `WireError` for any other bytes."""

    def __init__(self, union: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(type=union)

    def decode(self, payload: bytes | memoryview) -> object:
        try:
            return self._decoder.decode(payload)
        except Exception as error:  # msgspec's own, and UnicodeDecodeError, RecursionError, OverflowError, MemoryError
            message = f"cannot decode a message of {len(payload)} bytes: {type(error).__name__}: {error}"
            raise WireError(message) from None
