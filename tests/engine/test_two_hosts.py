"""Handoffs between two hosts: network namespaces with addresses of their own, and a link that is slow, lossy or cut.

    test ── 10.79.1.0/30 ── prefill (10.78.0.1) ═══ link ═══ (10.78.0.2) decode ── 10.79.2.0/30 ── test

Only the link between the two engines is disturbed: by relay.py, which drops and delays its packets. Needs root,
iproute2 and /dev/net/tun; skipped without them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import zmq

from kvist.channel import ChannelConfig
from kvist.engine.config import EndpointOptions, EngineConfig, EngineOptions, ModelOptions, RuntimeOptions
from kvist.request import Outcome, Role
from kvist.runner.config import RunnerOptions
from kvist.scheduler.config import SchedulerOptions
from kvist.testing.specs import submit_full
from kvist.transfer.config import TransferConfig
from kvist.transfer.liveness import SILENCE_S
from kvist.transfer.mooncake_engine import MooncakeOptions, obstacle
from tests.engine.test_processes import KEY, Engine, make_request, submit_pair, tokens, until

LINK = {"prefill": "10.78.0.1", "decode": "10.78.0.2"}
TEST_SIDE = {"prefill": "10.79.1.2", "decode": "10.79.2.2"}
SHORT, LONG = 300, 7000  # tokens of a prompt: at once, and while the link is disturbed


def run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def delete_network(name: str) -> None:
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    subprocess.run(["ip", "link", "del", f"{name}t"], check=False, capture_output=True)


def delete_networks_of_killed_runs() -> None:
    """A run that was killed leaves its addresses behind, and this one would send to the wrong network."""
    listed = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True).stdout
    for name, pid in re.findall(r"^(kv(\d+)[pd])\b", listed, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            delete_network(name)


def holds_nothing(engine: Engine) -> bool:
    load = engine.load
    return load is not None and load.num_free_pages + load.num_cached_pages == engine.spec.num_pages


class TwoHosts:
    """Two namespaces, a prefill and a decode engine in them, and a unified engine that knows the right tokens."""

    def __init__(self, model_path: Path, folder: Path) -> None:
        self._names = {role: f"kv{os.getpid()}{role[0]}" for role in LINK}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._engines: list[Engine] = []
        self._relay: subprocess.Popen[str] | None = None
        self._model_path, self._folder = model_path, folder

    def start(self) -> None:
        self._make_networks()
        self.prefill = self._start("prefill", self._folder / "one")
        self.decode = self._start("decode", self._folder / "two")
        self.unified = self._start("unified", self._folder / "one")

    def _make_networks(self) -> None:
        delete_networks_of_killed_runs()
        for number, (role, name) in enumerate(self._names.items(), start=1):
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
            run(f"ip link add {name}t type veth peer name {name}g netns {name}")
            run(f"ip addr add 10.79.{number}.1/30 dev {name}t")
            run(f"ip link set {name}t up")
            run(f"ip -n {name} addr add {TEST_SIDE[role]}/30 dev {name}g")
            run(f"ip -n {name} link set {name}g up")
        one, two = self._names.values()
        for role, name in self._names.items():
            run(f"ip -n {name} tuntap add dev link0 mode tun")
            run(f"ip -n {name} addr add {LINK[role]}/24 dev link0")
            run(f"ip -n {name} link set link0 up")
        relay = Path(__file__).parent / "relay.py"
        self._relay = subprocess.Popen(
            [sys.executable, str(relay), one, two], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._relay.stdout is not None
        assert self._relay.stdout.readline() == "ready\n"

    def _start(self, role: str, folder: Path) -> Engine:
        options = EngineOptions(
            model=ModelOptions(model_path=str(self._model_path)),
            runner=RunnerOptions(load_format="dummy", max_total_tokens=8192, num_threads=1),
            runtime=RuntimeOptions(runtime_dir=str(folder)),
            scheduler=SchedulerOptions(chunked_prefill_size=1),  # a long prompt takes seconds
            channel=ChannelConfig(cluster_key=KEY),
            transfer=TransferConfig(disaggregation_transfer_backend="shm,mooncake"),
        )
        if role in LINK:
            endpoint = EndpointOptions(role=Role(role), engine_host="0.0.0.0", engine_advertise_host=LINK[role])
            engine = Engine(
                EngineConfig(options=options, endpoint=endpoint), ("ip", "netns", "exec", self._names[role])
            )
        else:
            engine = Engine(EngineConfig(options=options, endpoint=EndpointOptions(role=Role(role))))
        self._engines.append(engine)
        engine.wait_ready(self._context, TEST_SIDE.get(role))
        return engine

    def disturb(self, **state: float) -> None:
        """Let the link lose, delay and double packets in both directions; without values, repair it."""
        assert self._relay is not None
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.write(json.dumps(state) + "\n")
        self._relay.stdin.flush()
        assert self._relay.stdout.readline() == "ok\n"

    def cut(self, *, up: bool) -> None:
        run(f"ip -n {self._names['prefill']} link set link0 {'up' if up else 'down'}")

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

    def wait_ended(self) -> None:
        until(lambda: self.prefill.ended and self.decode.ended, self.prefill, self.decode)

    def assert_handed_over(self, num_prompt_tokens: int) -> None:
        self.begin(num_prompt_tokens)
        self.wait_ended()
        outcomes = [ended for engine in (self.prefill, self.decode) for ended in engine.ended]
        assert [ended.outcome for ended in outcomes] == [Outcome.FINISHED] * 2, outcomes
        assert tokens(self.prefill, self.decode) == self.expected(num_prompt_tokens)

    def wait_until_pages_travel(self) -> None:
        until(lambda: self.decode.load is not None and self.decode.load.num_in_flight_pages > 0, self.decode)
        time.sleep(0.3)
        assert not self.prefill.ended

    def wait_until_nothing_is_held(self) -> None:
        for engine in (self.prefill, self.decode):
            until(partial(holds_nothing, engine), engine)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
        self._context.destroy(linger=0)
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()
        for name in self._names.values():
            delete_network(name)


def why_not() -> str:
    if reason := obstacle(MooncakeOptions()):
        return reason
    if not shutil.which("ip"):
        return "needs ip: apt install iproute2"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    probe = f"kv{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True).returncode:
        return "this user may not make network namespaces"
    tun = f"ip -n {probe} tuntap add dev link0 mode tun".split()
    made = subprocess.run(tun, check=False, capture_output=True).returncode == 0
    run(f"ip netns del {probe}")
    return "" if made else "this user may not make tun devices"


@pytest.fixture(scope="module")
def two_hosts(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("two-hosts")
    config = msgspec.json.decode((tiny_model_path / "config.json").read_bytes())
    (folder / "model").mkdir()
    config["max_position_embeddings"] = 8192
    (folder / "model" / "config.json").write_bytes(msgspec.json.encode(config))
    made = TwoHosts(folder / "model", folder)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def hosts(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    yield two_hosts
    two_hosts.cut(up=True)
    two_hosts.disturb()


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
    hosts.disturb(**state)
    for num_prompt_tokens in (SHORT, SHORT + 17):
        hosts.assert_handed_over(num_prompt_tokens)
    hosts.wait_until_nothing_is_held()


@pytest.mark.parametrize("how", ["cut", "black hole"])
def test_a_broken_link_ends_the_streams_in_time_and_holds_no_page(hosts: TwoHosts, how: str) -> None:
    hosts.begin(LONG + (how == "cut"))  # another prompt in each case: cached pages would not travel for long
    hosts.wait_until_pages_travel()
    if how == "cut":
        hosts.cut(up=False)
    else:
        hosts.disturb(lost=1.0)
    broken_s = time.monotonic()
    hosts.wait_ended()
    for engine in (hosts.prefill, hosts.decode):
        [ended] = engine.ended
        assert ended.outcome is Outcome.FAILED
        assert ended.error_code in ("worker_lost", "handoff_failed")
    hosts.wait_until_nothing_is_held()
    assert time.monotonic() - broken_s < SILENCE_S + 10
    hosts.cut(up=True)
    hosts.disturb()
    time.sleep(1.0)  # bytes that the link held back may arrive now
    hosts.assert_handed_over(SHORT + 33)
    hosts.wait_until_nothing_is_held()
