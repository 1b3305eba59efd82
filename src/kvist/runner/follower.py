"""`python -m kvist.runner.follower`: one tensor-parallel rank beyond rank 0, started by tp.py.

The rank has the same runner as rank 0 and launches the same batches as fast as they arrive; it samples the same tokens
and sends no answer (leader.py). Any failure ends the process, and rank 0 detects that end.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from kvist.checkpoint import Checkpoint
from kvist.memory.device_pool import DevicePool
from kvist.models import load_model_config
from kvist.models.parallel import leave_tensor_parallel
from kvist.runner.batch_message import BatchDecoder
from kvist.runner.build import RankSpec, build_rank, page_layout
from kvist.runner.grammars import grammar_compiler
from kvist.runner.runner import RankRunner
from kvist.runner.tp import Rendezvous, exit_with_rank_0, frames


def follow(stream: BinaryIO) -> None:
    """Launch every batch that arrives on `stream`, until the stream ends."""
    messages = frames(stream)
    first = next(messages, None)
    if first is None:
        return
    exit_with_rank_0(stream.fileno())
    spec = msgspec.msgpack.decode(first, type=RankSpec)
    runner = _build(spec)
    gc.collect()
    gc.freeze()
    batches = BatchDecoder()
    for message in messages:
        runner.launch(batches.decode(message))
        runner.settle()
    runner.close()
    if spec.device.type == "cuda":
        leave_tensor_parallel()  # NCCL needs all ranks to leave together


def _build(spec: RankSpec) -> RankRunner:
    if spec.device.type == "cuda":
        torch.cuda.set_device(spec.device)
    path = Path(spec.checkpoint_path)
    checkpoint = Checkpoint(path=path, kind=spec.checkpoint_kind, name=path.name)
    model_config = load_model_config(checkpoint)
    layout = page_layout(model_config, spec.config)
    if spec.pool is not None:
        pool = DevicePool.attach(spec.pool, layout)
    else:
        pool = DevicePool.create(layout, spec.num_pages, device=spec.device, directory=Path(spec.rendezvous).parent)
    rendezvous = Rendezvous(spec.rendezvous, rank=spec.rank, size=spec.config.tp)
    grammars = grammar_compiler(spec.grammar_backend, checkpoint, model_config)
    return build_rank(checkpoint, model_config, spec, pool, rendezvous, grammars=grammars)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a signal may reach the whole process group
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides when a follower ends
    status = 1
    try:
        follow(sys.stdin.buffer)
        status = 0
    except BaseException:
        traceback.print_exc()
    # Skip the interpreter's shutdown: threads of gloo and NCCL may still wait for peers that are ending, too.
    sys.stderr.flush()
    os._exit(status)
