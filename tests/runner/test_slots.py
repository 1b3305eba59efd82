"""Requests that follow one another in a slot get their own parameters and tokens, on every rank.

The ranks are the runner for CPUs, and the runner for GPUs on a CPU, whose steps wait with the choice of tokens. Tokens
that a constraint forces take no step of their own; in the reference they do.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.checkpoint import Checkpoint
from kvist.grammar.compiler import GrammarCompiler
from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.plan.events import Event, StepFinished
from kvist.plan.grammars import GrammarCompiled
from kvist.plan.slots import OpenSlots
from kvist.request import Constraint, EngineRequest, EpochId, RequestId, Role, SamplingParams, SlotId
from kvist.runner import answers
from kvist.runner.batch_message import BatchDecoder
from kvist.runner.cuda_runner import CudaRunner
from kvist.runner.inputs import sampling_rows
from kvist.runner.leader import LeadingRunner
from kvist.runner.runner import LaunchedBatch, Runner
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.specs import make_peer_spec, submit_full
from kvist.testing.tokenizers import byte_tokenizer
from kvist.wire import Abort, PoolAddress
from tests.budget import budget
from tests.runner.cuda_on_cpu import make_cuda_runner, without_a_gpu
from tests.runner.hand_driven import byte_grammars, make_plain_runner

TEXT = byte_tokenizer()
PAGE_SIZE = 4
NUM_SLOTS = 3
EOS = (1,)
NUM_PAGES = 24  # too few for three long requests: some are preempted


TestedRunner = Runner | CudaRunner


class Follower:
    """A rank that launches the batches of rank 0, in this process; it computes the whole model, like rank 0."""

    def __init__(self, runner: TestedRunner) -> None:
        self.runner = runner
        self.launched: dict[int, LaunchedBatch] = {}  # by step
        self._decoder = BatchDecoder()

    def send(self, payload: bytes) -> None:
        batch = self._decoder.decode(payload)
        self.launched[batch.step_id] = self.runner.launch(batch)
        self.runner.settle()

    def check_alive(self) -> None: ...

    def close(self, *, kill: bool = False) -> None:  # noqa: ARG002 (nothing to kill)
        self.runner.close()


class Ranks:
    """Rank 0 and a follower under one scheduler after another."""

    def __init__(self, runner: TestedRunner, other: TestedRunner, reference: Runner) -> None:
        self.first = runner
        self.follower = Follower(other)
        self.leader = LeadingRunner(runner, self.follower)
        self.num_steps_ended_and_started = 0
        self.longest_chunk = 0
        self._reference = reference
        self._alone: dict[tuple[object, ...], list[int]] = {}

    def serve(
        self, requests: list[EngineRequest], *, overlap: bool, aborts: dict[int, str] | None = None
    ) -> dict[str, list[int]]:
        """Serve the requests, with an abort at each of the given steps; return the tokens that were sampled."""
        config = SchedulerConfig(
            max_running_requests=NUM_SLOTS,
            chunked_prefill_size=8,
            max_prefill_tokens=8 + NUM_SLOTS,
            max_model_len=PAGE_SIZE * NUM_PAGES,
            overlap=overlap,
            eos_token_ids=EOS,
        )
        cache = PageCache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, namespace="t")
        pool = PoolAddress(transport="none", location="", num_pages=NUM_PAGES, page_bytes=1, layout="t")
        scheduler = build_scheduler(Role.UNIFIED, config, cache, EpochId("e"), make_peer_spec(pool))
        events: list[Event] = [submit_full(request) for request in requests]
        streams: dict[str, list[int]] = {request.request_id: [] for request in requests}
        in_flight: deque[tuple[Batch, LaunchedBatch]] = deque()
        slots, step = OpenSlots(), 0
        while scheduler.has_work() or in_flight or events:
            if aborts and step in aborts:
                events.append(Abort(request_id=RequestId(aborts[step])))
            plan = scheduler.step(step * 0.001, events)
            events, step = [GrammarCompiled(request_id=job.request_id) for job in plan.grammar_jobs], step + 1
            for chunk in plan.chunks:
                streams[chunk.request_id] += chunk.token_ids
                self.longest_chunk = max(self.longest_chunk, len(chunk.token_ids))
            if plan.batch is not None:
                slots.update(plan.batch)
                self.num_steps_ended_and_started += bool(
                    {*plan.batch.ended} & {start.slot for start in plan.batch.started}
                )
                in_flight.append((plan.batch, self.leader.launch(plan.batch)))
                self._check_equal(plan.batch)
            if len(in_flight) > int(overlap and plan.batch is not None):
                batch, launched = in_flight.popleft()
                sampled = launched.result()
                assert self.follower.launched.pop(batch.step_id).result().token_ids == sampled.token_ids
                events.append(StepFinished(step_id=batch.step_id, sampled=sampled))
        self.leader.launch(slots.end_all()).result()
        assert not self.first._table.open_slots
        assert not self.follower.runner._table.open_slots
        return streams

    def _check_equal(self, batch: Batch) -> None:
        mine, other = self.first._table, self.follower.runner._table
        assert dict(mine.open_slots) == dict(other.open_slots)
        assert sampling_rows(batch.items, mine) == sampling_rows(batch.items, other)

    def alone(self, request: EngineRequest) -> list[int]:
        key = (request.prompt_token_ids, request.sampling)
        if key not in self._alone:
            self._alone[key] = self._compute_alone(request)
        return self._alone[key]

    def _compute_alone(self, request: EngineRequest) -> list[int]:
        """Compute one token in each step, with the reference runner."""
        tokens, pages, slot = list(request.prompt_token_ids), list(range(NUM_PAGES)), SlotId(0)
        ending = {*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else EOS)}
        suppressed = tuple(sorted(ending)) if request.sampling.min_tokens else ()
        start = StartRequest(
            slot=slot,
            request_id=request.request_id,
            sampling=request.sampling,
            token_ids=tuple(tokens),
            num_prompt_tokens=len(tokens),
            suppressed_token_ids=suppressed,
            suppress_until=len(tokens) + request.sampling.min_tokens if suppressed else 0,
        )
        found: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(answers, "_MAX_FORCED", 0)
            self._reference.launch(Batch(step_id=0, started=(start,), items=()))
            while len(found) < request.sampling.max_tokens and not (found and found[-1] in ending):
                new = tokens if not found else found[-1:]
                item = BatchItem(
                    slot=slot, token_ids=tuple(new), start=len(tokens) - len(new), page_ids=pages, samples=True
                )
                sampled = self._reference.launch(Batch(step_id=0, items=(item,))).result()
                assert not sampled.following
                found += sampled.token_ids
                tokens.append(found[-1])
            self._reference.launch(Batch(step_id=0, ended=(slot,), items=()))
        return found


@pytest.fixture(scope="module")
def grammars() -> GrammarCompiler:
    return byte_grammars()


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def ranks(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
    grammars: GrammarCompiler,
) -> Iterator[Ranks]:
    folder = tmp_path_factory.mktemp("ranks")
    reference = make_plain_runner(tiny_checkpoint, folder / "reference", grammars=grammars)
    with without_a_gpu() if request.param == "gpu" else contextlib.nullcontext():

        def make(name: str) -> TestedRunner:
            if request.param == "cpu":
                return make_plain_runner(tiny_checkpoint, folder / name, grammars=grammars)
            return make_cuda_runner(tiny_checkpoint, folder / name, num_slots=NUM_SLOTS, grammars=grammars)

        made = Ranks(make("0"), make("1"), reference)
        yield made
        made.leader.close()
    reference.close()


REGEX = Constraint(kind="regex", text="(name=[ab]{1,3};|colour:(red|green)!)*done[0-9]{0,3}")
PARAMS = st.builds(
    lambda params, **limits: SamplingParams(**params, **limits),
    st.sampled_from(
        [
            {"temperature": 0.0},
            {"temperature": 0.9, "seed": 4},
            {"temperature": 0.9, "seed": 5},
            {"temperature": 2.0, "seed": 6, "top_k": 5},
            {"temperature": 0.9, "seed": 7, "top_p": 0.8, "num_logprobs": 1},
            {"temperature": 0.0, "frequency_penalty": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.5},
            {"temperature": 0.9, "allowed_token_ids": tuple(range(0, 211, 5)), "logit_bias": ((5, 3.0), (6, 9.0))},
            {"temperature": 0.0, "logit_bias": ((3, 9.0), (4, 8.0)), "bad_words": ((3, 4), (3, 3), (9,))},
            {"temperature": 0.0, "logit_bias": ((3, 9.0), (4, 8.0)), "bad_words": ((3,) * 9, (3, 4), (3, 3))},
            {"temperature": 0.0, "constraint": REGEX},
            {"temperature": 1.5, "seed": 8, "constraint": REGEX},
            {"temperature": 1.5, "seed": 9, "constraint": REGEX, "ignore_eos": True},
            {"temperature": 1.5, "seed": 10, "constraint": REGEX, "num_logprobs": 1},
            {"temperature": 1.5, "seed": 11, "constraint": REGEX, "repetition_penalty": 1.4, "presence_penalty": 1.0},
            {"temperature": 1.5, "seed": 12, "constraint": REGEX, "bad_words": (tuple(TEXT.encode("bb")),)},
        ]
    ),
    max_tokens=st.integers(1, 24),
    min_tokens=st.sampled_from([0, 0, 5]),
    stop_token_ids=st.sampled_from([(), (), tuple(range(0, 211, 7))]),  # a seventh of all tokens: ends soon
)
REQUESTS = st.lists(st.tuples(st.integers(1, 40), PARAMS), min_size=2, max_size=9)


def make_requests(drawn: list[tuple[int, SamplingParams]]) -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=tuple(random.Random(length).choices(range(211), k=length)),
            sampling=params,
        )
        for number, (length, params) in enumerate(drawn)
    ]


@settings(max_examples=budget(10, long=300))
@given(REQUESTS, st.booleans(), st.dictionaries(st.integers(0, 30), st.integers(0, 8).map("r{}".format), max_size=3))
def test_requests_that_share_slots_sample_the_tokens_that_each_samples_alone(
    ranks: Ranks, drawn: list[tuple[int, SamplingParams]], overlap: bool, aborts: dict[int, str]
) -> None:
    requests = make_requests(drawn)
    streams = ranks.serve(requests, overlap=overlap, aborts=aborts)
    for request in requests:
        found, expected = streams[request.request_id], ranks.alone(request)
        if request.request_id in aborts.values():
            assert found == expected[: len(found)]
        else:
            assert found == expected


def test_forced_tokens_take_no_step_of_their_own(ranks: Ranks) -> None:
    """Guards the test above: tokens are forced, and a step in flight samples some of them again."""
    ranks.longest_chunk = 0
    params = [SamplingParams(max_tokens=24, temperature=1.5, seed=seed, constraint=REGEX) for seed in range(9)]
    requests = make_requests([(9, each) for each in params])
    for overlap in (False, True):
        streams = ranks.serve(requests, overlap=overlap)
        assert streams == {request.request_id: ranks.alone(request) for request in requests}
    assert ranks.longest_chunk > len("ame=")


def test_a_slot_is_ended_and_started_in_one_batch(ranks: Ranks) -> None:
    """Guards the test above: slots change hands without a batch between."""
    ranks.num_steps_ended_and_started = 0
    params = [SamplingParams(max_tokens=2 + number, temperature=number % 2, seed=number) for number in range(9)]
    requests = make_requests([(9, each) for each in params])
    streams = ranks.serve(requests, overlap=True)
    assert streams == {request.request_id: ranks.alone(request) for request in requests}
    assert ranks.num_steps_ended_and_started > 3


def test_a_step_that_fails_has_ended_and_started_its_slots(ranks: Ranks) -> None:
    first, second = make_requests([(5, SamplingParams(max_tokens=3)), (6, SamplingParams(max_tokens=3))])
    starts = [
        StartRequest(
            slot=SlotId(0),
            request_id=request.request_id,
            sampling=request.sampling,
            token_ids=request.prompt_token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
        )
        for request in (first, second)
    ]

    def fail() -> None:
        raise TimeoutError("the request has ended")

    item = BatchItem(slot=SlotId(0), token_ids=(1, 2), start=0, page_ids=[0], samples=True)
    runner = ranks.follower.runner
    runner.launch(Batch(step_id=1, started=(starts[0],), items=(item,))).result()
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(runner, Runner):
            patch.setattr(runner, "between_layers", fail)
        else:
            patch.setattr(runner._attention, "prepare", lambda _spans: fail())
        with pytest.raises(TimeoutError):
            runner.launch(Batch(step_id=2, ended=(SlotId(0),), started=(starts[1],), items=(item,)))
    assert runner._table.open_slots == {0: "r1"}
    runner.launch(Batch(step_id=3, ended=(SlotId(0),), items=())).result()
    assert not runner._table.open_slots
