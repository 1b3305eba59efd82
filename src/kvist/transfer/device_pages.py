"""Pages in GPU memory, copied and summed by our kernels (kernels/pages.py) on a stream beside the model's stream.

With `--tp` each GPU has a part of every page (pieces.py). Rank 0's process copies for all ranks: it has opened their
memory, and each GPU copies the pieces that it has, all GPUs at the same time. The sums of a page's pieces add up to the
sums of the page, so the digest of a page does not depend on its parts.

These streams do not need to wait for another stream. A page to be copied was computed by a step whose tokens the host
has read (only such pages count as computed, also with overlap: `ActiveRequest.num_computed`), and that read waited for
the whole step, on all ranks. A page to be verified was written before its writer, which had waited for its own streams,
sent Done. The model's streams do not need to wait for these streams: a job is reported only after they have ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.errors import EngineError
from kvist.kernels.operands import WORD_BYTES
from kvist.kernels.pages import copy_pages, sum_pages
from kvist.transfer.pieces import PagePart, pieces

Sums = npt.NDArray[np.int64]  # [num_pages, 2]

# Above the model's 0, so that the blocks of a copy are next when an SM is free, and do not wait for the kernels of a
# prompt that are queued before them.
PRIORITY = -1
GROUP_BYTES = 64 << 20  # copied between two checks for a stop: a third of a millisecond


class MappedPart(PagePart, Protocol):
    """The memory of a peer's rank: its part of all pages."""

    def address_on(self, device: torch.device) -> int:
        """Return the address for kernels of this GPU; valid for the lifetime of this object. Raises `Unavailable`."""


class Mapped(Protocol):
    """A peer's mapped pages."""

    @property
    def parts(self) -> Sequence[MappedPart]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _OwnPart:
    offset: int  # in the page
    words: Tensor  # [num_pages, words of the part] int64
    stream: torch.cuda.Stream | None

    @property
    def num_bytes(self) -> int:
        return self.words.shape[1] * WORD_BYTES

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Enter the stream, which also makes its GPU the current device of the thread."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class DevicePages:
    """An engine's own pages, as `jobs.OwnPages`. Used by one thread at a time. On a CPU the kernel's twin runs."""

    def __init__(self, pool: Tensor, others: Sequence[tuple[int, Tensor]] = ()) -> None:
        """`pool` [num_pages, ...], contiguous: rank 0's part of the pages, from byte 0. `others`: the other ranks'
        parts (offset in the page, [num_pages, bytes] uint8)."""
        self._parts = [_own_part(0, pool), *(_own_part(offset, part) for offset, part in others)]
        self._page_bytes = max(part.offset + part.num_bytes for part in self._parts)
        self.pages_at_once = max(1, GROUP_BYTES // self._page_bytes)
        # Compile both kernels now and not during the first request, by copying page 0 onto itself.
        for part in self._parts:
            with part.on_stream():
                copy_pages(part.words, (0,), part.words.data_ptr(), (0,)).cpu()
                sum_pages(part.words, (0,)).cpu()

    def copy(self, page_ids: Sequence[int], peer: Mapped, peer_page_ids: Sequence[int]) -> list[bytes]:
        plan = pieces(self._parts, peer.parts, self._page_bytes)
        # All addresses come first: no byte is written for a peer whose memory cannot be reached in full.
        addresses = [peer.parts[piece.target].address_on(self._parts[piece.source].words.device) for piece in plan]
        sums: list[Tensor] = []
        for piece, address in zip(plan, addresses, strict=True):
            part = self._parts[piece.source]
            start = piece.source_offset // WORD_BYTES
            with part.on_stream():
                sums.append(
                    copy_pages(
                        part.words[:, start : start + piece.num_bytes // WORD_BYTES],
                        page_ids,
                        address + piece.target_offset,
                        peer_page_ids,
                        target_page_bytes=peer.parts[piece.target].num_bytes,
                        first_word=piece.offset // WORD_BYTES,
                    )
                )
        found = [_on_host(self._parts[piece.source], each) for piece, each in zip(plan, sums, strict=True)]
        return _digests([each for piece, each in zip(plan, found, strict=True) if not piece.repeats])

    def digests(self, page_ids: Sequence[int]) -> list[bytes]:
        """Return the digests. Raises `EngineError` if ranks that have equal parts hold different bytes."""
        sums: list[Tensor] = []
        for part in self._parts:
            with part.on_stream():
                sums.append(sum_pages(part.words, page_ids, first_word=part.offset // WORD_BYTES))
        distinct: dict[int, Sums] = {}
        for part, each in zip(self._parts, sums, strict=True):
            found = _on_host(part, each)
            if not np.array_equal(distinct.setdefault(part.offset, found), found):
                raise EngineError(f"two ranks have different bytes in the part of their pages at {part.offset}")
        return _digests(list(distinct.values()))


def _own_part(offset: int, pool: Tensor) -> _OwnPart:
    part_bytes = pool[0].nbytes
    assert part_bytes % WORD_BYTES == offset % WORD_BYTES == 0, "K and V of an even head_dim make whole words"
    stream: torch.cuda.Stream | None = None
    if pool.is_cuda:
        stream = torch.cuda.Stream(pool.device, priority=PRIORITY)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(pool.device))
    return _OwnPart(offset=offset, words=pool.view(pool.shape[0], -1).view(torch.int64), stream=stream)


def _on_host(part: _OwnPart, sums: Tensor) -> Sums:
    """Return the sums. Waits for the part's stream."""
    with part.on_stream():
        found: Sums = sums.cpu().numpy()
    return found


def _digests(sums: Sequence[Sums]) -> list[bytes]:
    """Return one digest per page: the sums of its pieces, added up."""
    total = sums[0].copy()
    for each in sums[1:]:
        total += each  # wraps, as the sums do
    return [row.tobytes() for row in total]
