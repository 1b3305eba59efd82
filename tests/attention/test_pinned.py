"""The buffer of a copy is overwritten only after the copy is over."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvist.attention.pinned import PinnedRing

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_sent_array_of_any_length_arrives(device: str) -> None:
    ring = PinnedRing(torch.device(device), 4)
    for length in (1, 4, 9, 3, 100, 5, 7):
        ring.next_buffer(length)[:] = np.arange(length) + length
        out = torch.zeros(length, dtype=torch.int32, device=device)
        ring.send(out)
        assert out.tolist() == list(range(length, 2 * length))


@pytest.mark.parametrize("device", DEVICES)
def test_the_buffers_of_the_last_two_sends_are_not_overwritten(device: str) -> None:
    ring = PinnedRing(torch.device(device), 4)
    out = torch.zeros(2, 2, dtype=torch.int32, device=device)
    addresses = []
    for _ in range(6):
        words = ring.next_buffer(4)
        addresses.append(words.ctypes.data)
        ring.send(out)
    assert len(set(addresses[:3])) == 3
    assert addresses[3:] == addresses[:3]


@pytest.mark.gpu
def test_the_buffer_of_a_pending_copy_is_not_overwritten() -> None:
    ring = PinnedRing(torch.device("cuda"), 1)
    outs = [torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(8)]
    torch.cuda._sleep(50_000_000)  # the copies queue after this kernel
    for number, out in enumerate(outs):
        ring.next_buffer(1)[:] = number
        ring.send(out)
    assert [int(out) for out in outs] == list(range(8))
