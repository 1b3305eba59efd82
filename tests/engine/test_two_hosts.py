"""Handoffs between two hosts: network namespaces with addresses of their own, and a link that is slow, lossy or cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import zmq

from kvist.channel import ChannelConfig
from kvist.engine.config import EndpointOptions, EngineConfig, EngineOptions, ModelOptions, RuntimeOptions
from kvist.mooncake.requirements import library_obstacle
from kvist.request import Outcome, Role
from kvist.runner.config import RunnerOptions
from kvist.scheduler.config import SchedulerOptions
from kvist.testing.rounds import check_time, in_rounds
from kvist.testing.specs import submit_full
from kvist.testing.waits import wait_until
from kvist.transfer.config import TransferConfig
from kvist.transfer.liveness import SILENCE_S
from tests.engine.test_processes import KEY, PATIENT, Engine, make_request, submit_pair, tokens, until
from tests.engine.two_networks import LINK, TwoNetworks

SHORT, LONG = 300, 7000  # tokens of a prompt: at once, and while the link is disturbed


def holds_nothing(engine: Engine) -> bool:
    load = engine.load
    return load is not None and load.num_free_pages + load.num_cached_pages == engine.spec.num_pages


class TwoHosts:
    """A prefill and a decode engine in two networks, and a unified engine that knows the right tokens."""

    def __init__(self, networks: TwoNetworks, model_path: Path, folder: Path) -> None:
        self.networks = networks
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._engines: list[Engine] = []
        self._model_path, self._folder = model_path, folder
        self._num_long = 0

    def start(self) -> None:
        """Start the engines, all at the same time."""
        self.prefill = self._start("prefill", self._folder / "one", 0)
        self.decode = self._start("decode", self._folder / "two", 1)
        self.unified = self._start("unified", self._folder / "one")
        self.prefill.wait_ready(self._context, self.networks.outside[0])
        self.decode.wait_ready(self._context, self.networks.outside[1])
        self.unified.wait_ready(self._context)

    def _start(self, role: str, folder: Path, network: int | None = None) -> Engine:
        options = EngineOptions(
            model=ModelOptions(model_path=str(self._model_path)),
            runner=RunnerOptions(load_format="dummy", max_total_tokens=8192, num_threads=1),
            runtime=RuntimeOptions(runtime_dir=str(folder)),
            scheduler=SchedulerOptions(chunked_prefill_size=1),  # a long prompt takes seconds
            channel=ChannelConfig(cluster_key=KEY),
            transfer=TransferConfig(disaggregation_transfer_backend="shm,mooncake"),
            watch=PATIENT,
        )
        if network is None:
            engine = Engine(EngineConfig(options=options, endpoint=EndpointOptions(role=Role(role))))
        else:
            endpoint = EndpointOptions(role=Role(role), engine_host="0.0.0.0", engine_advertise_host=LINK[network])
            engine = Engine(EngineConfig(options=options, endpoint=endpoint), self.networks.names[network])
        self._engines.append(engine)
        return engine

    def expected(self, num_prompt_tokens: int) -> list[int]:
        self.unified.chunks.clear()
        self.unified.ended.clear()
        self.unified.send(submit_full(make_request(f"alone-{time.monotonic_ns()}", num_prompt_tokens)))
        until(lambda: self.unified.ended, self.unified)
        return tokens(self.unified)

    def begin(self, num_prompt_tokens: int) -> None:
        for engine in (self.prefill, self.decode):
            engine.chunks.clear()
            engine.ended.clear()
        submit_pair(self.prefill, self.decode, make_request(f"pair-{time.monotonic_ns()}", num_prompt_tokens))

    def begin_a_long_one(self) -> None:
        """Begin with another prompt each time: cached pages would not travel for long."""
        self._num_long += 1
        self.begin(LONG + self._num_long)

    def wait_ended(self) -> None:
        until(lambda: self.prefill.ended and self.decode.ended, self.prefill, self.decode)

    def assert_handed_over(self, num_prompt_tokens: int) -> None:
        self.begin(num_prompt_tokens)
        self.wait_ended()
        outcomes = [ended for engine in (self.prefill, self.decode) for ended in engine.ended]
        assert [ended.outcome for ended in outcomes] == [Outcome.FINISHED] * 2, outcomes
        assert tokens(self.prefill, self.decode) == self.expected(num_prompt_tokens)

    def wait_until_handed_over(self, num_prompt_tokens: int) -> None:
        """Repeat a request until its handoff succeeds, as a gateway repeats it at another pair. The longer the link was
        broken, the longer each kernel waits before it sends the bytes of the old connections again: the first request
        after a repair may still fail."""

        def is_handed_over() -> bool:
            self.begin(num_prompt_tokens)
            self.wait_ended()
            ended = [*self.prefill.ended, *self.decode.ended]
            assert all(each.error_code in (None, "worker_lost", "handoff_failed") for each in ended), ended
            return all(each.outcome is Outcome.FINISHED for each in ended)

        wait_until(is_handed_over)
        assert tokens(self.prefill, self.decode) == self.expected(num_prompt_tokens)

    def wait_until_pages_travel(self) -> None:
        until(lambda: self.decode.load is not None and self.decode.load.num_in_flight_pages > 0, self.decode)
        time.sleep(0.3)
        self.prefill.listen()
        if self.prefill.ended:
            self.wait_ended()
            check_time(False, "the pages have arrived")

    def wait_until_nothing_is_held(self) -> None:
        for engine in (self.prefill, self.decode):
            until(partial(holds_nothing, engine), engine)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
        self._context.destroy(linger=0)
        self.networks.close()


@pytest.fixture(scope="module")
def two_hosts(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if reason := library_obstacle():
        pytest.skip(reason)
    try:
        networks = TwoNetworks()
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("two-hosts")
    config = msgspec.json.decode((tiny_model_path / "config.json").read_bytes())
    (folder / "model").mkdir()
    config["max_position_embeddings"] = 8192
    (folder / "model" / "config.json").write_bytes(msgspec.json.encode(config))
    made = TwoHosts(networks, folder / "model", folder)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def hosts(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    yield two_hosts
    two_hosts.networks.cut(up=True)
    two_hosts.networks.disturb()


pytestmark = pytest.mark.timeout(180)


def test_the_engines_are_on_different_hosts_and_choose_mooncake(hosts: TwoHosts) -> None:
    assert hosts.prefill.spec.host_id != hosts.decode.spec.host_id
    assert [address.transport for address in hosts.decode.spec.transports] == ["shm", "mooncake"]
    hosts.assert_handed_over(SHORT)
    handoff = hosts.decode.chunks[0].handoff
    assert handoff is not None
    assert "mooncake" in str(handoff)


@pytest.mark.parametrize(
    "state",
    [{"delay_s": 0.02}, {"lost": 0.03}, {"delay_s": 0.005, "jitter_s": 0.01, "lost": 0.01, "doubled": 0.02}],
    ids=["delay", "loss", "delay, loss, doubles, another order"],
)
def test_a_slow_and_lossy_link_gives_the_same_tokens(hosts: TwoHosts, state: dict[str, float]) -> None:
    hosts.networks.disturb(**state)
    for num_prompt_tokens in (SHORT, SHORT + 17):
        hosts.assert_handed_over(num_prompt_tokens)
    hosts.wait_until_nothing_is_held()


@pytest.mark.parametrize("how", ["cut", "black hole"])
@in_rounds(3)
def test_a_broken_link_ends_the_streams_in_time_and_holds_no_page(hosts: TwoHosts, how: str) -> None:
    hosts.networks.cut(up=True)
    hosts.networks.disturb()
    hosts.begin_a_long_one()
    hosts.wait_until_pages_travel()
    if how == "cut":
        hosts.networks.cut(up=False)
    else:
        hosts.networks.disturb(lost=1.0)
    broken_s = time.monotonic()
    hosts.wait_ended()
    hosts.wait_until_nothing_is_held()
    held_s = time.monotonic() - broken_s
    ends = [list(engine.ended) for engine in (hosts.prefill, hosts.decode)]
    hosts.networks.cut(up=True)
    hosts.networks.disturb()
    time.sleep(1.0)  # bytes that the link held back may arrive now
    hosts.wait_until_handed_over(SHORT + 33)
    hosts.wait_until_nothing_is_held()
    for [ended] in ends:
        check_time(ended.outcome is not Outcome.FINISHED, "the pages arrived before the link was broken")
        assert ended.outcome is Outcome.FAILED
        assert ended.error_code in ("worker_lost", "handoff_failed")
    check_time(held_s < SILENCE_S + 10, f"pages were held for {held_s:.1f} s")
