"""The GPU's runner under a real scheduler gives the same tokens for every way of computing them.

16-bit products round differently for different batch shapes. Runs with different batch shapes are therefore compared up
to the first token whose second-best token was nearly as likely; with equal shapes, every token must be equal.
"""

from __future__ import annotations

import json
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.grammar.backend import Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.compiler import GrammarCompiler
from kvist.kernels.operands import Rotary
from kvist.kernels.rotary import rotated_heads
from kvist.kv.cache import PageCache
from kvist.models import load_model_config
from kvist.models.load import load_model
from kvist.models.parallel import TensorParallel
from kvist.plan.batch import Batch, BatchItem
from kvist.plan.events import Event, StepFinished
from kvist.plan.grammars import GrammarCompiled
from kvist.plan.slots import OpenSlots
from kvist.request import (
    Constraint,
    EngineRequest,
    EpochId,
    RequestId,
    Role,
    SampledToken,
    SamplingParams,
    SlotId,
)
from kvist.runner import answers
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerLimits, RunnerOptions
from kvist.runner.inputs import build_inputs
from kvist.runner.runner import AnyRunner, LaunchedBatch, begin, finish
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.specs import make_peer_spec, submit_full
from kvist.testing.tokenizers import byte_tokenizer
from kvist.wire import PoolAddress
from tests.runner.scoring import assert_scores, plain_logprobs, score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLEAR_NATS = 0.1  # a margin over the second token that rounding does not reverse
FAMILIES = {
    "llama": {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1},
}
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, num_logprobs=2)
SEEDED = SamplingParams(max_tokens=40, temperature=0.8, seed=7)
NUCLEUS = SamplingParams(max_tokens=40, temperature=0.9, seed=5, top_p=0.9, min_p=0.001, num_logprobs=1)
TOP_K = SamplingParams(max_tokens=40, temperature=0.9, seed=6, top_k=20, top_p=0.95)
SHAPED = SamplingParams(
    max_tokens=40,
    temperature=0.8,
    seed=8,
    top_p=0.9,
    min_tokens=4,
    stop_token_ids=(2998,),
    repetition_penalty=1.2,
    frequency_penalty=0.4,
    presence_penalty=0.3,
    logit_bias=((3, 3.0), (4, 3.0), (5, -3.0)),
    allowed_token_ids=tuple(range(2, 400)),
    bad_words=((7,), (3, 4), (4, 3), (4, 4)),
)
# the host looks for a word that is longer than the tables hold
LONG_WORD = SamplingParams(
    max_tokens=40, temperature=0.0, logit_bias=((3, 90.0), (4, 80.0)), bad_words=((3,) * 9, (3, 4), (4, 3))
)
TEXT = byte_tokenizer()
# some tokens are forced, others are chosen from two or from ten
FORM = Constraint(kind="regex", text=r"\{(\"name\": \"[ab]{1,3}\", |\"count\": [0-9]{1,3}, )*\"done\": true\}")
CONSTRAINED = SamplingParams(max_tokens=60, temperature=1.0, seed=3, constraint=FORM)
# all answers are equally long, so that steps have the same shapes with overlap, where an end is noticed a step late
CONSTRAINED_BY_STEPS = SamplingParams(
    max_tokens=60, temperature=1.0, seed=3, constraint=FORM, num_logprobs=1, ignore_eos=True
)
CONSTRAINED_AND_SHAPED = SamplingParams(
    max_tokens=60,
    ignore_eos=True,
    stop_token_ids=(2998,),
    temperature=0.8,
    seed=9,
    top_p=0.9,
    min_tokens=40,
    constraint=FORM,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    bad_words=(tuple(TEXT.encode("aa")),),
)


def make_grammars() -> GrammarCompiler:
    vocabulary = Vocabulary(tokens=TEXT, size=3000, end_token_ids=(2999,))
    return GrammarCompiler(lambda: GRAMMAR_BACKENDS["llguidance"].make({}, vocabulary))


def make_checkpoint(folder: Path, family: str) -> Checkpoint:
    shape = FAMILIES[family]
    config = {
        **shape,
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"],
        "num_hidden_layers": 4,
        "intermediate_size": 704,
        "vocab_size": 3000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": 2999,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return find_checkpoint(str(folder))


def make_runner(checkpoint: Checkpoint, runtime_dir: Path, **options: Any) -> AnyRunner:
    return build_runner(
        checkpoint,
        load_model_config(checkpoint),
        RunnerOptions(load_format="dummy", device="cuda", max_total_tokens=32_768, **options),
        RunnerLimits(max_running_requests=32, max_batch_tokens=512),
        runtime_dir=runtime_dir,
        grammars=make_grammars(),
    )


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def graphs(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyRunner]:
    runner = make_runner(checkpoint, tmp_path_factory.mktemp("run"))
    assert runner._decodes is not None, f"{runner.attention_name} cannot be captured"  # type: ignore[attr-defined]
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def eager(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyRunner]:
    runner = make_runner(checkpoint, tmp_path_factory.mktemp("run"), disable_cuda_graph=True)
    yield runner
    runner.close()


def make_requests(count: int, sampling: SamplingParams, *, seed: int = 0) -> list[EngineRequest]:
    dice = random.Random(seed)
    return [
        EngineRequest(
            request_id=RequestId(f"r{index}"),
            prompt_token_ids=tuple(dice.randrange(2990) for _ in range(dice.choice([1, 15, 16, 17, 60, 200]))),
            sampling=sampling,
        )
        for index in range(count)
    ]


Streams = dict[str, list[SampledToken]]


def serve(
    runner: AnyRunner,
    requests: Sequence[EngineRequest],
    *,
    overlap: bool,
    apart: bool = False,
    chunk: int = 64,
    slots: int = 32,
) -> Streams:
    """Serve requests like the engine's loop. `apart`: a request arrives when the previous request has its first
    tokens. `slots`: the most requests that run at a time."""
    config = SchedulerConfig(
        max_running_requests=slots,
        chunked_prefill_size=chunk,
        max_prefill_tokens=128,
        max_model_len=1024,
        overlap=overlap,
    )
    cache = PageCache(num_pages=runner.pool.num_pages, page_size=16, namespace="t")
    pool = PoolAddress(transport="none", location="", num_pages=runner.pool.num_pages, page_bytes=1, layout="t")
    scheduler = build_scheduler(Role.UNIFIED, config, cache, EpochId("e"), make_peer_spec(pool))
    waiting = deque(submit_full(request) for request in requests)
    streams: Streams = {request.request_id: [] for request in requests}
    in_flight: deque[tuple[Batch, LaunchedBatch]] = deque()
    opened = OpenSlots()
    events: list[Event] = []
    steps = 0
    while waiting or scheduler.has_work() or in_flight:
        while waiting and (not apart or steps % 5 == 0):
            events.append(waiting.popleft())
            if apart:
                break
        plan = scheduler.step(steps * 0.001, events)
        events = [GrammarCompiled(request_id=job.request_id) for job in plan.grammar_jobs]
        steps += 1
        for sent in plan.chunks:
            logprobs = sent.logprobs or [None] * len(sent.token_ids)
            each = zip(sent.token_ids, logprobs, strict=True)
            streams[sent.request_id] += [SampledToken(token_id=token, logprobs=value) for token, value in each]
        if plan.batch is not None:
            opened.update(plan.batch)
            in_flight.append((plan.batch, runner.launch(plan.batch)))
        if len(in_flight) > int(overlap and plan.batch is not None):
            batch, launched = in_flight.popleft()
            events.append(StepFinished(step_id=batch.step_id, sampled=launched.result()))
    runner.launch(opened.end_all()).result()
    return streams


def ids(streams: Streams) -> dict[str, list[int]]:
    return {name: [token.token_id for token in tokens] for name, tokens in streams.items()}


def check_alike(found: Streams, reference: Streams) -> None:
    """Check that greedy streams equal the reference (with two logprobs) up to a near tie."""
    compared = 0
    for name, tokens in reference.items():
        for position, token in enumerate(tokens):
            if found[name][position].token_id != token.token_id:
                assert token.logprobs is not None
                first, second = token.logprobs.top_logprobs[:2]
                assert first - second < CLEAR_NATS, f"{name}, token {position}"
                break
            compared += 1
    assert compared >= len(reference) * 5, "too few tokens without a near tie"


def test_gpu_logits_are_close_to_fp32(checkpoint: Checkpoint, eager: AnyRunner) -> None:
    config = load_model_config(checkpoint)
    exact = load_model(
        checkpoint,
        config,
        dtype=torch.float32,
        device=torch.device("cuda"),
        tp=TensorParallel(),
        load_format="dummy",
        seed=0,
    )

    def attend(layer: int, heads: Tensor, rotary: Rotary | None) -> Tensor:
        del layer
        q, k, v = (each.transpose(0, 1)[None] for each in rotated_heads(heads, rotary, config.num_kv_heads))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    dice = random.Random(1)
    token_ids = [dice.randrange(2990) for _ in range(300)]
    device = torch.device("cuda")
    with torch.inference_mode():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        hidden = exact.forward(torch.tensor(token_ids, device=device), torch.arange(300, device=device), attend)
        expected = exact.logits(hidden[[255, 299]])
        torch.backends.cuda.matmul.allow_tf32 = before
        pages = list(range(100, 120))
        parts = [(0, 128), (128, 256), (256, 299), (299, 300)]  # chunks, then a decode
        found = []
        for start, end in parts:
            item = BatchItem(
                slot=SlotId(0),
                token_ids=token_ids[start:end],
                start=start,
                page_ids=pages,
                samples=end in (256, 300),
            )
            inputs = build_inputs([item], np.zeros(1, dtype=np.int64), device)
            model = eager._model  # type: ignore[attr-defined]
            logits = finish(model, begin(model, eager._attention, inputs), inputs)  # type: ignore[attr-defined]
            if logits is not None:
                found.append(logits)
    for row, want in zip(torch.cat(found), expected, strict=True):
        error = ((row - want).norm() / want.norm()).item()
        print(f"{checkpoint.name}: relative error of bf16 logits {error:.4f}")
        assert error < 2e-2


def test_prompts_are_scored_on_the_gpu_as_in_fp32(checkpoint: Checkpoint, graphs: AnyRunner, eager: AnyRunner) -> None:
    exact = load_model(
        checkpoint,
        load_model_config(checkpoint),
        dtype=torch.float32,
        device=torch.device("cuda"),
        tp=TensorParallel(),
        load_format="dummy",
        seed=0,
    )
    dice = random.Random(2)
    prompt = [dice.randrange(2990) for _ in range(400)]
    expected = plain_logprobs(exact, prompt, "cuda")
    pages = list(range(200, 226))
    for runner in (graphs, eager):
        for parts in ([(0, 400)], [(0, 64), (64, 65), (65, 399), (399, 400)]):
            found = score(runner, prompt, pages=pages, parts=parts)
            assert len(found) == 399
            assert_scores(found, expected, prompt, 0.1)


@pytest.mark.parametrize("count", [1, 3, 8, 13, 32])
def test_replayed_graphs_give_the_tokens_of_eager_steps(graphs: AnyRunner, eager: AnyRunner, count: int) -> None:
    requests = make_requests(count, GREEDY, seed=count)
    check_alike(serve(graphs, requests, overlap=False), serve(eager, requests, overlap=False))


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SEEDED, NUCLEUS, TOP_K, SHAPED, LONG_WORD, CONSTRAINED_BY_STEPS, CONSTRAINED_AND_SHAPED],
    ids=["greedy", "seeded", "nucleus", "top_k", "shaped", "long word", "constrained", "constrained and shaped"],
)
def test_overlap_changes_no_token(graphs: AnyRunner, sampling: SamplingParams) -> None:
    requests = make_requests(13, sampling)
    assert ids(serve(graphs, requests, overlap=True)) == ids(serve(graphs, requests, overlap=False))


def text_of(tokens: Sequence[SampledToken]) -> str:
    return TEXT.decode([token.token_id for token in tokens if token.token_id < TEXT.vocab_size])


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlapped"])
@pytest.mark.parametrize("sampling", [CONSTRAINED, CONSTRAINED_BY_STEPS, CONSTRAINED_AND_SHAPED])
def test_constrained_answers_have_their_form_among_free_ones(
    graphs: AnyRunner, eager: AnyRunner, sampling: SamplingParams, overlap: bool
) -> None:
    requests = [
        replaced(each, msgspec.structs.replace(sampling, seed=number) if number % 3 else SEEDED)
        for number, each in enumerate(make_requests(24, GREEDY, seed=3))
    ]
    for runner in (graphs, eager):
        streams = serve(runner, requests, overlap=overlap)
        num_whole = 0
        for number, tokens in enumerate(streams.values()):
            if number % 3:
                ended = tokens[-1].token_id == 2999
                num_whole += ended
                assert re.fullmatch(FORM.text, text_of(tokens)) if ended else len(tokens) == 60
                assert text_of(tokens).startswith('{"')
        assert num_whole > 3


def test_forced_tokens_change_no_answer(graphs: AnyRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of forced tokens rounds differently from one token a step, so that only clear choices are compared."""
    sampling = msgspec.structs.replace(CONSTRAINED, temperature=0.0)
    requests = make_requests(8, sampling, seed=5)
    skipped = {overlap: ids(serve(graphs, requests, overlap=overlap)) for overlap in (False, True)}
    monkeypatch.setattr(answers, "_MAX_FORCED", 0)
    by_steps = ids(serve(graphs, requests, overlap=True))
    for found in skipped.values():
        equal = sum(found[name] == by_steps[name] for name in found)
        assert equal >= 6, f"{equal} of 8 answers are equal"


def test_the_choice_of_a_constrained_step_is_launched_when_the_step_before_is_read(
    graphs: AnyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = list[bool]()
    launch = type(graphs).launch

    def watched(runner: AnyRunner, batch: Batch) -> LaunchedBatch:
        launched = launch(runner, batch)
        waiting.append(runner._unchosen is not None)  # type: ignore[attr-defined]
        return launched

    monkeypatch.setattr(type(graphs), "launch", watched)
    serve(graphs, make_requests(4, CONSTRAINED_BY_STEPS), overlap=True)
    assert sum(waiting) > 20
    waiting.clear()
    serve(graphs, make_requests(4, SEEDED), overlap=True)
    serve(graphs, make_requests(4, CONSTRAINED_BY_STEPS), overlap=False)
    assert not any(waiting)


@pytest.mark.parametrize("sampling", [SEEDED, TOP_K, SHAPED], ids=["seeded", "top_k", "shaped"])
def test_logprobs_change_no_token(graphs: AnyRunner, eager: AnyRunner, sampling: SamplingParams) -> None:
    for runner in (graphs, eager):
        plain = serve(runner, make_requests(8, sampling), overlap=True)
        measured = serve(runner, make_requests(8, msgspec.structs.replace(sampling, num_logprobs=2)), overlap=True)
        assert ids(plain) == ids(measured)


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlapped"])
def test_the_device_counts_and_bans_tokens_that_the_host_does_not_know(graphs: AnyRunner, overlap: bool) -> None:
    """Few tokens are allowed and each occurs once; with bias, only bad words keep 3 and 4 apart."""
    once = SamplingParams(
        max_tokens=30, temperature=0.0, presence_penalty=1000.0, allowed_token_ids=tuple(range(10, 40))
    )
    apart = SamplingParams(
        max_tokens=30, temperature=0.0, logit_bias=((3, 900.0), (4, 800.0)), bad_words=((3, 3), (3, 4), (9, 9, 9))
    )
    requests = [
        replaced(each, once if number % 2 else apart) for number, each in enumerate(make_requests(13, GREEDY, seed=2))
    ]
    for number, tokens in enumerate(ids(serve(graphs, requests, overlap=overlap)).values()):
        if number % 2:
            assert sorted(tokens) == list(range(10, 40))
        else:
            assert tokens[0] == 3
            assert all((before == 3) is (after not in (3, 4)) for before, after in pairwise(tokens))


def test_a_long_bad_word_is_never_completed(graphs: AnyRunner) -> None:
    for tokens in ids(serve(graphs, make_requests(5, LONG_WORD), overlap=True)).values():
        runs = "".join("x" if token == 3 else "." for token in tokens)
        assert runs.startswith("x" * 8 + ".")
        assert "x" * 9 not in runs


def test_mixed_batches_give_the_tokens_of_separate_ones(graphs: AnyRunner) -> None:
    requests = make_requests(10, GREEDY, seed=4)
    alone: Streams = {}
    for request in requests:
        alone |= serve(graphs, [request], overlap=False)
    check_alike(serve(graphs, requests, overlap=True, apart=True), alone)


def test_requests_that_join_and_leave_read_their_own_pages(graphs: AnyRunner, eager: AnyRunner) -> None:
    """More requests than rows for page lists: rows are reused while steps are in flight."""
    requests = make_requests(150, msgspec.structs.replace(GREEDY, max_tokens=12), seed=9)
    found = serve(graphs, requests, overlap=True, apart=True)
    check_alike(found, serve(eager, requests, overlap=False, apart=True))


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlapped"])
def test_requests_that_share_slots_sample_the_tokens_that_each_samples_alone(graphs: AnyRunner, overlap: bool) -> None:
    """Greedy requests take slots from requests with other parameters, often in the batch that ends these."""
    greedy = make_requests(24, GREEDY, seed=11)
    others = (SEEDED, NUCLEUS, TOP_K, SHAPED)
    mixed = [
        each if number % 2 else replaced(each, others[number // 2 % 4], max_tokens=3 + number)
        for number, each in enumerate(greedy)
    ]
    found = serve(graphs, mixed, overlap=overlap, slots=3)
    alone: Streams = {}
    for request in greedy[1::2]:
        alone |= serve(graphs, [request], overlap=False)
    check_alike(found, alone)


def replaced(request: EngineRequest, params: SamplingParams, **changes: object) -> EngineRequest:
    return EngineRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=msgspec.structs.replace(params, **changes),
    )


def test_a_stop_token_noticed_one_step_late_does_not_change_other_requests(graphs: AnyRunner) -> None:
    first = ids(serve(graphs, make_requests(6, SEEDED), overlap=False))
    stop = first["r2"][5]
    requests = make_requests(6, msgspec.structs.replace(SEEDED, stop_token_ids=(stop,)))
    stopped = ids(serve(graphs, requests, overlap=True))
    for name, tokens in first.items():
        end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert stopped[name][:end] == tokens[:end]
