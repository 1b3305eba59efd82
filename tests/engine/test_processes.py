"""Real engine processes with a tiny dummy model, driven over their sockets."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from kvist import wire
from kvist.channel import ChannelConfig, Member
from kvist.engine.config import (
    EndpointOptions,
    EngineConfig,
    EngineOptions,
    HostTierConfig,
    ModelOptions,
    RuntimeOptions,
    WatchOptions,
)
from kvist.engine.messages import DRAIN, STOP, Ready, StartFailed, decode_line
from kvist.kv.keys import page_digests
from kvist.mooncake.requirements import library_obstacle
from kvist.request import EngineRequest, HandoffId, Mode, Outcome, RequestId, Role, SamplingParams
from kvist.runner.config import RunnerOptions
from kvist.scheduler.config import SchedulerOptions
from kvist.store.config import StorageConfig
from kvist.testing.specs import submit_full
from kvist.transfer.config import TransferConfig
from tests.preloaded import start_engine

pytestmark = pytest.mark.e2e

DEADLINE_S = 60.0
KEY = "the key of this cluster"
PATIENT = WatchOptions(gateway_timeout_s=300)  # a test sends nothing while it waits for an answer
SLOW = SchedulerOptions(chunked_prefill_size=1)  # one token per step: a long prompt takes seconds


class Engine:
    """One engine process with this process as its parent, and a gateway's socket to the engine."""

    def __init__(self, config: EngineConfig, network: str | None = None) -> None:
        """`network`: the name of the engine's network namespace, else that of this process."""
        self.process = start_engine(num_followers=config.options.runner.tp - 1, network=network)
        self.process.stdin.write(msgspec.json.encode(config) + b"\n")
        self.process.stdin.flush()
        self.chunks: list[wire.TokenChunk] = []
        self.ended: list[wire.Ended] = []
        self.load: wire.LoadReport | None = None
        self.storage: wire.StorageAnswer | None = None
        self._decoder = wire.Decoder(wire.EngineToGateway)

    def wait_ready(self, context: zmq.Context[zmq.Socket[bytes]], host: str | None = None) -> None:
        """Wait for the engine, and connect: to its advertised host, or to another address of it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if isinstance(announced := decode_line(line), Ready):
                self.spec = announced.spec
                break
        else:
            raise AssertionError("the engine did not start")
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        member = Member(KEY)
        member.secure_client(self.socket)
        self.socket.setsockopt(zmq.IDENTITY, member.new_address())
        port = self.spec.endpoint.rpartition(":")[2]
        self.socket.connect(self.spec.endpoint if host is None else f"tcp://{host}:{port}")
        self.send(wire.Hello(gateway_id="test"))

    def send(self, message: wire.GatewayToEngine) -> None:
        self.socket.send(wire.encode(message))

    def tell(self, word: bytes) -> None:
        self.process.stdin.write(word + b"\n")
        self.process.stdin.flush()

    def listen(self) -> None:
        """Handle all messages that have arrived."""
        while self.socket.poll(0):
            match self._decoder.decode(self.socket.recv()):
                case wire.StepOutputs() as outputs:
                    self.chunks += outputs.chunks
                    self.ended += outputs.ended
                case wire.LoadReport() as report:
                    self.load = report
                case wire.StorageAnswer() as answer:
                    self.storage = answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)

    def close(self) -> None:
        self.kill()
        self.process.close()


class Cluster:
    def __init__(self, model_path: Path, runtime_dir: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._model_path, self.runtime_dir = model_path, runtime_dir
        self.engines: list[Engine] = []

    def start(self, *roles: str, **settings: Any) -> list[Engine]:
        """Start engines, and wait until they are ready. The settings are those of `launch`."""
        started = self.launch(*roles, **settings)
        self.wait_ready(started)
        return started

    def wait_ready(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            engine.wait_ready(self._context)

    def launch(
        self,
        *roles: str,
        scheduler: SchedulerOptions | None = None,
        host_tier: HostTierConfig | None = None,
        storage: StorageConfig | None = None,
        transfer: TransferConfig | None = None,
        tp: int = 1,
        **runner: Any,
    ) -> list[Engine]:
        settings = {"max_total_tokens": 8192, "num_threads": tp, **runner}
        options = EngineOptions(
            model=ModelOptions(model_path=str(self._model_path)),
            runner=RunnerOptions(load_format="dummy", tp=tp, **settings),
            runtime=RuntimeOptions(runtime_dir=str(self.runtime_dir)),
            scheduler=scheduler or SchedulerOptions(),
            channel=ChannelConfig(cluster_key=KEY),
            host_tier=host_tier or HostTierConfig(),
            storage=storage or StorageConfig(),
            transfer=transfer or TransferConfig(),
            watch=PATIENT,
        )
        endpoints = [EndpointOptions(role=Role(role)) for role in roles]
        started = [Engine(EngineConfig(options=options, endpoint=endpoint)) for endpoint in endpoints]
        self.engines += started
        return started

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._context.destroy(linger=0)


@pytest.fixture
def model_path(tiny_model_path: Path, tmp_path: Path) -> Path:
    """The tiny model with room for a long prompt."""
    path = tmp_path / "model"
    path.mkdir()
    config = msgspec.json.decode((tiny_model_path / "config.json").read_bytes())
    (path / "config.json").write_bytes(msgspec.json.encode({**config, "max_position_embeddings": 8192}))
    return path


@pytest.fixture
def cluster(model_path: Path, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(model_path, tmp_path / "run")
    yield made
    made.close()


@pytest.fixture
def gpu_cluster(model_path: Path, tmp_path: Path) -> Iterator[Cluster]:
    """Like `cluster`, with a head size that GPU kernels support."""
    config = msgspec.json.decode((model_path / "config.json").read_bytes())
    config.update(hidden_size=256, intermediate_size=704)
    (model_path / "config.json").write_bytes(msgspec.json.encode(config))
    made = Cluster(model_path, tmp_path / "run")
    yield made
    made.close()


def until(condition: Callable[[], object], *engines: Engine) -> None:
    give_up_s = time.monotonic() + DEADLINE_S
    poller = zmq.Poller()
    for engine in engines:
        poller.register(engine.socket, zmq.POLLIN)
    while not condition():
        assert time.monotonic() < give_up_s, [(engine.chunks, engine.ended, engine.load) for engine in engines]
        poller.poll(20)  # with a timeout: some conditions depend on files, not messages
        for engine in engines:
            engine.listen()


def make_request(request_id: str, num_prompt_tokens: int, **sampling: object) -> EngineRequest:
    draw = random.Random(num_prompt_tokens)
    params = {"max_tokens": 20, "temperature": 1.0, "seed": 5, "ignore_eos": True, **sampling}
    return EngineRequest(
        request_id=RequestId(request_id),
        prompt_token_ids=tuple(draw.randrange(3, 128) for _ in range(num_prompt_tokens)),
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
    )


def submit_pair(prefill: Engine, decode: Engine, request: EngineRequest) -> None:
    handoff_id = HandoffId(f"h-{request.request_id}")
    peer = wire.PrefillPeer(worker_id=prefill.spec.worker_id, endpoint=prefill.spec.endpoint, epoch=prefill.spec.epoch)
    prefill.send(wire.Submit(request=request, mode=Mode.PREFILL, handoff_id=handoff_id, target_epoch=decode.spec.epoch))
    decode.send(wire.Submit(request=request, mode=Mode.DECODE, handoff_id=handoff_id, prefill=peer))


def tokens(*engines: Engine) -> list[int]:
    chunks = sorted((chunk for engine in engines for chunk in engine.chunks), key=lambda chunk: chunk.position)
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def test_the_engine_spec_has_numbers_for_every_limit_left_to_auto(cluster: Cluster) -> None:
    (engine,) = cluster.start("unified", scheduler=SchedulerOptions(max_prefill_tokens=96))
    assert engine.spec.max_running_requests == 96


def test_prefill_and_decode_processes_give_the_tokens_of_one_engine(cluster: Cluster) -> None:
    unified, prefill, decode = cluster.start("unified", "prefill", "decode")
    request = make_request("r", 700)
    unified.send(submit_full(request))
    submit_pair(prefill, decode, request)
    until(lambda: unified.ended and prefill.ended and decode.ended, unified, prefill, decode)
    for engine in (unified, prefill, decode):
        assert [ended.outcome for ended in engine.ended] == [Outcome.FINISHED]
    assert len(tokens(unified)) == 20
    assert tokens(prefill, decode) == tokens(unified)
    assert tokens(prefill) == tokens(unified)[:1]
    handoff = decode.chunks[0].handoff
    assert handoff is not None
    assert handoff.num_pages == -(-700 // 16)


OVER_MOONCAKE = TransferConfig(disaggregation_transfer_backend="mooncake")
needs_mooncake = pytest.mark.skipif(bool(library_obstacle()), reason=library_obstacle() or "-")


@needs_mooncake
def test_a_handoff_over_mooncake_gives_the_tokens_of_one_engine(cluster: Cluster) -> None:
    unified, prefill, decode = cluster.start("unified", "prefill", "decode", transfer=OVER_MOONCAKE)
    for num_prompt_tokens in (700, 1, 16, 333):
        assert_pair_equals_unified(unified, prefill, decode, num_prompt_tokens)


@needs_mooncake
def test_prefill_killed_while_it_writes_over_mooncake_frees_the_pages_of_decode(cluster: Cluster) -> None:
    assert_killed_prefill_frees_pages(*cluster.start("prefill", "decode", scheduler=SLOW, transfer=OVER_MOONCAKE))


ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": "float32", "attention_backend": "torch"}  # exact, as on a CPU


def assert_pair_equals_unified(unified: Engine, prefill: Engine, decode: Engine, num_prompt_tokens: int) -> None:
    request = make_request(f"r{num_prompt_tokens}", num_prompt_tokens)
    for engine in (unified, prefill, decode):
        engine.chunks.clear()
        engine.ended.clear()
    unified.send(submit_full(request))
    submit_pair(prefill, decode, request)
    until(lambda: unified.ended and prefill.ended and decode.ended, unified, prefill, decode)
    for engine in (unified, prefill, decode):
        assert [ended.outcome for ended in engine.ended] == [Outcome.FINISHED], engine.ended
    assert len(tokens(unified)) == 20
    assert tokens(prefill, decode) == tokens(unified)
    handoff = decode.chunks[0].handoff
    assert handoff is not None
    assert handoff.num_pages == -(-num_prompt_tokens // 16)


@pytest.mark.gpu
@pytest.mark.timeout(300)  # kernels may have to be compiled
def test_prefill_and_decode_on_one_gpu_equal_unified(gpu_cluster: Cluster) -> None:
    unified, prefill, decode = gpu_cluster.start("unified", "prefill", "decode", **ON_GPU)
    for num_prompt_tokens in (1, 16, 17, 700):
        assert_pair_equals_unified(unified, prefill, decode, num_prompt_tokens)


HOST_TIER = HostTierConfig(enable_hierarchical_cache=True, hicache_ratio=8.0)


def assert_host_tier_gives_the_same_tokens(
    cluster: Cluster, write_policy: str = "write_through", **settings: Any
) -> None:
    """Use a device pool of 64 pages, too small for two of these prompts: the first is loaded from the host tier."""
    (alone,) = cluster.start("unified", **settings)
    host_tier = replace(HOST_TIER, hicache_write_policy=write_policy)
    small = {**settings, "max_total_tokens": 1024, "host_tier": host_tier}
    unified, prefill, decode = cluster.start("unified", "prefill", "decode", **small)
    for round_ in range(2):
        for num_prompt_tokens in (700, 800, 900):
            request = make_request(f"{round_}-{num_prompt_tokens}", num_prompt_tokens)
            for engine in (alone, unified, prefill, decode):
                engine.chunks.clear()
                engine.ended.clear()
            alone.send(submit_full(request))
            unified.send(submit_full(request))
            submit_pair(prefill, decode, request)
            until(lambda: alone.ended and unified.ended and prefill.ended and decode.ended, *cluster.engines)
            assert len(tokens(alone)) == 20
            assert tokens(unified) == tokens(alone)
            assert tokens(prefill, decode) == tokens(alone)
            if round_:
                assert unified.chunks[0].num_cached_tokens == (num_prompt_tokens - 1) // 16 * 16
    for engine in (unified, prefill, decode):

        def loaded(engine: Engine = engine) -> bool:
            return engine.load is not None and engine.load.totals["host_load_bytes"] > 0

        until(loaded, engine)
        assert engine.load is not None
        assert engine.load.totals["host_failed_pages"] == 0
        assert sum(engine.load.num_host_pages.values()) == 512


@pytest.mark.parametrize("write_policy", ["write_through", "write_back"])
def test_pages_loaded_from_the_host_tier_give_the_same_tokens(cluster: Cluster, write_policy: str) -> None:
    assert_host_tier_gives_the_same_tokens(cluster, write_policy)


@pytest.mark.gpu
@pytest.mark.timeout(300)  # kernels may have to be compiled
@pytest.mark.parametrize("write_policy", ["write_through", "write_back"])
def test_gpu_pages_loaded_from_the_host_tier_give_the_same_tokens(gpu_cluster: Cluster, write_policy: str) -> None:
    assert_host_tier_gives_the_same_tokens(gpu_cluster, write_policy, mem_fraction_static=0.1, **ON_GPU)


@pytest.mark.gpu
@pytest.mark.timeout(300)  # kernels may have to be compiled
def test_prefill_and_decode_on_two_gpus_equal_unified(gpu_cluster: Cluster) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    [prefill, unified] = gpu_cluster.start("prefill", "unified", **ON_GPU)
    [decode] = gpu_cluster.start("decode", base_gpu_id=1, **ON_GPU)
    for num_prompt_tokens in (1, 16, 17, 700):
        assert_pair_equals_unified(unified, prefill, decode, num_prompt_tokens)


@pytest.mark.gpu
@pytest.mark.timeout(300)  # kernels may have to be compiled
def test_decode_killed_during_a_transfer_on_a_gpu_leaves_prefill_serving(gpu_cluster: Cluster) -> None:
    """The memory of decode is still mapped, and perhaps written to, when decode dies."""
    prefill, decode = gpu_cluster.start("prefill", "decode", scheduler=SLOW, **ON_GPU)
    submit_pair(prefill, decode, make_request("r", 7000))
    until(lambda: decode.load is not None and decode.load.num_in_flight_pages > 0, decode)
    decode.kill()
    until(lambda: prefill.ended, prefill)
    assert [ended.outcome for ended in prefill.ended] == [Outcome.FAILED]
    [other] = gpu_cluster.start("decode", **ON_GPU)
    submit_pair(prefill, other, make_request("again", 40))
    until(lambda: other.ended, prefill, other)
    assert [ended.outcome for ended in other.ended] == [Outcome.FINISHED]


@pytest.mark.gpu
@pytest.mark.timeout(300)  # kernels may have to be compiled
@pytest.mark.parametrize("backend", ["host-staged", pytest.param("mooncake", marks=needs_mooncake)])
def test_pages_travel_through_host_memory_from_and_to_a_gpu(gpu_cluster: Cluster, backend: str) -> None:
    """float32 on both: the two kinds of device round differently, but not by so much that a token changes."""
    transfer = TransferConfig(disaggregation_transfer_backend=backend)
    unified, *on_gpu = gpu_cluster.start("unified", "prefill", "decode", transfer=transfer, **ON_GPU)
    on_cpu = gpu_cluster.start("prefill", "decode", transfer=transfer, **{**ON_GPU, "device": "cpu"})
    pairs = [(on_gpu[0], on_cpu[1]), (on_cpu[0], on_gpu[1]), (on_gpu[0], on_gpu[1])]
    for number, (prefill, decode) in enumerate(pairs):
        for num_prompt_tokens in (1, 17, 700):
            assert_pair_equals_unified(unified, prefill, decode, num_prompt_tokens + number)
            handoff = decode.chunks[0].handoff
            assert handoff is not None
            assert handoff.transport == backend


def test_two_tensor_parallel_ranks_give_the_tokens_of_one_and_end_together(cluster: Cluster) -> None:
    [one] = cluster.start("unified")
    [two] = cluster.start("unified", tp=2)
    assert (two.spec.tp_size, two.spec.namespace) == (2, one.spec.namespace)
    request = make_request("r", 100, temperature=0.0)
    for engine in (one, two):
        engine.send(submit_full(request))
    until(lambda: one.ended and two.ended, one, two)
    assert tokens(one) == tokens(two)
    two.process.stdin.close()
    assert two.process.wait(timeout=60) == 0, "it waits for its ranks to end"


def assert_ranks_give_the_same_tokens_with_a_host_tier(cluster: Cluster, **settings: Any) -> None:
    """As with one rank: a page loaded from the host tier gives the same answer as when it was computed."""
    folder = str(cluster.runtime_dir / "pages")
    storage = StorageConfig(hicache_storage_backend="file", hicache_storage_options={"path": folder})
    small = {**settings, "max_total_tokens": 1024, "host_tier": HOST_TIER, "storage": storage}
    (engine,) = cluster.start("unified", tp=2, **small)
    answers: list[list[int]] = []
    for length in (700, 800, 900, 700, 800, 900):
        engine.chunks.clear()
        engine.ended.clear()
        request = make_request(f"{len(answers)}", length)
        engine.send(submit_full(request))
        until(lambda: engine.ended, engine)
        assert [ended.outcome for ended in engine.ended] == [Outcome.FINISHED], engine.ended
        assert engine.chunks[0].num_cached_tokens == ((length - 1) // 16 * 16 if len(answers) > 2 else 0)
        answers.append(tokens(engine))
    assert answers[:3] == answers[3:]
    assert all(len(set(answer)) > 5 for answer in answers)


def test_two_ranks_that_share_a_pool_load_its_pages_from_the_host_tier(cluster: Cluster) -> None:
    assert_ranks_give_the_same_tokens_with_a_host_tier(cluster)


@pytest.mark.gpu
@pytest.mark.timeout(300)  # kernels may have to be compiled
@pytest.mark.parametrize("num_kv_heads", [2, 1])  # with one KV head, both ranks have it
def test_two_gpus_load_their_slices_of_the_pages_from_the_host_tier(
    gpu_cluster: Cluster, model_path: Path, num_kv_heads: int
) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    config = msgspec.json.decode((model_path / "config.json").read_bytes())
    (model_path / "config.json").write_bytes(msgspec.json.encode({**config, "num_key_value_heads": num_kv_heads}))
    assert_ranks_give_the_same_tokens_with_a_host_tier(gpu_cluster, mem_fraction_static=0.1, **ON_GPU)


def test_a_killed_rank_ends_its_engine_and_fails_the_open_requests(cluster: Cluster, tmp_path: Path) -> None:
    [engine] = cluster.start("unified", tp=2)
    children = Path(f"/proc/{engine.process.pid}/task/{engine.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    engine.send(submit_full(make_request("r", 100)))
    until(lambda: engine.ended, engine)
    assert [(ended.outcome, ended.error_code) for ended in engine.ended] == [(Outcome.FAILED, "unavailable")]
    assert engine.process.wait(timeout=60) == 1
    assert list((tmp_path / "run").glob("pool-*")) == list((tmp_path / "run").glob("tp-*")) == []


def test_prefill_killed_during_a_transfer_fails_the_decode_request_and_frees_its_pages(cluster: Cluster) -> None:
    assert_killed_prefill_frees_pages(*cluster.start("prefill", "decode", scheduler=SLOW))


def assert_killed_prefill_frees_pages(prefill: Engine, decode: Engine) -> None:
    submit_pair(prefill, decode, make_request("r", 7000))
    until(lambda: decode.load is not None and decode.load.num_in_flight_pages > 0, decode)
    assert not prefill.ended
    prefill.kill()
    until(lambda: decode.ended, decode)
    [ended] = decode.ended
    assert ended.outcome is Outcome.FAILED
    assert ended.error_code in ("worker_lost", "handoff_failed")
    until(lambda: decode.load is not None and decode.load.num_in_flight_pages == 0, decode)
    assert decode.load is not None
    assert decode.load.num_free_pages + decode.load.num_cached_pages == decode.spec.num_pages


def test_a_stopped_engine_fails_its_open_requests_and_removes_its_pool(cluster: Cluster, tmp_path: Path) -> None:
    [engine] = cluster.start("unified", scheduler=SLOW)
    engine.send(submit_full(make_request("r", 7000)))
    until(lambda: engine.load is not None and engine.load.num_running == 1, engine)
    engine.tell(STOP)
    until(lambda: engine.ended, engine)
    assert [(ended.outcome, ended.error_code) for ended in engine.ended] == [(Outcome.FAILED, "unavailable")]
    assert engine.process.wait(timeout=60) == 0
    assert list((tmp_path / "run").glob("pool-*")) == []


@pytest.mark.case("signal-to-all")
def test_an_engine_with_a_parent_ignores_signals_and_drains_on_a_line_of_stdin(
    cluster: Cluster, tmp_path: Path
) -> None:
    [engine] = cluster.start("unified")
    engine.send(submit_full(make_request("open", 300, max_tokens=100)))
    until(lambda: engine.chunks, engine)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        engine.process.send_signal(number)
    engine.tell(DRAIN)
    until(lambda: engine.load is not None and engine.load.draining, engine)
    engine.send(submit_full(make_request("late", 10)))
    assert engine.process.wait(timeout=60) == 0
    engine.listen()
    ended = {str(each.request_id): (each.outcome, each.error_code) for each in engine.ended}
    assert ended["open"] == (Outcome.FINISHED, None)
    assert ended.get("late", (Outcome.FAILED, "unavailable")) == (Outcome.FAILED, "unavailable")
    assert list((tmp_path / "run").glob("pool-*")) == []


def test_an_engine_ends_when_its_parent_dies(cluster: Cluster) -> None:
    [engine] = cluster.start("unified")
    engine.process.stdin.close()
    assert engine.process.wait(timeout=60) == 0


def test_the_next_start_removes_the_pool_of_a_killed_engine(cluster: Cluster, tmp_path: Path) -> None:
    [engine] = cluster.start("unified")
    engine.kill()
    left = set((tmp_path / "run").glob("pool-*"))
    assert len(left) == 1
    cluster.start("unified")
    assert not left & set((tmp_path / "run").glob("pool-*"))


def test_an_unreadable_message_is_dropped_and_counted(cluster: Cluster) -> None:
    [engine] = cluster.start("unified")
    engine.socket.send(b"\xc1 this is no message")
    engine.socket.send(b"\x82\xa4type\xa5Hello\xaagateway_id\xa1\xff")  # invalid UTF-8
    engine.socket.send(b"\x82\xa4type\xa5Hello\xa1x" + b"\x81\xa1a" * 1000)  # nested too deep
    engine.send(submit_full(make_request("bad", 5, seed=-1)))
    engine.send(submit_full(make_request("good", 5)))
    until(lambda: engine.load is not None and engine.load.totals["undecodable_messages"] == 3, engine)
    until(lambda: len(engine.ended) == 2, engine)
    assert {(ended.request_id, ended.outcome) for ended in engine.ended} == {
        ("bad", Outcome.FAILED),
        ("good", Outcome.FINISHED),
    }


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        (b'{"options": {"model": {"model_path": "/nowhere"}}}\n', "model_load_error", "/nowhere"),
        (b'{"options": {"host_tier": {"hicache_ratio": 3}}}\n', "config_error", "add --enable-hierarchical-cache"),
        (
            b'{"options": {"storage": {"hicache_storage_backend": "file"}}}\n',
            "config_error",
            "add --enable-hierarchical-cache",
        ),
        (b'{"options": {"runer": {}}}\n', "config_error", "options have no runer; did you mean runner?"),
        (b'{"model_path": "/nowhere"}\n', "config_error", "settings have no model_path"),
        (b"not json\n", "config_error", "cannot be read"),
        (b"", "config_error", "standard input"),
    ],
)
def test_a_failed_start_logs_one_line_with_the_reason_and_exits_with_1(settings: bytes, code: str, says: str) -> None:
    process = start_engine()
    process.stdin.write(settings)
    if settings:
        process.stdin.flush()  # the pipe stays open: its end would end the engine without a report
    else:
        process.stdin.close()
    assert process.stdout is not None
    failed = [each for line in process.stdout if isinstance(each := decode_line(line), StartFailed)]
    assert process.wait(timeout=60) == 1
    process.close()
    assert [each.code for each in failed] == [code]
    assert says in failed[0].message


def test_a_restarted_engine_restores_its_persisted_pages_and_gives_the_same_tokens(
    cluster: Cluster, tmp_path: Path
) -> None:
    host_tier = HostTierConfig(enable_hierarchical_cache=True, hicache_persist=str(tmp_path / "kept"))

    def answer(expected_cached: int) -> list[int]:
        (engine,) = cluster.start("unified", host_tier=host_tier)
        engine.send(submit_full(make_request("r", 700)))
        until(lambda: engine.ended, engine)
        assert [ended.outcome for ended in engine.ended] == [Outcome.FINISHED]
        assert engine.chunks[0].num_cached_tokens == expected_cached
        num_pages = 700 // 16  # pages of the prompt; the pages of the answer are persisted with them
        until(lambda: engine.load is not None and written(engine.load) >= num_pages, engine)
        engine.kill()
        return tokens(engine)

    def written(load: wire.LoadReport) -> float:
        return load.totals["host_backed_up_pages"] + load.totals["host_loaded_pages"]

    computed = answer(0)
    assert answer(700 // 16 * 16) == computed


def test_an_engine_killed_during_a_backup_leaves_only_whole_pages(cluster: Cluster, tmp_path: Path) -> None:
    host_tier = HostTierConfig(enable_hierarchical_cache=True, hicache_persist=str(tmp_path / "kept"))
    requests = [make_request(f"r{length}", length) for length in range(200, 210)]

    def ask(engine: Engine) -> None:
        for request in requests:
            engine.send(submit_full(request))

    def answers(engine: Engine) -> tuple[dict[str, list[int]], int]:
        """Return the tokens of each answer, and the number of cached prompt tokens."""
        engine.chunks.clear()
        engine.ended.clear()
        ask(engine)
        until(lambda: len(engine.ended) == len(requests), engine)
        tokens_of: dict[str, list[int]] = {}
        for chunk in sorted(engine.chunks, key=lambda chunk: chunk.position):
            tokens_of.setdefault(chunk.request_id, []).extend(chunk.token_ids)
        return tokens_of, sum(chunk.num_cached_tokens or 0 for chunk in engine.chunks)

    (engine,) = cluster.start("unified", host_tier=host_tier)
    ask(engine)
    engine.send(submit_full(make_request("copied meanwhile", 5000)))
    until(lambda: engine.load is not None and engine.load.totals["host_backed_up_pages"] > 0, engine)
    engine.kill()
    (again,) = cluster.start("unified", host_tier=host_tier)
    restored, num_cached = answers(again)
    assert num_cached > 0
    again.load = None
    until(lambda: again.load is not None and not again.load.num_host_pages["in_flight"], again)  # not flushed
    again.send(wire.FlushCache(call_id="f"))
    computed, num_cached = answers(again)
    assert num_cached == 0
    assert restored == computed
    assert all(len(token_ids) == 20 for token_ids in computed.values())


def test_an_engine_without_memory_for_its_host_tier_names_the_flag_and_ends(model_path: Path, tmp_path: Path) -> None:
    options = EngineOptions(
        model=ModelOptions(model_path=str(model_path)),
        runner=RunnerOptions(load_format="dummy", max_total_tokens=8192, num_threads=1),
        runtime=RuntimeOptions(runtime_dir=str(tmp_path / "run")),
        host_tier=HostTierConfig(enable_hierarchical_cache=True, hicache_size=1e6),
    )
    engine = Engine(EngineConfig(options=options))
    assert engine.process.stdout is not None
    failures = [each for line in engine.process.stdout if isinstance(each := decode_line(line), StartFailed)]
    assert engine.process.wait(timeout=60) == 1
    engine.close()
    assert [each.code for each in failures] == ["config_error"]
    assert "lower --hicache-size" in failures[0].message
    assert list((tmp_path / "run").glob("pool-*")) == []


def test_pages_stored_before_a_worker_was_killed_serve_a_worker_that_attaches_the_store(
    cluster: Cluster, tmp_path: Path
) -> None:
    def answer(engine: Engine, request_id: str, **changes: object) -> None:
        engine.chunks.clear()
        engine.ended.clear()
        request = msgspec.structs.replace(make_request(request_id, 4000), **changes)
        engine.send(submit_full(request))

    def num_leading() -> int:
        """Return how many leading pages of the prompt (without salt) are stored, and so could be fetched."""
        stored = {path.stem for path in (tmp_path / "pages").rglob("*.page")}
        digests = page_digests(make_request("r", 4000).prompt_token_ids, 16, engine.spec.namespace)
        return next((index for index, digest in enumerate(digests) if digest.hex() not in stored), len(digests))

    storage = StorageConfig(hicache_storage_backend="file", hicache_storage_options={"path": str(tmp_path / "pages")})
    (engine,) = cluster.start("unified", host_tier=HOST_TIER, storage=storage)
    answer(engine, "all of it", cache_salt="another")
    until(lambda: engine.ended, engine)
    computed = tokens(engine)
    answer(engine, "cut short")
    until(lambda: num_leading() >= 30, engine)
    engine.kill()

    patient = StorageConfig(hicache_storage_prefetch_policy="wait_complete", hicache_storage_roots=(str(tmp_path),))
    (engine,) = cluster.start("unified", host_tier=HOST_TIER, storage=patient)
    wanted = wire.AttachStore(backend="file", options={"path": str(tmp_path / "pages")})
    engine.send(wire.StorageCommand(call_id="c", action="attach", store=wanted))
    until(lambda: engine.storage, engine)
    assert engine.storage is not None
    assert engine.storage.status is not None, engine.storage.message
    assert engine.storage.status.state == "attached"
    answer(engine, "once more")
    until(lambda: engine.ended, engine)
    assert tokens(engine) == computed
    assert (engine.chunks[0].num_cached_tokens or 0) >= 30 * 16
    until(lambda: engine.load is not None and engine.load.totals["storage_read_bytes"] > 0, engine)
    assert engine.load is not None
    assert engine.load.totals["storage_broken_pages"] == 0
    assert engine.load.storage is not None
    assert engine.load.storage.stored_bytes > 0
