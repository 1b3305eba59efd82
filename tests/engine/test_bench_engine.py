"""Each timed step has the requested shape, with and without overlap, and its parts add up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvist.checkpoint import find_checkpoint
from kvist.clock import MonotonicClock
from kvist.engine.bench_engine import PromptSource, ShapeBench, check_fits, run_bench_engine, scheduler_limits
from kvist.engine.bench_shapes import Shape, StepsConfig, parse_shape
from kvist.engine.config import ModelOptions, RuntimeOptions
from kvist.errors import ConfigError
from kvist.models import load_model_config
from kvist.plan.batch import Batch
from kvist.plan.events import SampledTokens
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerOptions
from kvist.runner.runner import AnyRunner, LaunchedBatch
from kvist.scheduler.budget import step_tokens

VOCABULARY = 64
STEPS = StepsConfig(shapes=("1@8",), steps=3, warmup_steps=1)


class Watched:
    """A runner that records its batches with items, and the number launched but not read."""

    def __init__(self, runner: AnyRunner) -> None:
        self.pool = runner.pool
        self.pool_reason = runner.pool_reason
        self.attention_name = runner.attention_name
        self.batches: list[Batch] = []
        self.num_under_way = 0
        self.max_under_way = 0
        self._runner = runner

    def launch(self, batch: Batch) -> LaunchedBatch:
        if batch.items:
            self.batches.append(batch)
        self.num_under_way += 1
        self.max_under_way = max(self.max_under_way, self.num_under_way)
        return _Read(self, self._runner.launch(batch))

    def close(self) -> None:
        self._runner.close()


@dataclasses.dataclass
class _Read:
    watched: Watched
    flight: LaunchedBatch

    def is_done(self) -> bool:
        return self.flight.is_done()

    def wait(self) -> None:
        self.flight.wait()

    def result(self) -> SampledTokens:
        self.watched.num_under_way -= 1
        return self.flight.result()


@pytest.fixture
def runner(tiny_model_path: Path, tmp_path: Path) -> Iterator[Watched]:
    torch.set_num_threads(1)
    checkpoint = find_checkpoint(str(tiny_model_path))
    config = RunnerOptions(device="cpu", load_format="dummy", max_total_tokens=1024, page_size=16, num_threads=1)
    made = Watched(build_runner(checkpoint, load_model_config(checkpoint), config, runtime_dir=tmp_path))
    yield made
    made.close()


@pytest.mark.parametrize("text", ["300@128+1x2048", "8@1024+4x512", "64@512+1x960", "1x4096"])
def test_the_bench_scheduler_fits_a_whole_shape_into_one_step(text: str) -> None:
    shape = parse_shape(text)
    limits = scheduler_limits([parse_shape("1@8"), shape])
    num_prompt_tokens = shape.num_prompts * shape.prompt
    room = step_tokens(limits, num_decodes=shape.num_decodes, backlog_tokens=num_prompt_tokens)
    assert room >= shape.num_decodes + num_prompt_tokens


def bench_of(shape: Shape, runner: AnyRunner) -> ShapeBench:
    return ShapeBench(shape, STEPS, runner, scheduler_limits([shape]), PromptSource(VOCABULARY), MonotonicClock())


def sizes(batch: Batch) -> list[tuple[int, int]]:
    """Return (number of tokens, number of tokens before them) of each item."""
    return sorted((item.num_tokens, item.start) for item in batch.items)


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlapped"])
@pytest.mark.parametrize("text", ["1@8", "3@40", "2x24", "3@20+2x9"])
def test_every_measured_step_has_the_batch_shape(text: str, overlap: bool, runner: Watched) -> None:
    shape = parse_shape(text)
    bench = bench_of(shape, runner)
    if overlap:
        assert bench.measure_overlapped() > 0
    else:
        assert len(bench.measure_parts()) == STEPS.steps
    measured = runner.batches[-STEPS.steps :]
    for batch in measured:
        decodes = [start for num_tokens, start in sizes(batch) if num_tokens == 1]
        prompts = [(num_tokens, start) for num_tokens, start in sizes(batch) if num_tokens > 1]
        assert len(decodes) == shape.num_decodes
        assert prompts == [(shape.prompt, 0)] * shape.num_prompts
        assert all(shape.context - 1 <= start <= shape.context + 5 for start in decodes)
    assert runner.max_under_way == (2 if overlap else 1)
    assert runner.num_under_way == 0


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlapped"])
def test_decodes_prefilled_first_last_until_the_others_are_prefilled(overlap: bool, runner: Watched) -> None:
    shape = parse_shape("9@15+1x6")
    limits = dataclasses.replace(scheduler_limits([shape]), chunked_prefill_size=16, max_prefill_tokens=25)
    bench = ShapeBench(shape, STEPS, runner, limits, PromptSource(VOCABULARY), MonotonicClock())
    assert bench.measure_overlapped() > 0 if overlap else len(bench.measure_parts()) == STEPS.steps


def test_the_first_token_of_a_prompt_does_not_count_as_a_decode(runner: Watched) -> None:
    bench_of(parse_shape("2@33"), runner).measure_parts()
    first_measured = runner.batches[-STEPS.steps - STEPS.warmup_steps]
    assert sizes(first_measured) == [(1, 32), (1, 32)]  # with the new token the context is 33


def test_the_parts_of_a_measured_step_add_up_to_its_time(runner: Watched) -> None:
    for step in bench_of(parse_shape("2@8"), runner).measure_parts():
        assert min(step.plan_s, step.launch_s, step.compute_s, step.read_back_s) >= 0
        assert step.step_s == step.plan_s + step.launch_s + step.compute_s + step.read_back_s
        assert step.launch_s > 0


@pytest.mark.parametrize(
    ("text", "words"), [("1@200", "trained for"), ("1x300", "trained for"), ("40@100", "raise --max-total-tokens")]
)
def test_a_shape_that_does_not_fit_is_an_error_with_the_numbers(text: str, words: str, runner: Watched) -> None:
    with pytest.raises(ConfigError, match=words):
        check_fits(parse_shape(text), STEPS, runner, 128)


@pytest.mark.parametrize("text", ["", "8", "8@", "0@5", "5x0", "1@2+3@4", "1@2 +3x4", "1@2+", "x@y"])
def test_an_invalid_shape_is_an_error_that_shows_valid_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="--shapes"):
        StepsConfig(shapes=(text,))


def test_bench_engine_prints_a_line_per_shape_and_writes_every_step(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = RunnerOptions(device="cpu", load_format="dummy", max_total_tokens=1024, num_threads=1)
    file = tmp_path / "steps.json"
    config = StepsConfig(shapes=("2@8", "1x16"), steps=3, warmup_steps=1, json_path=file)
    model, runtime = ModelOptions(model_path=str(tiny_model_path)), RuntimeOptions(runtime_dir=str(tmp_path / "run"))
    assert run_bench_engine(config, model, runner, runtime) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown[-2:]] == [["2@8", "2"], ["1x16", "16"]]
    runs = json.loads(file.read_text())["runs"]
    assert [(run["shape"], len(run["rows"])) for run in runs] == [("2@8", 3), ("1x16", 3)]
    assert set(runs[0]["rows"][0]) == {"plan_s", "launch_s", "compute_s", "read_back_s"}
