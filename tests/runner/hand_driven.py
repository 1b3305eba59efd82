"""An engine stepped by the test around a runner: it allocates pages and slots, and has no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch

from kvist.checkpoint import Checkpoint
from kvist.grammar.backend import Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.compiler import GrammarCompiler
from kvist.models import load_model_config
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.plan.slots import OpenSlots
from kvist.request import RequestId, SampledToken, SamplingParams, SlotId
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerOptions
from kvist.runner.runner import AnyRunner, Runner
from kvist.testing.tokenizers import byte_tokenizer

PAGE_SIZE = 4


def make_runner(
    checkpoint: Checkpoint, runtime_dir: Path, *, tp: int = 1, grammars: GrammarCompiler | None = None
) -> AnyRunner:
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
    model_config = load_model_config(checkpoint)
    return build_runner(checkpoint, model_config, config, runtime_dir=runtime_dir, grammars=grammars)


def make_plain_runner(checkpoint: Checkpoint, runtime_dir: Path, *, grammars: GrammarCompiler | None = None) -> Runner:
    """Return the runner of one CPU rank."""
    runner = make_runner(checkpoint, runtime_dir, grammars=grammars)
    assert isinstance(runner, Runner)
    return runner


def byte_grammars() -> GrammarCompiler:
    """Return a compiler for the vocabulary of the tiny checkpoint: bytes, and the end token 1."""
    vocabulary = Vocabulary(tokens=byte_tokenizer(), size=211, end_token_ids=(1,))
    return GrammarCompiler(lambda: GRAMMAR_BACKENDS["llguidance"].make({}, vocabulary))


AnyR = TypeVar("AnyR", bound=AnyRunner)


class HandDriven(Generic[AnyR]):
    """Allocates pages in shuffled order, gives out slots, and runs the steps that a test asks for."""

    def __init__(self, runner: AnyR) -> None:
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
        return {request_id: sampled.row(place)[0] for place, request_id in enumerate(request_ids)}

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


PlainEngine = HandDriven[Runner]
