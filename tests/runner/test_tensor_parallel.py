"""Two ranks are one engine: the same tokens, and pages with the bytes' meaning unchanged."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.checkpoint import Checkpoint
from kvist.errors import ConfigError, EngineError
from kvist.models import load_model_config
from kvist.request import RequestId, SamplingParams
from kvist.runner import Runner, RunnerConfig, build_runner
from kvist.scheduler.plan import Batch, BatchItem

SAMPLING = SamplingParams(max_tokens=6, temperature=0.8, seed=5)


@pytest.mark.e2e
def test_two_ranks_give_the_tokens_and_pages_of_one(
    engine: Any, tiny_checkpoint: Checkpoint, tmp_path: Path, runner_factory: Callable[..., Runner]
) -> None:
    prompt = list(range(3, 25))
    pages = engine.pages(28)
    expected = [token.token_id for token in engine.generate(prompt, SAMPLING, pages=pages)]
    runner = runner_factory(tiny_checkpoint, tmp_path / "two", tp=2)
    try:
        pair = type(engine)(runner)
        got = [token.token_id for token in pair.generate(prompt, SAMPLING, chunks=[9, 13], pages=pages)]
        assert got == expected
        torch.testing.assert_close(runner.pool.tensor[pages[:6]], engine.runner.pool.tensor[pages[:6]])
    finally:
        runner.close()
    assert list((tmp_path / "two").iterdir()) == []


@pytest.mark.e2e
def test_a_dead_rank_is_an_error_that_says_so(
    tiny_checkpoint: Checkpoint, tmp_path: Path, runner_factory: Callable[..., Runner]
) -> None:
    runner = runner_factory(tiny_checkpoint, tmp_path, tp=2)
    try:
        process = runner._followers._processes[0]  # type: ignore[union-attr]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        item = BatchItem(request_id=RequestId("r"), token_ids=[1, 2], start=0, page_ids=[0], sampling=SAMPLING)
        with pytest.raises(EngineError, match="rank 1 ended with status -9"):
            runner.execute(Batch(step_id=1, items=(item,)))
    finally:
        runner.close()


def test_a_load_format_that_the_checkpoint_is_not_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hf checkpoint"):
        build_runner(
            tiny_checkpoint,
            load_model_config(tiny_checkpoint),
            RunnerConfig(load_format="gguf", device="cpu"),
            runtime_dir=tmp_path,
        )
    assert list(tmp_path.iterdir()) == []
