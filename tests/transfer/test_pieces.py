"""Pages travel between engines of any two TP sizes: every byte of every part is written once, with one digest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import EngineError, Unavailable
from kvist.models.parallel import TensorParallel
from kvist.transfer.device_pages import DevicePages
from kvist.transfer.host_pages import Pages
from kvist.transfer.pieces import distinct_parts, pieces
from kvist.wire import PoolPart

NUM_PAGES = 5


@dataclass
class Parts:
    """The pools of all ranks of one engine, on a CPU; also a peer's mapped pages."""

    memory: list[Pages]  # of each rank: [num_pages, bytes of its part]
    offsets: list[int]

    @classmethod
    def of(cls, tp: int, num_heads: int, head_bytes: int) -> Parts:
        heads = [TensorParallel(rank=rank, size=tp).kv_heads(num_heads) for rank in range(tp)]
        memory = [np.zeros((NUM_PAGES, (each.stop - each.start) * head_bytes), np.uint8) for each in heads]
        return cls(memory=memory, offsets=[each.start * head_bytes for each in heads])

    def put(self, pages: Pages) -> None:
        for offset, memory in zip(self.offsets, self.memory, strict=True):
            memory[:] = pages[:, offset : offset + memory.shape[1]]

    @property
    def parts(self) -> list[MappedMemory]:
        return [MappedMemory(offset, memory) for offset, memory in zip(self.offsets, self.memory, strict=True)]

    def device_pages(self) -> DevicePages:
        first, *others = (torch.from_numpy(memory) for memory in self.memory)
        return DevicePages(first, list(zip(self.offsets[1:], others, strict=True)))


class MappedMemory:
    def __init__(self, offset: int, memory: Pages) -> None:
        self.offset, self.num_bytes = offset, memory.shape[1]
        self._address = memory.ctypes.data

    def address_on(self, device: torch.device) -> int:
        assert device.type == "cpu"
        return self._address


def parts_of(tp: int, num_heads: int, head_bytes: int) -> list[PoolPart]:
    return [
        PoolPart(location="", offset=part.offset, num_bytes=part.num_bytes)
        for part in Parts.of(tp, num_heads, head_bytes).parts
    ]


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int]:
    """(KV heads, TP size of the source, of the target); a size is a divisor or a multiple of the heads."""
    num_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    sizes = st.sampled_from([tp for tp in (1, 2, 3, 4, 8) if num_heads % tp == 0 or tp % num_heads == 0])
    return num_heads, draw(sizes), draw(sizes)


@given(splits(), st.sampled_from([8, 16, 24]))
def test_every_byte_of_every_part_is_written_once(split: tuple[int, int, int], head_bytes: int) -> None:
    num_heads, source_tp, target_tp = split
    page_bytes = num_heads * head_bytes
    source, target = parts_of(source_tp, num_heads, head_bytes), parts_of(target_tp, num_heads, head_bytes)
    written = [np.zeros(part.num_bytes, int) for part in target]
    counted = np.zeros(page_bytes, int)
    for piece in pieces(source, target, page_bytes):
        from_, to = source[piece.source], target[piece.target]
        assert piece.offset == from_.offset + piece.source_offset == to.offset + piece.target_offset
        assert piece.source_offset + piece.num_bytes <= from_.num_bytes
        written[piece.target][piece.target_offset : piece.target_offset + piece.num_bytes] += 1
        if not piece.repeats:
            counted[piece.offset : piece.offset + piece.num_bytes] += 1
    assert all((each == 1).all() for each in written)
    assert (counted == 1).all(), "the digest of a page has each of its bytes once"


@given(splits(), st.permutations(range(NUM_PAGES)), st.permutations(range(NUM_PAGES)), st.integers(0, NUM_PAGES))
def test_pages_arrive_whole_at_every_rank_with_the_digests_of_whole_pages(
    split: tuple[int, int, int], page_ids: list[int], peer_page_ids: list[int], count: int
) -> None:
    num_heads, source_tp, target_tp = split
    head_bytes = 24
    page_ids, peer_page_ids = page_ids[:count], peer_page_ids[:count]
    pages = np.random.default_rng(num_heads).integers(0, 256, (NUM_PAGES, num_heads * head_bytes), np.uint8)
    source, target = Parts.of(source_tp, num_heads, head_bytes), Parts.of(target_tp, num_heads, head_bytes)
    source.put(pages)
    sent = source.device_pages().copy(page_ids, target, peer_page_ids)
    expected = np.zeros_like(pages)
    expected[peer_page_ids] = pages[page_ids]
    for offset, memory in zip(target.offsets, target.memory, strict=True):
        np.testing.assert_array_equal(memory, expected[:, offset : offset + memory.shape[1]])
    assert target.device_pages().digests(peer_page_ids) == sent
    assert sent == DevicePages(torch.from_numpy(pages)).digests(page_ids)


def test_ranks_with_the_same_head_must_hold_the_same_bytes() -> None:
    parts = Parts.of(4, 2, 16)
    parts.device_pages().digests((0, 3))
    parts.memory[3][3, 5] = 1
    parts.device_pages().digests((0, 1))
    with pytest.raises(EngineError, match="two ranks have different bytes"):
        parts.device_pages().digests((0, 3))


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, 8)],
        [(8, 8)],
        [(0, 8), (0, 8)],
        [(0, 16), (8, 8)],
        [(0, 8), (16, 8)],
        [(0, 8), (8, 0), (8, 8)],
        [(0, 8), (8, 16)],
        [(-8, 16), (8, 8)],
        [(0, 24), (24, -8)],
    ],
)
def test_parts_that_do_not_make_up_a_page_are_refused(ranges: list[tuple[int, int]]) -> None:
    bad = [PoolPart(location="", offset=offset, num_bytes=num_bytes) for offset, num_bytes in ranges]
    whole = [PoolPart(location="", offset=0, num_bytes=16)]
    for source, target in ((bad, whole), (whole, bad)):
        with pytest.raises(Unavailable, match="do not make up a page of 16 bytes"):
            pieces(source, target, 16)


def test_the_first_of_equal_parts_stands_for_all_in_the_order_of_the_page() -> None:
    parts = [PoolPart(location="", offset=offset, num_bytes=8) for offset in (8, 8, 0, 0)]
    assert distinct_parts(parts, 16) == (2, 0)
