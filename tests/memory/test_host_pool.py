"""Several threads make the host pool's memory resident before it is pinned."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from kvist.memory.host_pool import _make_resident

_NUM_BYTES = 32 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_memory_becomes_resident_and_keeps_its_content() -> None:
    memory = torch.frombuffer(mmap.mmap(-1, _NUM_BYTES), dtype=torch.uint8)
    memory[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    before = _resident_bytes()
    _make_resident(memory[1:])  # from the middle of a page
    assert _resident_bytes() - before > _NUM_BYTES * 3 // 4
    assert memory[:4].tolist() == [1, 2, 3, 0]
    assert not memory[3:].any()
