"""Two GPUs give the logits and tokens of one, with and without graphs and overlap; the engine ends within a time limit.

Engines run one after another: a process is in one process group at a time.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvist.checkpoint import Checkpoint
from kvist.clock import MonotonicClock
from kvist.errors import ConfigError
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import RequestId, SamplingParams, SlotId
from kvist.runner.leader import LeadingRunner
from kvist.runner.runner import AnyRunner
from kvist.testing.tokenizers import write_byte_tokenizer
from tests.runner import test_cuda_runner as one_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(400),
]

VOCAB_SIZE = 3000


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # with qwen2 both ranks have the same KV head
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return one_gpu.make_checkpoint(tmp_path_factory.mktemp("model") / request.param, request.param)


@contextmanager
def engine(checkpoint: Checkpoint, folder: Path, **config: Any) -> Iterator[AnyRunner]:
    folder.mkdir(exist_ok=True)
    runner = one_gpu.make_runner(checkpoint, folder, **config)
    try:
        yield runner
    finally:
        runner.close()
    assert not list(folder.iterdir()), "the engine leaves no file behind"


def logits_and_tokens(runner: AnyRunner) -> tuple[Tensor, list[int]]:
    """Run a prompt in two chunks, then decodes: return logits [9, VOCAB_SIZE] minus their mean, and the greedy
    tokens."""
    sampling = SamplingParams(max_tokens=9, temperature=0.0, num_logprobs=VOCAB_SIZE)
    tokens = torch.randint(0, 2990, (70,), generator=torch.Generator().manual_seed(3)).tolist()
    pages = [7, 3, 11, 2, 5, 9]
    rows, start = [], 0
    opened = StartRequest(
        slot=SlotId(0), request_id=RequestId("r"), sampling=sampling, token_ids=tokens[:], num_prompt_tokens=70
    )
    for step, end in enumerate([40, *range(70, 79)]):
        item = BatchItem(
            slot=SlotId(0),
            token_ids=tokens[start:end],
            start=start,
            page_ids=pages,
            samples=end >= 70,
        )
        found = runner.launch(Batch(step_id=step, started=() if step else (opened,), items=(item,))).result()
        start = end
        if found:
            [[token]] = found.rows()
            assert token.logprobs is not None
            row = torch.empty(VOCAB_SIZE)
            row[list(token.logprobs.top_token_ids)] = torch.tensor(token.logprobs.top_logprobs)
            rows.append(row - row.mean())
            tokens.append(token.token_id)
    return torch.stack(rows), tokens[70:]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_two_gpus_give_the_logits_of_one_gpu(
    checkpoint: Checkpoint, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    found = {}
    for tp in (1, 2):
        with engine(checkpoint, tmp_path / "run", tp=tp, dtype=dtype) as runner:
            assert isinstance(runner, LeadingRunner) is (tp == 2)
            found[tp] = logits_and_tokens(runner)
    (wanted, tokens), (got, got_tokens) = found[1], found[2]
    same = next((place for place, pair in enumerate(zip(tokens, got_tokens, strict=True)) if len(set(pair)) == 2), 9)
    rows = min(same + 1, len(wanted))  # after a different token the logits belong to a different context
    error = ((got[:rows] - wanted[:rows]).norm() / wanted[:rows].norm()).item()
    print(f"{checkpoint.name}, {dtype}: relative error of two GPUs' logits {error:.5f} over {rows} rows")
    assert error < tolerance
    if dtype == "float32":
        assert got_tokens == tokens


def test_replayed_graphs_give_the_tokens_of_eager_steps_on_two_gpus(checkpoint: Checkpoint, tmp_path: Path) -> None:
    streams = {}
    for use_graphs in (False, True):
        with engine(checkpoint, tmp_path / "run", tp=2, disable_cuda_graph=not use_graphs) as runner:
            if use_graphs:
                assert runner._runner._decodes is not None, f"{runner.attention_name} cannot be captured"  # type: ignore[attr-defined]
            for count in (1, 5, 13):
                requests = one_gpu.make_requests(count, one_gpu.GREEDY, seed=count)
                streams[use_graphs, count] = one_gpu.serve(runner, requests, overlap=False)
    for count in (1, 5, 13):
        one_gpu.check_alike(streams[True, count], streams[False, count])


def test_overlap_changes_no_token_on_two_gpus(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with engine(checkpoint, tmp_path / "run", tp=2) as runner:
        for name in ("GREEDY", "SEEDED", "NUCLEUS", "TOP_K"):
            sampling = getattr(one_gpu, name)
            requests = one_gpu.make_requests(13, sampling)
            ahead = one_gpu.ids(one_gpu.serve(runner, requests, overlap=True))
            assert ahead == one_gpu.ids(one_gpu.serve(runner, requests, overlap=False)), name


@pytest.mark.parametrize("use_graphs", [True, False], ids=["graphs", "eager"])
def test_both_gpus_choose_the_tokens_of_constrained_steps_that_wait(
    checkpoint: Checkpoint, tmp_path: Path, use_graphs: bool
) -> None:
    write_byte_tokenizer(checkpoint.path)  # the other rank compiles the constraint, too
    with engine(checkpoint, tmp_path / "run", tp=2, disable_cuda_graph=not use_graphs) as runner:
        for sampling in (one_gpu.CONSTRAINED_BY_STEPS, one_gpu.CONSTRAINED_AND_SHAPED):
            requests = one_gpu.make_requests(13, sampling)
            ahead = one_gpu.ids(one_gpu.serve(runner, requests, overlap=True))
            assert ahead == one_gpu.ids(one_gpu.serve(runner, requests, overlap=False))
        streams = one_gpu.serve(runner, one_gpu.make_requests(13, one_gpu.CONSTRAINED), overlap=True)
        for tokens in streams.values():
            if tokens[-1].token_id == 2999:
                assert re.fullmatch(one_gpu.FORM.text, one_gpu.text_of(tokens))


def test_requests_that_join_and_leave_give_equal_tokens_on_one_and_two_gpus(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    requests = one_gpu.make_requests(10, one_gpu.GREEDY, seed=4)
    streams = {}
    for tp in (1, 2):
        with engine(checkpoint, tmp_path / "run", tp=tp) as runner:
            streams[tp] = one_gpu.serve(runner, requests, overlap=True, apart=True)
    one_gpu.check_alike(streams[2], streams[1])


def test_more_ranks_than_gpus_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs GPU "):
        one_gpu.make_runner(checkpoint, tmp_path, tp=2, base_gpu_id=torch.cuda.device_count() - 1)


VICTIM = """
import os, sys
from pathlib import Path
from kvist.checkpoint import find_checkpoint
from kvist.errors import EngineError
from kvist.models import load_model_config
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import RequestId, SamplingParams, SlotId
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerLimits, RunnerOptions

checkpoint = find_checkpoint(sys.argv[1])
options = RunnerOptions(load_format="dummy", device="cuda", tp=2, max_total_tokens=4096)
limits = RunnerLimits(max_running_requests=8)
runner = build_runner(checkpoint, load_model_config(checkpoint), options, limits, runtime_dir=Path(sys.argv[2]))
print(runner._followers._processes[0].pid, flush=True)
sampling = SamplingParams(max_tokens=9, temperature=0.0)
start = StartRequest(
    slot=SlotId(0), request_id=RequestId("r"), sampling=sampling, token_ids=[1, 2, 3], num_prompt_tokens=3
)
item = BatchItem(slot=SlotId(0), token_ids=[1, 2, 3], start=0, page_ids=[0], samples=True)
try:
    for step in range(10**9):
        runner.launch(Batch(step_id=step, started=() if step else (start,), items=(item,))).result()
        if step == 0:
            print("serving", flush=True)
except EngineError as error:
    print(f"EngineError: {error}", flush=True)
runner.close()
print("closed", flush=True)
os._exit(3)
"""


def test_a_killed_rank_ends_the_engine_within_a_bound(checkpoint: Checkpoint, tmp_path: Path) -> None:
    clock = MonotonicClock()
    command = [sys.executable, "-c", VICTIM, str(checkpoint.path), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        follower = int(process.stdout.readline())
        assert process.stdout.readline() == "serving\n"
        os.kill(follower, signal.SIGKILL)
        killed_s = clock.now_s()
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 3, rest
        assert "EngineError: tensor-parallel rank 1 ended with status -9" in rest
        assert "closed" in rest
        assert clock.now_s() - killed_s < 30
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_rank_exits_when_rank_0_is_killed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    command = [sys.executable, "-c", VICTIM, str(checkpoint.path), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        follower = int(process.stdout.readline())
        assert process.stdout.readline() == "serving\n"
        watched = os.pidfd_open(follower)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert select.select([watched], [], [], 30.0)[0], "the follower still runs after the end of rank 0"
    os.close(watched)
