"""What the dispatcher tells the server: merged output with the workers behind it, and the state of every worker.

Pure vocabulary between router/dispatch.py, which fills it in, and server/ and metrics.py, which read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.metrics import Histogram
from kvist.request import WorkerId
from kvist.wire import EngineSpec, LoadReport, TokenChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPart:
    """The next output tokens of a request: all that were waiting when the reader asked, as one chunk.

    Parts come in order of `chunk.position`, without gaps or repeats; the part whose chunk has a `finish_reason` is the
    last. `chunk.num_cached_tokens` and `chunk.handoff` are in the first part that covers the chunk which had them.
    """

    chunk: TokenChunk
    prefill_worker: WorkerId  # who reads the prompt; with a unified worker both names are the same
    decode_worker: WorkerId  # who writes the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    worker_id: WorkerId
    role: str  # what the router uses it for: "unified" | "prefill" | "decode"
    alive: bool  # a request can be sent to it now
    spec: EngineSpec | None  # None until it has said Welcome once
    load: LoadReport | None  # the last report; its digests may be left out
    state: str = "ready"  # registry.WorkerState
    problem: str = ""  # why it is not ready, for people
    num_in_flight: int = 0  # requests of this gateway that have not ended there
    num_rejected_messages: int = 0  # that could not be decoded, or could not be meant


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """Requests whose reader left before the end."""

    num_held: int = 0  # that some worker has not ended yet
    release_s: Histogram = field(default_factory=Histogram)  # of the others: from leaving to the end at every worker


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSnapshot:
    workers: tuple[WorkerSnapshot, ...]
    cancelled: Cancelled = field(default_factory=Cancelled)
