"""Two ranks give the tokens and pages of one rank, and no rank waits for a dead rank."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.errors import ConfigError, EngineError
from kvist.models import load_model_config
from kvist.models.load import declare_model
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import Constraint, RequestId, SamplingParams, SlotId
from kvist.runner import tp
from kvist.runner.build import build_runner, page_layout, weights_bytes
from kvist.runner.config import RunnerConfig, RunnerOptions
from kvist.runner.tp import FollowerProcesses, Rendezvous
from kvist.testing.tokenizers import byte_tokenizer, write_byte_tokenizer
from kvist.testing.waits import wait_until
from tests.preloaded import POPEN, start_python
from tests.runner.hand_driven import HandDriven, PlainEngine, byte_grammars, make_runner

SAMPLING = SamplingParams(max_tokens=6, temperature=0.8, seed=5)
SHAPED = SamplingParams(
    max_tokens=6,
    temperature=0.8,
    seed=6,
    top_p=0.9,
    repetition_penalty=1.3,
    presence_penalty=2.0,
    frequency_penalty=1.0,
    logit_bias=((30, 4.0), (31, 4.0)),
    allowed_token_ids=tuple(range(20, 60)),
    bad_words=((30, 31), (33,)),
)
START = StartRequest(
    slot=SlotId(0), request_id=RequestId("r"), sampling=SAMPLING, token_ids=list(range(3, 11)), num_prompt_tokens=8
)


@pytest.fixture(autouse=True)
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp, "subprocess", POPEN)


@pytest.mark.e2e
def test_two_ranks_give_the_tokens_and_pages_of_one_rank(
    engine: PlainEngine, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    prompt = list(range(3, 25))
    pages = engine.pages(28)
    expected = [token.token_id for token in engine.generate(prompt, SAMPLING, pages=pages)]
    runner = make_runner(tiny_checkpoint, tmp_path / "two", tp=2)
    try:
        pair = HandDriven(runner)
        got = [token.token_id for token in pair.generate(prompt, SAMPLING, chunks=[9, 13], pages=pages)]
        assert got == expected
        torch.testing.assert_close(runner.pool.tensor[pages[:6]], engine.runner.pool.tensor[pages[:6]])
        assert overlapped(pair, prompt, pages, SHAPED) == overlapped(engine, prompt, pages, SHAPED)
    finally:
        runner.close()
    assert list((tmp_path / "two").iterdir()) == []


@pytest.mark.e2e
def test_two_ranks_follow_a_constraint_alike(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The other rank compiles the constraint itself, and follows the tokens that it has sampled."""
    folder = Path(shutil.copytree(tiny_checkpoint.path, tmp_path / "model"))
    write_byte_tokenizer(folder)
    checkpoint = find_checkpoint(str(folder))
    prompt, answers = list(range(3, 25)), []
    constraint = Constraint(kind="regex", text="(name=[a-f]{1,3};|count:[0-9]{2}!){9}")
    sampling = SamplingParams(max_tokens=20, temperature=1.5, seed=8, constraint=constraint)
    for size in (1, 2):
        runner = make_runner(checkpoint, tmp_path / str(size), tp=size, grammars=byte_grammars())
        try:
            engine = HandDriven(runner)
            pages = engine.pages(60)
            answers.append(overlapped(engine, prompt, pages, sampling))
            answers.append([token.token_id for token in engine.generate(prompt, sampling, pages=pages)])
        finally:
            runner.close()
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert re.match("name=[a-f]|count:[0-9]", byte_tokenizer().decode(answers[0]))


def overlapped(engine: HandDriven[Any], prompt: list[int], pages: list[int], sampling: SamplingParams) -> list[int]:
    """Return the tokens. Only the prompt is given: each rank continues from its own tokens, and counts them."""
    slot = engine.start("overlapped", sampling, prompt)
    items = [BatchItem(slot=slot, token_ids=prompt, start=0, page_ids=pages, samples=True)]
    items += [
        BatchItem(slot=slot, token_ids=(), start=len(prompt) + number, page_ids=pages, samples=True)
        for number in range(sampling.max_tokens - 1)
    ]
    tokens = [token.token_id for item in items for token in engine.step(item).values()]
    engine.end(slot)
    return tokens


SLOW_FOLLOWER = """
import runpy, time
from kvist.models.decoder import DecoderLayer
attend = DecoderLayer.attend
DecoderLayer.attend = lambda *args: time.sleep(0.2) or attend(*args)
runpy.run_module("kvist.runner.follower", run_name="__main__")
"""


@pytest.mark.e2e
def test_a_step_without_sampled_tokens_ends_when_every_rank_has_written_its_pages(
    engine: PlainEngine,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tp, "FOLLOWER", (sys.executable, "-c", SLOW_FOLLOWER))
    runner = make_runner(tiny_checkpoint, tmp_path / "two", tp=2)
    try:
        runner.pool.tensor.zero_()
        pages = engine.pages(8)
        item = BatchItem(slot=SlotId(0), token_ids=list(range(3, 11)), start=0, page_ids=pages, samples=False)
        for each in (engine.runner, runner):
            each.launch(Batch(step_id=1, started=(START,), items=(item,))).result()
        torch.testing.assert_close(runner.pool.tensor[pages], engine.runner.pool.tensor[pages])
    finally:
        runner.close()


def child_ids() -> set[int]:
    return {int(word) for path in Path("/proc/self/task").glob("*/children") for word in path.read_text().split()}


@pytest.mark.e2e
def test_a_dead_rank_raises_an_error_that_names_it(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = child_ids()
    runner = make_runner(tiny_checkpoint, tmp_path, tp=2)
    try:
        (follower,) = child_ids() - before
        os.kill(follower, signal.SIGKILL)
        os.waitid(os.P_PID, follower, os.WEXITED | os.WNOWAIT)  # the runner reads its status
        item = BatchItem(slot=SlotId(0), token_ids=[1, 2], start=0, page_ids=[0], samples=True)
        with pytest.raises(EngineError, match="rank 1 ended with status -9"):
            runner.launch(Batch(step_id=1, items=(item,))).result()
    finally:
        runner.close()


@pytest.mark.e2e
def test_a_rank_that_cannot_start_fails_the_engine_start_at_once(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tp, "FOLLOWER", (sys.executable, "-c", "raise SystemExit(7)"))
    with pytest.raises(EngineError, match="rank 1 ended with status 7"):
        make_runner(tiny_checkpoint, tmp_path, tp=2)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def followers(tmp_path: Path) -> Iterator[FollowerProcesses]:
    followers = FollowerProcesses(tmp_path / "rendezvous")
    yield followers
    followers.close(kill=True)


@pytest.mark.e2e
def test_frames_arrive_complete_and_in_order(followers: FollowerProcesses, tmp_path: Path) -> None:
    program = (
        "import sys; from kvist.runner.tp import frames; "
        f"open({str(tmp_path / 'got')!r}, 'wb').write(b'|'.join(frames(sys.stdin.buffer)))"
    )
    followers.start([b"spec"], (sys.executable, "-c", program))
    large = bytes(1 << 20)  # more than the capacity of a pipe
    for frame in (b"", large, b"last"):
        followers.send(frame)
    followers.close()
    assert (tmp_path / "got").read_bytes() == b"|".join([b"spec", b"", large, b"last"])


@pytest.mark.e2e
def test_a_rank_that_stops_reading_frames_raises_after_a_timeout(
    followers: FollowerProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tp, "COLLECTIVE_TIMEOUT_S", 0.2)
    followers.start([b""], (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(EngineError, match="rank 1 has read no input"):
        followers.send(bytes(1 << 20))


@pytest.mark.e2e
def test_a_stuck_rank_exits_soon_after_rank_0(tmp_path: Path) -> None:
    watches = tmp_path / "watches"
    program = (
        "import pathlib, threading; from kvist.runner import tp; tp._GRACE_S = 0.1; tp.exit_with_rank_0(0); "
        f"pathlib.Path({str(watches)!r}).touch(); threading.Event().wait(60)"
    )
    process = start_python([sys.executable, "-c", program])
    try:
        process.stdin.write(b"an unread frame")
        process.stdin.flush()
        wait_until(watches.exists)
        time.sleep(0.3)
        assert process.poll() is None, "rank 0 is still running"
        process.stdin.close()
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
        process.wait()
        process.close()


def test_the_barrier_waits_for_every_rank_and_fails_when_one_has_ended(tmp_path: Path) -> None:
    def check() -> None:
        if is_gone.is_set():
            raise EngineError("rank 1 is gone")

    is_gone = threading.Event()
    path = str(tmp_path / "rendezvous")
    mine = Rendezvous(path, rank=0, size=2, check=check)
    other = threading.Thread(target=Rendezvous(path, rank=1, size=2).barrier, args=("started",))
    other.start()
    mine.barrier("started")
    other.join(timeout=60)
    assert not other.is_alive()
    is_gone.set()
    with pytest.raises(EngineError, match="rank 1 is gone"):
        mine.barrier("loaded")


# ---------------------------------------------------------------- GPU settings, tested without a GPU


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"tp": 4}, "--base-gpu-id 0 --tp 4 needs GPU 3 .counted from 0., but torch finds 2", "tp"),
        ({"tp": 2, "base_gpu_id": 1}, "--base-gpu-id 1 --tp 2 needs GPU 2", "tp"),
        ({"base_gpu_id": 2}, "--base-gpu-id 2 needs GPU 2", "base_gpu_id"),
    ],
)
def test_more_ranks_than_gpus_are_refused(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
    param: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = RunnerOptions(load_format="dummy", device="cuda", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        build_runner(tiny_checkpoint, load_model_config(tiny_checkpoint), config, runtime_dir=tmp_path)
    assert caught.value.param == param


def test_a_tp_size_that_does_not_divide_the_model_is_refused_before_a_process_starts(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(POPEN, "Popen", lambda *_: pytest.fail("it started a process"))
    config = RunnerOptions(load_format="dummy", device="cpu", tp=3)
    with pytest.raises(ConfigError, match="4 attention heads"):
        build_runner(tiny_checkpoint, load_model_config(tiny_checkpoint), config, runtime_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ranks", "heads"), [(1, 2), (2, 1), (4, 1)])
def test_pages_hold_one_ranks_heads_on_a_gpu_and_all_heads_on_a_cpu(
    tiny_checkpoint: Checkpoint, ranks: int, heads: int
) -> None:
    model = load_model_config(tiny_checkpoint)
    config = RunnerConfig(device="cuda", dtype="bfloat16", tp=ranks)
    assert page_layout(model, config).num_kv_heads == heads
    assert page_layout(model, replace(config, device="cpu")).num_kv_heads == 2


def test_weights_are_counted_per_device_with_replicated_tensors_in_full(tiny_checkpoint: Checkpoint) -> None:
    model = load_model_config(tiny_checkpoint)
    norms, tables, key_and_value = 64 * (2 * 3 + 1), 2 * model.vocab_size * 64, 3 * 2 * 64 * 32
    whole = sum(math.prod(tensor.shape) for tensor in declare_model(model).tensors)
    others = whole - norms - tables - key_and_value
    assert weights_bytes(model, RunnerConfig(device="cpu", dtype="float32")) == 4 * whole
    for size, num_copies in ((2, 1), (4, 2)):  # of each KV head
        padded_tables = 2 * -(-model.vocab_size // size) * 64
        on_gpu = norms + padded_tables + (others + num_copies * key_and_value) // size
        assert weights_bytes(model, RunnerConfig(device="cuda", dtype="bfloat16", tp=size)) == 2 * on_gpu
        assert weights_bytes(model, RunnerConfig(device="cpu", dtype="float32", tp=size)) == 4 * size * on_gpu


def test_a_load_format_other_than_the_checkpoints_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hf checkpoint"):
        build_runner(
            tiny_checkpoint,
            load_model_config(tiny_checkpoint),
            RunnerOptions(load_format="gguf", device="cpu"),
            runtime_dir=tmp_path,
        )
    assert list(tmp_path.iterdir()) == []
