"""The file of a GPU pool: its content, and the files that are refused before any memory is opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvist.errors import EngineError, Unavailable
from kvist.memory.cuda_memory import HANDLE_BYTES, ExportedMemory, read_export
from kvist.transfer.cuda_ipc import read_file
from kvist.wire import PoolAddress

ADDRESS = PoolAddress(transport="cuda-ipc", location="/run/pool", num_pages=4, page_bytes=32, layout="l")
GOOD = ExportedMemory(num_bytes=128, handle=bytes(range(HANDLE_BYTES)))


def read(tmp_path: Path, content: bytes) -> ExportedMemory:
    path = tmp_path / "pool"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_file(descriptor, ADDRESS)
    finally:
        os.close(descriptor)


def test_an_exported_handle_is_read_back_byte_for_byte(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD.encode()) == GOOD


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 128,  # a pool on the CPU
        b"{}",
        b'{"num_bytes": 128, "handle": "no base64 !"}',
        b'{"num_bytes": 128, "handle": "", "more": 1}',
        ExportedMemory(num_bytes=128, handle=b"short").encode(),
        ExportedMemory(num_bytes=128, handle=b"").encode(),
        GOOD.encode()[:-1],
        b" " * 5000 + GOOD.encode(),
    ],
)
def test_a_file_that_no_gpu_pool_wrote_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Unavailable, match=r"the peer's pool /run/pool cannot be opened"):
        read(tmp_path, content)
    with pytest.raises(EngineError):
        read_export(content[:4096])


def test_a_pool_of_another_size_than_its_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="has 256 bytes, but its address claims 4 pages of 32 bytes"):
        read(tmp_path, ExportedMemory(num_bytes=256, handle=GOOD.handle).encode())


def test_memory_that_could_not_be_exported_gives_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be shared: not on WSL"):
        read(tmp_path, ExportedMemory(num_bytes=128, handle=b"", error="not on WSL").encode())
