"""`kvist bench engine`: times the steps of one engine in this process, without HTTP and sockets, part by part.

    plan        scheduler.step, from the tokens of the previous step to the next batch
    launch      runner.launch: build inputs and queue work; on a CPU also compute
    compute     until the device is idle
    read back   LaunchedBatch.result: tokens on the host

The parts are measured one step at a time, so their sum is the time of a step. A GPU engine plans and launches a step
while the previous one is computed; "overlapped" is the wall time per step in this mode. The table has medians over the
steps of a shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvist.clock import Clock, MonotonicClock
from kvist.engine.assembly import find_served_model, freeze_gc, load_runner, warm_up
from kvist.engine.bench_shapes import Shape, StepsConfig
from kvist.engine.config import ModelOptions, RuntimeOptions
from kvist.errors import ConfigError
from kvist.kv.cache import PageCache
from kvist.kv.layout import PageLayout
from kvist.memory.runtime_dir import runtime_dir as user_runtime_dir
from kvist.plan.batch import Batch
from kvist.plan.events import Event, StepFinished
from kvist.plan.slots import OpenSlots
from kvist.protocol import PROTOCOL_VERSION
from kvist.request import EngineRequest, EpochId, Mode, RequestId, Role, SamplingParams, WorkerId
from kvist.runner.config import RunnerLimits, RunnerOptions
from kvist.runner.runner import AnyRunner, LaunchedBatch
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.transfer.epoch import EpochLock, new_epoch, sweep
from kvist.wire import PeerSpec, Submit

PREFILL_STEP_TOKENS = 2048  # of the steps that prefill the context of the decodes, before the measured steps
MAX_STEPS_BEFORE = 100_000  # limit of these prefill steps, in case the scheduler makes no progress


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    plan_s: float
    launch_s: float
    compute_s: float
    read_back_s: float

    @property
    def step_s(self) -> float:
        return self.plan_s + self.launch_s + self.compute_s + self.read_back_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeResult:
    shape: Shape
    steps: list[StepParts]
    overlapped_s: float | None  # wall time of a step while the next one is planned and launched


def run_bench_engine(config: StepsConfig, model: ModelOptions, options: RunnerOptions, runtime: RuntimeOptions) -> int:
    """Print a table; return the exit status. Raises `ConfigError`, also if a shape does not fit the model or pool."""
    limits = scheduler_limits(config.parsed)  # the runner sizes its buffers and graphs by these limits
    with contextlib.ExitStack() as closing:
        runtime_dir = user_runtime_dir(runtime.runtime_dir)
        sweep(runtime_dir)
        closing.callback(EpochLock(runtime_dir, new_epoch()).close)
        served = find_served_model(model)
        runner_limits = RunnerLimits(
            max_running_requests=limits.max_running_requests, max_batch_tokens=limits.max_prefill_tokens
        )
        runner = load_runner(options, runner_limits, served, runtime_dir, lambda _text: None)
        closing.callback(runner.close)
        warm_up(runner, lambda _text: None)
        freeze_gc()
        device = runner.pool.tensor.device
        ranks = f", {options.tp} ranks" if options.tp > 1 else ""
        name, dtype = served.checkpoint.name, runner.pool.layout.dtype
        print(f"{name} in {dtype} on {device}{ranks}, attention {runner.attention_name}")
        print(f"pool: {runner.pool_reason}")
        print(_HEAD)
        results = []
        for shape in config.parsed:
            check_fits(shape, config, runner, served.config.max_position_embeddings)
            source = PromptSource(served.config.vocab_size)
            bench = ShapeBench(shape, config, runner, limits, source, MonotonicClock())
            overlapped_s = bench.measure_overlapped() if device.type == "cuda" else None
            results.append(ShapeResult(shape=shape, steps=bench.measure_parts(), overlapped_s=overlapped_s))
            print(line(results[-1]), flush=True)
    if config.json_path is not None:
        _write(config.json_path, results, {"model": served.checkpoint.name, "device": str(device), "tp": options.tp})
    return 0


def scheduler_limits(shapes: Sequence[Shape]) -> SchedulerConfig:
    """Return limits with which every shape fits into one step."""
    num_running = max(shape.num_decodes + 2 * shape.num_prompts for shape in shapes)
    num_tokens = max(PREFILL_STEP_TOKENS, num_running, *(shape.num_step_tokens for shape in shapes))
    return SchedulerConfig(
        max_running_requests=num_running,
        max_queued_requests=num_running,
        chunked_prefill_size=num_tokens,  # else many decodes would make the step smaller (scheduler/budget.py)
        max_prefill_tokens=num_tokens,
        queue_timeout_s=1e9,
    )


def max_decode_tokens(shape: Shape, config: StepsConfig, limits: SchedulerConfig) -> int:
    """Return the most tokens that a decode generates: in the measured steps and while other prompts are prefilled."""
    room_for_prompts = max(1, limits.max_prefill_tokens - shape.num_decodes)
    num_prefill_steps = -(-shape.num_decodes * shape.context // room_for_prompts)
    return num_prefill_steps + config.warmup_steps + config.steps + 3


def check_fits(shape: Shape, config: StepsConfig, runner: AnyRunner, max_positions: int) -> None:
    """Raise `ConfigError` if the shape does not fit the model or the page pool."""
    num_steps = max_decode_tokens(shape, config, scheduler_limits([shape]))
    page_size = runner.pool.layout.page_size
    longest = max(shape.context + num_steps if shape.num_decodes else 0, shape.prompt + 1)
    if longest > max_positions:
        raise ConfigError(f"--shapes {shape.text}: {longest} tokens, but the model was trained for {max_positions}")
    # prompts of two steps: with overlap, one step's pages are still owned while the next step is computed
    pages = shape.num_decodes * -(-(shape.context + num_steps) // page_size)
    pages += 2 * shape.num_prompts * -(-(shape.prompt + 1) // page_size)
    if pages > runner.pool.num_pages:
        raise ConfigError(
            f"--shapes {shape.text} needs {pages} pages of {page_size} tokens, but the pool has "
            f"{runner.pool.num_pages}: raise --max-total-tokens or --mem-fraction-static"
        )


# ---------------------------------------------------------------- one shape


class PromptSource:
    """Random prompts that share no page. Mutable; owned by the bench of one shape."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._generator = np.random.default_rng(0)
        self._num_drawn = 0

    def arrival(self, num_tokens: int, max_tokens: int) -> Submit:
        self._num_drawn += 1
        request = EngineRequest(
            request_id=RequestId(str(self._num_drawn)),
            prompt_token_ids=tuple(self._generator.integers(0, self._vocab_size, num_tokens).tolist()),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        )
        return Submit(request=request, mode=Mode.FULL)


class ShapeBench:
    """Measures steps of one shape, planned by a scheduler of its own. Mutable; one measurement at a time."""

    def __init__(
        self,
        shape: Shape,
        config: StepsConfig,
        runner: AnyRunner,
        limits: SchedulerConfig,
        source: PromptSource,
        clock: Clock,
    ) -> None:
        self._shape = shape
        self._config = config
        self._runner = runner
        self._limits = limits
        self._source = source
        self._clock = clock
        self._slots = OpenSlots()
        self._new_scheduler(overlap=False)

    def measure_parts(self) -> list[StepParts]:
        """Time the parts of each step, one step after another; return the measured steps without the warm-up."""
        self._new_scheduler(overlap=False)
        times = []
        events = self._prefill_decodes()
        for number in range(self._config.warmup_steps + self._config.steps):
            events = [*events, *self._new_prompts()]
            start_s = self._clock.now_s()
            batch = self._plan(events)
            planned_s = self._clock.now_s()
            launched = self._launch(batch)
            launched_s = self._clock.now_s()
            while not launched.is_done():
                pass
            computed_s = self._clock.now_s()
            sampled = launched.result()
            end_s = self._clock.now_s()
            events = [StepFinished(step_id=batch.step_id, sampled=sampled)]
            self._check(batch)
            if number >= self._config.warmup_steps:
                times.append(
                    StepParts(
                        plan_s=planned_s - start_s,
                        launch_s=launched_s - planned_s,
                        compute_s=computed_s - launched_s,
                        read_back_s=end_s - computed_s,
                    )
                )
        self._end_requests()
        return times

    def measure_overlapped(self) -> float:
        """Return the seconds per step, each planned and launched while the previous one is computed."""
        self._new_scheduler(overlap=True)
        events = self._prefill_decodes()
        under_way: deque[tuple[Batch, LaunchedBatch]] = deque()
        start_s = 0.0
        for number in range(self._config.warmup_steps + self._config.steps + 1):
            if number == self._config.warmup_steps + 1:
                start_s = self._clock.now_s()
            batch = self._plan([*events, *self._new_prompts()])
            under_way.append((batch, self._launch(batch)))
            events = []
            if len(under_way) == 2:
                previous, launched = under_way.popleft()
                events = [StepFinished(step_id=previous.step_id, sampled=launched.result())]
                self._check(previous)
        wall_s = self._clock.now_s() - start_s
        for _, launched in under_way:
            launched.result()
        self._end_requests()
        return wall_s / self._config.steps

    def _launch(self, batch: Batch) -> LaunchedBatch:
        self._slots.update(batch)
        return self._runner.launch(batch)

    def _end_requests(self) -> None:
        """End the requests at the runner, which continues with another scheduler."""
        self._runner.launch(self._slots.end_all()).result()

    # ------------------------------------------------------------ the scheduler

    def _new_scheduler(self, *, overlap: bool) -> None:
        pool = self._runner.pool
        config = dataclasses.replace(
            self._limits, max_model_len=pool.num_pages * pool.layout.page_size, overlap=overlap
        )
        cache = PageCache(num_pages=pool.num_pages, page_size=pool.layout.page_size, namespace="bench")
        self._scheduler = build_scheduler(Role.UNIFIED, config, cache, EpochId("bench"), _without_peers(pool.layout))

    def _new_prompts(self) -> list[Event]:
        return [self._source.arrival(self._shape.prompt, 1) for _ in range(self._shape.num_prompts)]

    def _prefill_decodes(self) -> list[Event]:
        """Run the steps that prefill the decodes' contexts; return the events for the first measured step."""
        if not self._shape.num_decodes:
            return []
        # the last token of the context is the token that prefill samples
        context = max(1, self._shape.context - 1)
        max_tokens = max_decode_tokens(self._shape, self._config, self._limits)
        events: list[Event] = [self._source.arrival(context, max_tokens) for _ in range(self._shape.num_decodes)]
        num_ready = 0
        for _ in range(MAX_STEPS_BEFORE):
            plan = self._scheduler.step(self._clock.now_s(), events)
            assert plan.batch is not None, "there is work, and nothing is under way"
            num_ready += sum(item.end == context for item in plan.batch.items)
            sampled = self._launch(plan.batch).result()
            events = [StepFinished(step_id=plan.batch.step_id, sampled=sampled)]
            if num_ready == self._shape.num_decodes:
                return events
        raise AssertionError("the scheduler does not finish the prefill of the decodes")

    def _plan(self, events: Sequence[Event]) -> Batch:
        batch = self._scheduler.step(self._clock.now_s(), events).batch
        assert batch is not None, f"{self._shape.text}: nothing was planned"
        return batch

    def _check(self, batch: Batch) -> None:
        found = batch.num_tokens
        assert found == self._shape.num_step_tokens, f"{self._shape.text}: a step of {found} tokens was planned"


# ---------------------------------------------------------------- output

_HEAD = "shape            tokens |   plan   launch  compute  read back =     step ms | overlapped ms    tokens/s"


def _median_ms(values: Sequence[float]) -> float:
    return 1e3 * statistics.median(values)


def line(result: ShapeResult) -> str:
    steps, tokens = result.steps, result.shape.num_step_tokens
    step_ms = _median_ms([step.step_s for step in steps])
    best_ms = step_ms if result.overlapped_s is None else 1e3 * result.overlapped_s
    overlapped = "-" if result.overlapped_s is None else f"{1e3 * result.overlapped_s:.3f}"
    return (
        f"{result.shape.text:<16} {tokens:>6} | {_median_ms([step.plan_s for step in steps]):6.3f} "
        f"{_median_ms([step.launch_s for step in steps]):8.3f} {_median_ms([step.compute_s for step in steps]):8.3f} "
        f"{_median_ms([step.read_back_s for step in steps]):10.3f} = {step_ms:11.3f} | {overlapped:>13} "
        f"{1e3 * tokens / best_ms:11,.0f}"
    )


def _write(path: Path, results: Sequence[ShapeResult], about: dict[str, str | int]) -> None:
    runs = [
        {
            "shape": each.shape.text,
            "num_tokens": each.shape.num_step_tokens,
            "overlapped_s": each.overlapped_s,
            "rows": [dataclasses.asdict(step) for step in each.steps],
        }
        for each in results
    ]
    path.write_text(json.dumps({**about, "runs": runs}, indent=1))


def _without_peers(layout: PageLayout) -> PeerSpec:
    """Describe an engine that hands nothing over."""
    return PeerSpec(
        worker_id=WorkerId("bench"),
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint="",
        dtype=layout.dtype,
        page_size=layout.page_size,
        layout=layout.describe(),
        page_bytes=layout.page_bytes,
        host_id="",
        transports=(),
    )
