"""One rank of two: loads its part of each model, runs a prompt, saves the logits. Started by test_parallel.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from kvist.models.parallel import join_tensor_parallel, leave_tensor_parallel
from tests.models.tiny_models import hf_checkpoint, load_tiny, logits_of


def main() -> None:
    meeting, prompt, rank = sys.argv[1], [int(token) for token in sys.argv[2].split(",")], int(sys.argv[3])
    torch.set_num_threads(1)
    store = FileStore(meeting, -1)
    tp = join_tensor_parallel(rank=rank, size=2, store=store, device=torch.device("cpu"), timeout_s=60.0)
    for folder in map(Path, sys.argv[4:]):
        model = load_tiny(hf_checkpoint(folder), tp=tp)
        torch.save(logits_of(model, prompt, [7, len(prompt) - 7], tp), folder / f"rank{rank}.pt")
    leave_tensor_parallel()


if __name__ == "__main__":
    main()
