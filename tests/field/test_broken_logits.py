"""NaN logits fail their own request, and no other request of the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvist.checkpoint import find_checkpoint
from kvist.kv.cache import PageCache
from kvist.models import load_model_config
from kvist.plan.events import Event, StepFinished
from kvist.request import EngineRequest, EpochId, Outcome, RequestId, Role, SamplingParams
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerOptions
from kvist.runner.runner import LaunchedBatch
from kvist.runner.sampler import SamplingRow, sample
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.specs import make_peer_spec, submit_full
from kvist.wire import Ended, PoolAddress, Submit, TokenChunk

NAN, INF = float("nan"), float("inf")
HIDDEN, VOCABULARY, PAGE_SIZE = 16, 32, 4
BROKEN_TOKEN = 7  # its embedding is NaN


def llama_folder(folder: Path, broken: str) -> Path:
    generator = torch.Generator().manual_seed(1)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    layer = "model.layers.0."
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        **{f"{layer}{name}_layernorm.weight": torch.ones(HIDDEN) for name in ("input", "post_attention")},
        **{f"{layer}self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"{layer}mlp.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in ("gate", "up", "down")},
    }
    if broken == "norm":
        weights["model.norm.weight"][3] = NAN
    else:
        weights["model.embed_tokens.weight"][BROKEN_TOKEN] = NAN
    save_file(weights, str(folder / "model.safetensors"))
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Engine:
    """A model, its runner and its scheduler, without processes. With `overlap` a step is read after the next launch."""

    def __init__(self, folder: Path, *, overlap: bool) -> None:
        checkpoint = find_checkpoint(str(folder))
        config = RunnerOptions(
            dtype="float32", device="cpu", page_size=PAGE_SIZE, max_total_tokens=64 * PAGE_SIZE, num_threads=1
        )
        self.runner = build_runner(checkpoint, load_model_config(checkpoint), config, runtime_dir=folder)
        num_pages = self.runner.pool.num_pages
        self.cache = PageCache(num_pages=num_pages, page_size=PAGE_SIZE, namespace="t")
        address = PoolAddress(transport="t", location="x", num_pages=num_pages, page_bytes=64, layout="l")
        limits = SchedulerConfig(
            max_running_requests=8, chunked_prefill_size=64, max_prefill_tokens=64, overlap=overlap, max_model_len=64
        )
        self.scheduler = build_scheduler(Role.UNIFIED, limits, self.cache, EpochId("e"), make_peer_spec(address))
        self._overlap = overlap

    def run(self, **prompts: list[int]) -> tuple[dict[str, list[int]], dict[str, Ended]]:
        """Return the output tokens and the ending of each prompt."""
        events: list[Event] = [submit(name, prompt) for name, prompt in prompts.items()]
        outputs: dict[str, list[int]] = {name: [] for name in prompts}
        ended: dict[str, Ended] = {}
        under_way: list[tuple[int, LaunchedBatch]] = []
        for _ in range(64):
            plan = self.scheduler.step(0.0, events)
            events = []
            for chunk in plan.chunks:
                assert isinstance(chunk, TokenChunk)
                outputs[chunk.request_id] += chunk.token_ids
            ended |= {end.request_id: end for end in plan.ended}
            if plan.batch is not None:
                under_way.append((plan.batch.step_id, self.runner.launch(plan.batch)))
            if len(under_way) > (1 if self._overlap and plan.batch is not None else 0):
                step_id, launched = under_way.pop(0)
                events.append(StepFinished(step_id=step_id, sampled=launched.result()))
            elif not under_way and plan.batch is None:
                break
        return outputs, ended


def submit(name: str, prompt: list[int]) -> Submit:
    sampling = SamplingParams(max_tokens=6, temperature=0.8, seed=3)
    request = EngineRequest(request_id=RequestId(name), prompt_token_ids=tuple(prompt), sampling=sampling)
    return submit_full(request)


@pytest.mark.case("nan-logits")
@pytest.mark.parametrize("overlap", [False, True])
def test_a_model_with_nan_weights_fails_every_request_with_a_clear_error(tmp_path: Path, overlap: bool) -> None:
    engine = Engine(llama_folder(tmp_path, "norm"), overlap=overlap)
    for name in ("first", "second"):
        outputs, ended = engine.run(**{name: [1, 2, 3]})
        assert outputs == {name: []}
        assert (ended[name].outcome, ended[name].error_code) == (Outcome.FAILED, "engine_error")
        assert "NaN" in ended[name].message
    engine.runner.close()


@pytest.mark.case("nan-logits")
@pytest.mark.parametrize("overlap", [False, True])
def test_nan_logits_fail_one_request_of_a_batch_and_cache_none_of_its_pages(tmp_path: Path, overlap: bool) -> None:
    engine = Engine(llama_folder(tmp_path, "embedding"), overlap=overlap)
    good, other = [1, 2, 3, 4, 5], [9, 8, 6]
    alone = {name: engine.run(**{name: prompt})[0][name] for name, prompt in {"x": good, "y": other}.items()}
    assert [len(tokens) for tokens in alone.values()] == [6, 6]
    num_cached = engine.cache.counts().cached
    outputs, ended = engine.run(bad=[1, BROKEN_TOKEN, 3, 4, 5], good=good, worse=[BROKEN_TOKEN] * 9, other=other)
    assert outputs == {"bad": [], "worse": [], "good": alone["x"], "other": alone["y"]}
    assert {name: end.outcome for name, end in ended.items()} == {
        "bad": Outcome.FAILED,
        "worse": Outcome.FAILED,
        "good": Outcome.FINISHED,
        "other": Outcome.FINISHED,
    }
    assert engine.cache.counts().cached == num_cached
    assert engine.cache.counts().owned == 0
    engine.runner.close()


@pytest.mark.case("nan-logits")
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=1, temperature=0.0),
        SamplingParams(max_tokens=1, temperature=0.7),
        SamplingParams(max_tokens=1, temperature=0.7, top_k=3),
        SamplingParams(max_tokens=1, temperature=0.7, top_p=0.8),
        SamplingParams(max_tokens=1, temperature=0.7, top_p=0.999),
        SamplingParams(max_tokens=1, temperature=0.7, min_p=0.1),
        SamplingParams(max_tokens=1, temperature=0.7, num_logprobs=2),
        SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=0),
    ],
    ids=str,
)
def test_the_sampler_returns_the_rows_with_nan_or_infinite_logits(params: SamplingParams) -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(2))
    logits[1, 299] = NAN
    logits[2, 0] = INF
    logits[3] = -INF
    logits[4] = NAN
    logits[5, 5] = -INF  # a token of probability zero is not a fault
    rows = [SamplingRow(params=params, position=4) for _ in range(7)]
    sampled = sample(logits, rows)
    assert sampled.invalid_rows == {1, 2, 3, 4}
    for place in (0, 5, 6):
        alone = sample(logits[place : place + 1], rows[:1])
        assert alone.token_ids == [sampled.token_ids[place]]
        assert alone.logprobs.get(0) == sampled.logprobs.get(place)
