"""What the dispatcher yields while it serves one request: a merged chunk and the workers behind it.

Pure vocabulary between router/dispatch.py, which fills it in, and server/, which reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.request import WorkerId
from kvist.wire import TokenChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPart:
    """The next output tokens of a request. Parts come in order of `chunk.position`, without gaps or repeats; the part
    whose chunk has a `finish_reason` is the last."""

    chunk: TokenChunk
    prefill_worker: WorkerId  # who reads the prompt; with a unified worker both names are the same
    decode_worker: WorkerId  # who writes the answer
