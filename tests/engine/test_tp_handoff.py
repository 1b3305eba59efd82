"""Engines of one and of two tensor-parallel ranks hand pages to each other, and answer like one engine alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvist import wire
from kvist.mooncake.requirements import library_obstacle
from kvist.request import EngineRequest, Outcome, RequestId
from kvist.testing.specs import submit_full
from kvist.testing.tiny_model import write_tiny_model
from kvist.transfer.config import TransferConfig
from tests.engine.test_processes import (
    ON_GPU,
    SLOW,
    Cluster,
    Engine,
    assert_host_tier_gives_the_same_tokens,
    make_request,
    submit_pair,
    until,
)

pytestmark = pytest.mark.e2e

SMALL: dict[str, Any] = {"max_total_tokens": 512}  # of decode: 32 pages, too few for two of the longer answers
TP_SIZES = [(2, 1), (1, 2), (2, 2)]  # of prefill and decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Engines by their number of ranks."""

    unified: Engine
    prefill: dict[int, Engine]
    decode: dict[int, Engine]

    def serve(self, tp_sizes: tuple[int, int], *requests: EngineRequest) -> dict[RequestId, wire.TokenChunk]:
        """Serve the requests twice, by one engine and by a pair, and compare the tokens. Return the first chunks of
        decode."""
        prefill, decode = self.prefill[tp_sizes[0]], self.decode[tp_sizes[1]]
        engines = (self.unified, prefill, decode)
        for engine in engines:
            engine.chunks.clear()
            engine.ended.clear()
        num_received = total(decode, "handoffs_received")
        for request in requests:
            self.unified.send(submit_full(request))
            submit_pair(prefill, decode, request)
        until(lambda: all(len(engine.ended) == len(requests) for engine in engines), *engines)
        for engine in engines:
            assert {ended.outcome for ended in engine.ended} == {Outcome.FINISHED}, engine.ended
        # Decode computes pages again that have arrived changed: the tokens alone would not show it.
        until(lambda: total(decode, "handoffs_received") == num_received + len(requests), decode)
        assert total(decode, "handoff_checksum_mismatches") == 0
        first: dict[RequestId, wire.TokenChunk] = {}
        for request in requests:
            alone, pair = (tokens_of(request, *some) for some in (engines[:1], engines[1:]))
            assert len(alone) == request.sampling.max_tokens
            assert pair == alone
            first[request.request_id] = next(each for each in decode.chunks if each.request_id == request.request_id)
        return first


def total(engine: Engine, name: str) -> float:
    return 0.0 if engine.load is None else engine.load.totals[name]


def tokens_of(request: EngineRequest, *engines: Engine) -> list[int]:
    chunks = [each for engine in engines for each in engine.chunks if each.request_id == request.request_id]
    return [token for chunk in sorted(chunks, key=lambda chunk: chunk.position) for token in chunk.token_ids]


def write_model(folder: Path, **changes: object) -> Path:
    """Write the tiny model with room for a long prompt."""
    path = write_tiny_model(folder) / "config.json"
    config = {**msgspec.json.decode(path.read_bytes()), "max_position_embeddings": 8192, **changes}
    path.write_bytes(msgspec.json.encode(config))
    return folder


def start(cluster: Cluster, **settings: Any) -> Engines:
    """Start all engines at the same time."""

    def launch(role: str, tp: int, **more: Any) -> Engine:
        backend = "auto" if "device" in settings else backend_of((tp, tp))
        transfer = TransferConfig(disaggregation_transfer_backend=backend)
        [engine] = cluster.launch(role, tp=tp, transfer=transfer, **{**settings, **more})
        return engine

    engines = Engines(
        unified=launch("unified", 1),
        prefill={tp: launch("prefill", tp, scheduler=SLOW) for tp in (1, 2)},
        decode={tp: launch("decode", tp, **SMALL) for tp in (1, 2)},
    )
    cluster.wait_ready(cluster.engines)
    return engines


def backend_of(tp_sizes: tuple[int, int]) -> str:
    """Return the transports of engines on a CPU: the pair of two engines with two ranks prefers Mooncake."""
    return "mooncake,shm" if tp_sizes == (2, 2) and not library_obstacle() else "shm"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("engines")
    cluster = Cluster(write_model(folder), folder / "run")
    try:
        yield start(cluster)
    finally:
        cluster.close()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose engines the test may kill."""
    cluster = Cluster(write_model(tmp_path), tmp_path / "run")
    yield cluster
    cluster.close()


def named(name: str, tp_sizes: tuple[int, int], num_tokens: int, **sampling: object) -> EngineRequest:
    """Return a request that no other pair has seen."""
    request = make_request(f"{name} {tp_sizes}", num_tokens, **sampling)
    ids = (3 + 10 * tp_sizes[0] + tp_sizes[1], *request.prompt_token_ids[1:])
    return msgspec.structs.replace(request, prompt_token_ids=ids)


@pytest.mark.parametrize("tp_sizes", TP_SIZES)
def test_a_pair_of_any_tp_sizes_answers_like_one_engine(engines: Engines, tp_sizes: tuple[int, int]) -> None:
    for num_tokens in (1, 17, 100):
        request = named(f"{num_tokens}", tp_sizes, num_tokens)
        handoff = engines.serve(tp_sizes, request)[request.request_id].handoff
        assert handoff is not None
        assert handoff.num_pages == -(-num_tokens // 16)
        assert backend_of(tp_sizes).split(",")[0] in str(handoff)


@pytest.mark.parametrize("tp_sizes", TP_SIZES)
def test_only_pages_that_decode_has_not_cached_are_handed_over(engines: Engines, tp_sizes: tuple[int, int]) -> None:
    first = named("first", tp_sizes, 60)
    second = named("second", tp_sizes, 90)
    second = msgspec.structs.replace(
        second, prompt_token_ids=(*first.prompt_token_ids[:50], *second.prompt_token_ids[50:])
    )
    engines.serve(tp_sizes, first)
    handoff = engines.serve(tp_sizes, second)[second.request_id].handoff
    assert handoff is not None
    assert handoff.num_pages == -(-90 // 16) - 50 // 16


@pytest.mark.parametrize("tp_sizes", [(1, 2)])
def test_a_preempted_stream_is_computed_again_by_all_ranks_of_decode(
    engines: Engines, tp_sizes: tuple[int, int]
) -> None:
    decode = engines.decode[tp_sizes[1]]
    before = total(decode, "preemptions")
    for attempt in range(10):  # on a busy machine one stream may end before the other one needs its pages
        names = [f"long {attempt} {number}" for number in range(2)]
        engines.serve(tp_sizes, *(named(name, tp_sizes, 20 + len(name), max_tokens=320) for name in names))
        reported = decode.load
        until(lambda reported=reported: decode.load is not reported, decode)  # type: ignore[misc]
        if total(decode, "preemptions") > before:
            return
    raise AssertionError("no stream was preempted")


@pytest.mark.parametrize("tp_sizes", TP_SIZES)
def test_an_abort_during_a_transfer_frees_the_pages_of_both_engines(
    engines: Engines, tp_sizes: tuple[int, int]
) -> None:
    prefill, decode = engines.prefill[tp_sizes[0]], engines.decode[tp_sizes[1]]
    for engine in (prefill, decode):
        engine.ended.clear()
    request = named("aborted", tp_sizes, 450)
    submit_pair(prefill, decode, request)
    until(lambda: decode.load is not None and decode.load.num_in_flight_pages > 0, prefill, decode)
    for engine in (prefill, decode):
        engine.send(wire.Abort(request_id=request.request_id))
    until(lambda: prefill.ended and decode.ended, prefill, decode)
    for engine in (prefill, decode):
        assert [ended.outcome for ended in engine.ended] == [Outcome.ABORTED]
        until(lambda engine=engine: all_pages_are_free_or_cached(engine), prefill, decode)  # type: ignore[misc]
    engines.serve(tp_sizes, named("after", tp_sizes, 40))


def all_pages_are_free_or_cached(engine: Engine) -> bool:
    load = engine.load
    return load is not None and load.num_free_pages + load.num_cached_pages == engine.spec.num_pages


def test_ranks_hand_over_pages_that_their_host_tier_has_loaded(own_cluster: Cluster) -> None:
    assert_host_tier_gives_the_same_tokens(own_cluster, tp=2)


def kill_a_rank(engine: Engine) -> None:
    children = Path(f"/proc/{engine.process.pid}/task/{engine.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


@pytest.mark.parametrize("killed", ["prefill", "decode"])
def test_a_rank_killed_during_a_transfer_fails_the_request_at_both_engines(own_cluster: Cluster, killed: str) -> None:
    [prefill] = own_cluster.start("prefill", tp=2, scheduler=SLOW)
    [decode] = own_cluster.start("decode", tp=2)
    submit_pair(prefill, decode, make_request("running", 5, max_tokens=7000))  # without it, decode computes no step
    until(lambda: decode.chunks and prefill.ended, prefill, decode)
    submit_pair(prefill, decode, make_request("transferred", 7000))
    until(lambda: decode.load is not None and decode.load.num_in_flight_pages > 100, prefill, decode)
    victim, survivor = (prefill, decode) if killed == "prefill" else (decode, prefill)
    kill_a_rank(victim)
    until(lambda: [each for each in survivor.ended if each.request_id == "transferred"], prefill, decode)
    assert survivor.ended[-1].outcome is Outcome.FAILED
    assert victim.process.wait(timeout=60) == 1
    until(lambda: survivor.load is not None and survivor.load.num_in_flight_pages == 0, survivor)
    if survivor is prefill:
        until(lambda: all_pages_are_free_or_cached(prefill), prefill)


# ---------------------------------------------------------------- on two GPUs


@pytest.fixture(scope="module", params=[2, 1], ids=["2 KV heads", "1 KV head"])  # with one, both ranks have it
def gpu_engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("gpu-engines")
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_key_value_heads": request.param}
    cluster = Cluster(write_model(folder, **shape), folder / "run")
    try:
        yield start(cluster, mem_fraction_static=0.1, **ON_GPU)
    finally:
        cluster.close()


on_two_gpus = [pytest.mark.gpu, pytest.mark.timeout(600)]  # kernels may have to be compiled


@pytest.mark.parametrize("tp_sizes", TP_SIZES)
class TestOnTwoGpus:
    """The same between parts of pages on two GPUs: (2, 1) and (1, 2) copy pieces from and to another GPU."""

    pytestmark = on_two_gpus

    def test_a_pair_answers_like_one_engine(self, gpu_engines: Engines, tp_sizes: tuple[int, int]) -> None:
        for num_tokens in (1, 17, 200):
            request = named(f"{num_tokens}", tp_sizes, num_tokens)
            handoff = gpu_engines.serve(tp_sizes, request)[request.request_id].handoff
            assert handoff is not None
            assert (handoff.transport, handoff.num_pages) == ("cuda-ipc", -(-num_tokens // 16))

    def test_only_pages_that_decode_has_not_cached_travel(
        self, gpu_engines: Engines, tp_sizes: tuple[int, int]
    ) -> None:
        test_only_pages_that_decode_has_not_cached_are_handed_over(gpu_engines, tp_sizes)

    def test_a_preempted_stream_is_computed_again(self, gpu_engines: Engines, tp_sizes: tuple[int, int]) -> None:
        test_a_preempted_stream_is_computed_again_by_all_ranks_of_decode(gpu_engines, tp_sizes)

    def test_an_abort_frees_the_pages_of_both_engines(self, gpu_engines: Engines, tp_sizes: tuple[int, int]) -> None:
        test_an_abort_during_a_transfer_frees_the_pages_of_both_engines(gpu_engines, tp_sizes)
