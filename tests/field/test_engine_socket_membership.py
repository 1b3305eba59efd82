"""Membership of engine sockets: the cluster key, the identities of members, and where the key comes from."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from kvist import settings, verbs, wire
from kvist.channel import ChannelConfig, EngineChannel, Member, with_cluster_key, with_private_key
from kvist.cluster.plan import plan_cluster
from kvist.errors import ConfigError
from kvist.request import EpochId, HandoffId, RequestId
from kvist.testing.specs import make_peer_spec

KEY = "the key of this cluster"
POOL = wire.PoolAddress(transport="shm", location="/x", num_pages=12, page_bytes=64, layout="l")


class Sockets:
    """The channels of a prefill and a decode engine, and other clients that a test connects to them."""

    def __init__(self, stack: ExitStack) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(self._context.destroy, linger=0)
        self.decode_member = Member(KEY)
        self.prefill = EngineChannel("tcp://127.0.0.1:0", member=Member(KEY))
        stack.callback(self.prefill.close)
        self.decode = EngineChannel("tcp://127.0.0.1:0", member=self.decode_member)
        stack.callback(self.decode.close)

    def dealer(self, address: bytes, member: Member | None) -> zmq.Socket[bytes]:
        """A client of the prefill engine."""
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.setsockopt(zmq.IDENTITY, address)
        if member is not None:
            member.secure_client(dealer)
        dealer.connect(self.prefill.endpoint)
        return dealer

    def grant(self, target_epoch: EpochId) -> wire.Grant:
        return wire.Grant(
            handoff_id=HandoffId("h"),
            request_id=RequestId("r"),
            target_epoch=target_epoch,
            source_epoch=EpochId("p"),
            target=make_peer_spec(POOL),
            first_page=0,
            page_ids=tuple(range(12)),
        )


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    with ExitStack() as stack:
        yield Sockets(stack)


def receive(channel: EngineChannel, bound_s: float = 30.0) -> list[object]:
    """Return the next messages that the channel accepts."""
    for _ in range(int(bound_s / 0.02)):
        if received := channel.recv(0.02):
            return [message for _, message in received]
    return []


def until_dropped(channel: EngineChannel, num_messages: int) -> None:
    for _ in range(1500):
        assert channel.recv(0.02) == []
        if channel.num_unexpected >= num_messages:
            return
    pytest.fail(f"{channel.num_unexpected} messages were dropped")


@pytest.mark.case("forged-grant")
def test_messages_of_a_local_user_without_the_cluster_key_are_dropped(sockets: Sockets) -> None:
    epoch = sockets.decode_member.epoch
    stranger = sockets.dealer(epoch.encode(), None)
    stranger.send(wire.encode(sockets.grant(epoch)))
    assert receive(sockets.prefill, 0.5) == []
    assert not stranger.poll(0)
    sockets.decode.send_to_peer(sockets.prefill.endpoint, sockets.grant(epoch))
    assert receive(sockets.prefill) == [sockets.grant(epoch)]


@pytest.mark.case("forged-grant")
def test_a_grant_with_the_epoch_of_another_engine_is_dropped_and_counted(sockets: Sockets) -> None:
    thief = Member(KEY)
    dealer = sockets.dealer(thief.new_address(), thief)
    dealer.send(wire.encode(sockets.grant(sockets.decode_member.epoch)))
    until_dropped(sockets.prefill, 1)
    dealer.send(wire.encode(sockets.grant(thief.epoch)))  # accepted with its own epoch: the scheduler checks the rest
    assert receive(sockets.prefill) == [sockets.grant(thief.epoch)]


@pytest.mark.case("stolen-identity")
def test_messages_from_the_address_of_another_member_are_dropped(sockets: Sockets) -> None:
    epoch = sockets.decode_member.epoch
    sockets.decode.send_to_peer(sockets.prefill.endpoint, sockets.grant(epoch))
    assert receive(sockets.prefill) == [sockets.grant(epoch)]
    thief = Member(KEY)
    dealers = [sockets.dealer(name, thief) for name in (epoch.encode(), sockets.decode_member.new_address())]
    for dealer in dealers:
        dealer.send(wire.encode(sockets.grant(epoch)))
    until_dropped(sockets.prefill, 2)
    closed = wire.Closed(handoff_id=HandoffId("h"), target_epoch=epoch, source_epoch=EpochId("p"))
    assert sockets.prefill.send(epoch.encode(), closed)
    assert receive(sockets.decode) == [closed]


def test_a_done_with_the_epoch_of_another_prefill_engine_is_dropped(sockets: Sockets) -> None:
    other = EngineChannel("tcp://127.0.0.1:0", member=Member(KEY))
    try:
        epoch = sockets.decode_member.epoch
        sockets.decode.send_to_peer(sockets.prefill.endpoint, sockets.grant(epoch))
        ack = wire.Ack(handoff_id=HandoffId("another"), target_epoch=epoch)
        sockets.decode.send_to_peer(other.endpoint, ack)
        assert receive(other) == [ack]
        other.send(
            epoch.encode(), wire.Closed(handoff_id=HandoffId("h"), target_epoch=epoch, source_epoch=EpochId("p"))
        )
        until_dropped(sockets.decode, 1)
    finally:
        other.close()


# ---------------------------------------------------------------- where the key comes from


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_processes_of_one_user_share_a_key_file(home: Path) -> None:
    first, second = with_cluster_key(ChannelConfig()), with_cluster_key(ChannelConfig())
    assert first.cluster_key == second.cluster_key
    assert len(first.cluster_key or "") == 64
    path = home / "kvist" / "cluster.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["cluster.key"]


def test_a_key_file_is_read_without_its_line_end_and_taken_out_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("  a key of some length \n")
    path.chmod(0o600)
    given = with_cluster_key(ChannelConfig(cluster_key_file=str(path)))
    assert given == ChannelConfig(cluster_key="a key of some length")


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        ("a key of some length", 0o640, "chmod 600"),
        ("a key of some length", 0o604, "chmod 600"),
        ("short", 0o600, "could be guessed"),
        (" " * 64, 0o600, "could be guessed"),
        ("k" * 5000, 0o600, "not a key"),
        (None, 0o600, "make one: (umask 077"),
    ],
)
def test_a_key_file_that_cannot_be_trusted_is_refused_with_the_remedy(
    tmp_path: Path, content: str | None, mode: int, expected: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match="cluster key file") as caught:
        with_cluster_key(ChannelConfig(cluster_key_file=str(path)))
    assert expected in caught.value.message


def test_a_folder_a_pipe_and_a_file_of_another_user_are_refused_as_key_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="not a regular file"):
            with_cluster_key(ChannelConfig(cluster_key_file=str(path)))
    path = tmp_path / "key"
    path.write_text("a key of some length")
    path.chmod(0o600)
    if path.stat().st_uid == 0:
        os.chown(path, 1234, 1234)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(ConfigError, match="belongs to another user"):
        with_cluster_key(ChannelConfig(cluster_key_file=str(path)))


@pytest.mark.parametrize("key", ["", "   ", "short"])
def test_a_blank_or_short_cluster_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="could be guessed"):
        with_cluster_key(ChannelConfig(cluster_key=key))


def test_a_key_and_a_key_file_together_are_refused(tmp_path: Path) -> None:
    config = ChannelConfig(cluster_key=KEY, cluster_key_file=str(tmp_path))
    with pytest.raises(ConfigError, match="use one of them"):
        with_cluster_key(config)


def test_without_a_writable_key_folder_only_a_unified_worker_starts(home: Path) -> None:
    (home / "kvist").write_text("a file where the folder would be")
    alone = with_cluster_key(ChannelConfig(), serves_alone=True)
    assert len(alone.cluster_key or "") == 64
    with pytest.raises(ConfigError, match="--cluster-key-file FILE"):
        with_cluster_key(ChannelConfig())


def read_up(argv: list[str]) -> settings.UpSettings:
    read = settings.read("up", argv, {})
    assert isinstance(read, settings.UpSettings)
    return read


def test_each_start_of_kvist_up_draws_a_key_and_passes_it_by_environment() -> None:
    read = read_up(["--prefill", "1", "--decode", "1"])
    keys = set()
    for _ in range(2):
        up = verbs.with_own_key(read)
        key = up.engine.channel.cluster_key or ""
        keys.add(key)
        for plan in plan_cluster(verbs.cluster_shape(up, {}), [1, 2]):
            assert plan.environ["KVIST_CLUSTER_KEY"] == key
            assert key not in " ".join(plan.argv)
    assert len(keys) == 2


def test_kvist_up_uses_the_key_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    read = read_up(["--cluster-key-file", str(path)])
    up = verbs.with_own_key(read)
    for plan in plan_cluster(verbs.cluster_shape(up, {}), [1, 2]):
        assert plan.environ["KVIST_CLUSTER_KEY"] == path.read_text()
        assert not any("cluster-key-file" in word for word in plan.argv)
    assert with_private_key(replace(up.engine.channel)).cluster_key == path.read_text()
