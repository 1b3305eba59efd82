"""The page pool on a GPU: its memory, its file, and the errors if either cannot be created."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from kvist.errors import ConfigError, EngineError
from kvist.kv.layout import PageLayout
from kvist.memory.cuda_memory import HANDLE_BYTES, OpenedMemory, allocate, export, read_export
from kvist.memory.device_pool import DevicePool

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
LAYOUT = PageLayout(num_kv_heads=2, num_layers=3, page_size=4, head_dim=8, dtype="bfloat16")


def assert_torch_is_well() -> None:
    """No earlier CUDA error is left for the next kernel to report."""
    assert torch.ones(1000, device=CUDA).sum().item() == 1000


def test_a_new_pool_is_zeroed_and_its_file_holds_the_ipc_handle(tmp_path: Path) -> None:
    pool = DevicePool.create(LAYOUT, 5, device=CUDA, directory=tmp_path)
    assert pool.tensor.shape == (5, 2, 3, 2, 4, 8)
    assert (pool.tensor.device, pool.tensor.dtype) == (CUDA, torch.bfloat16)
    assert not pool.tensor.any()
    pool.tensor[3] = 1.5
    assert pool.tensor.sum().item() == 1.5 * LAYOUT.num_page_elements
    assert pool.address.transport == "cuda-ipc"
    exported = read_export(Path(pool.address.location).read_bytes())
    assert (exported.num_bytes, exported.error, pool.export_error) == (5 * LAYOUT.page_bytes, "", "")
    assert len(exported.handle) == HANDLE_BYTES
    with pytest.raises(EngineError, match="no bytes on the host"):
        _ = pool.bytes
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_freed_with_the_last_tensor_over_it() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info(CUDA)[0]
    memory = allocate(1 << 30, CUDA)
    view = memory[5:].view(-1)
    del memory
    gc.collect()
    assert torch.cuda.mem_get_info(CUDA)[0] <= before - (1 << 30)
    del view
    gc.collect()
    assert torch.cuda.mem_get_info(CUDA)[0] > before - (1 << 29)


def test_a_pool_that_does_not_fit_names_the_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs .* GiB on cuda:0.*lower --mem-fraction-static"):
        DevicePool.create(LAYOUT, (1 << 50) // LAYOUT.page_bytes, device=CUDA, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert_torch_is_well()


def test_a_process_cannot_open_its_own_memory() -> None:
    memory = allocate(100, CUDA)
    with pytest.raises(EngineError, match="cudaIpcOpenMemHandle"):
        OpenedMemory(export(memory).handle, CUDA)
    assert_torch_is_well()
