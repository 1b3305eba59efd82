"""`python -m kvist.runner.follower`: one tensor-parallel rank beyond rank 0. Started by tp.py, which tells its life."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from kvist.checkpoint import Checkpoint
from kvist.kv.device import DevicePool
from kvist.kv.layout import PageLayout
from kvist.models import load_model_config
from kvist.runner.build import build_rank
from kvist.runner.inputs import ForwardItem, build_inputs
from kvist.runner.runner import forward
from kvist.runner.tp import RankSpec, frames


def follow(stream: BinaryIO) -> None:
    """Take part in every forward that `stream` brings, until it ends."""
    messages = frames(stream)
    first = next(messages, None)
    if first is None:
        return
    spec = msgspec.msgpack.decode(first, type=RankSpec)
    path = Path(spec.checkpoint_path)
    checkpoint = Checkpoint(path=path, kind=spec.checkpoint_kind, name=path.name)
    model_config = load_model_config(checkpoint)
    layout = PageLayout(
        num_kv_heads=model_config.num_kv_heads,
        num_layers=model_config.num_layers,
        page_size=spec.page_size,
        head_dim=model_config.head_dim,
        dtype=spec.dtype,
    )
    assert spec.pool is not None, "rank 0 sends the pool's address to every follower"
    pool = DevicePool.attach(spec.pool, layout)
    model, attention = build_rank(checkpoint, model_config, spec, pool)
    decoder = msgspec.msgpack.Decoder(list[ForwardItem])
    device = torch.device(spec.device)
    for message in messages:
        with torch.inference_mode():
            forward(model, attention, build_inputs(decoder.decode(message), device))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; rank 0 decides when we end
    follow(sys.stdin.buffer)
    # Not the interpreter's own end: gloo's threads may still wait for peers that are ending too.
    sys.stderr.flush()
    os._exit(0)
