"""A tiny llama with random weights, and an engine stepped by the test around a runner: it allocates pages, has no
scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.models import load_model_config
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.plan.slots import OpenSlots
from kvist.request import RequestId, SampledToken, SamplingParams, SlotId
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerOptions
from kvist.runner.runner import Runner

PAGE_SIZE = 4


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny, and other tests need the cores


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 211,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return find_checkpoint(str(folder))


def make_runner(checkpoint: Checkpoint, runtime_dir: Path, *, tp: int = 1) -> Runner:
    config = RunnerOptions(
        load_format="dummy",
        dtype="float32",
        device="cpu",
        page_size=PAGE_SIZE,
        max_total_tokens=4096,
        random_seed=3,
        tp=tp,
        num_threads=tp,
    )
    return build_runner(checkpoint, load_model_config(checkpoint), config, runtime_dir=runtime_dir)


class HandDriven:
    """Allocates pages in shuffled order, gives out slots, and runs the steps that a test asks for."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        order = torch.randperm(runner.pool.num_pages, generator=torch.Generator().manual_seed(5))
        self._free = order.tolist()
        self._steps = 0
        self._open = OpenSlots()
        self._to_start: list[StartRequest] = []
        self._to_end: list[SlotId] = []

    def pages(self, num_tokens: int) -> list[int]:
        count = -(-num_tokens // PAGE_SIZE)
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count, "the test's pool is too small"
        return taken

    def start(
        self, name: str, sampling: SamplingParams, token_ids: Sequence[int] = (), *, suppressed: tuple[int, ...] = ()
    ) -> SlotId:
        """Return the slot that the next step starts for the request. `suppressed` until `min_tokens`."""
        taken = {*self._open, *(start.slot for start in self._to_start)} - {*self._to_end}
        slot = SlotId(min(set(range(len(taken) + 1)) - taken))
        self._to_start.append(
            StartRequest(
                slot=slot,
                request_id=RequestId(name),
                sampling=sampling,
                token_ids=token_ids,
                num_prompt_tokens=len(token_ids),
                suppressed_token_ids=suppressed,
                suppress_until=len(token_ids) + sampling.min_tokens if suppressed else 0,
            )
        )
        return slot

    def end(self, slot: SlotId) -> None:
        """Let the next step end the slot."""
        self._to_end.append(slot)

    def step(self, *items: BatchItem) -> dict[RequestId, SampledToken]:
        self._steps += 1
        batch = Batch(step_id=self._steps, ended=tuple(self._to_end), started=tuple(self._to_start), items=items)
        self._to_end, self._to_start = [], []
        self._open.update(batch)
        sampled = self.runner.launch(batch).result()
        request_ids = [self._open[item.slot] for item in items if item.samples]
        return {request_id: sampled[place] for place, request_id in enumerate(request_ids)}

    def generate(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        chunks: list[int] | None = None,
        pages: list[int] | None = None,
        cached: int = 0,
    ) -> list[SampledToken]:
        """Run one request alone: the prompt in chunks of the given sizes, then token by token."""
        slot = self.start(f"alone-{self._steps}", sampling, prompt)
        tokens = list(prompt)
        pages = pages or self.pages(len(prompt) + sampling.max_tokens)
        start, produced = cached, []
        for size in chunks or [len(prompt) - cached]:
            end = start + size
            samples = end == len(prompt)
            item = BatchItem(slot=slot, token_ids=tokens[start:end], start=start, page_ids=pages, samples=samples)
            produced += list(self.step(item).values())
            start = end
        assert start == len(prompt)
        while len(produced) < sampling.max_tokens:
            tokens.append(produced[-1].token_id)
            item = BatchItem(slot=slot, token_ids=tokens[-1:], start=start, page_ids=pages, samples=True)
            produced += list(self.step(item).values())
            start += 1
        self.end(slot)
        return produced


@pytest.fixture
def runner_factory() -> Callable[..., Runner]:
    return make_runner


@pytest.fixture
def engine(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Iterator[HandDriven]:
    runner = make_runner(tiny_checkpoint, tmp_path)
    yield HandDriven(runner)
    runner.close()


@pytest.fixture
def fresh_engine(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Iterator[HandDriven]:
    """Return another engine with the same weights and empty pages."""
    runner = make_runner(tiny_checkpoint, tmp_path / "other")
    yield HandDriven(runner)
    runner.close()
