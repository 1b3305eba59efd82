"""A node refuses what it cannot do at its start, with an error that names the flag and what helps."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist import cli
from kvist.cluster.ports import free_ports
from kvist.errors import ConfigError
from kvist.mooncake.requirements import library_obstacle
from kvist.nodes.config import PoolOptions, split_address
from kvist.nodes.master_program import check_program, program_flags
from kvist.nodes.ssd_folder import RunNote, SsdFolder

needs_mooncake = pytest.mark.skipif(bool(library_obstacle()), reason=library_obstacle())


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["store", "--hicache-mooncake-protocol", "carrier-pigeon"], ["--hicache-mooncake-protocol", "tcp, rdma"]),
        (
            ["store", "--hicache-mooncake-device", "mlx5_0"],
            ["--hicache-mooncake-device mlx5_0", "--hicache-mooncake-protocol rdma"],
        ),
        (["store", "--host", "0.0.0.0"], ["--host 0.0.0.0", "--advertise-host"]),
        (["store", "--advertise-host", "192.0.2.1"], ["192.0.2.1", "--advertise-host"]),
        (["store", "--ssd-path", "pages"], ["--ssd-path pages", "absolute"]),
        (["store", "--ssd-path", "/no/such/folder"], ["/no/such/folder", "mkdir -p"]),
        (["store", "--ssd-size", "1"], ["--ssd-size 1", "add --ssd-path"]),
        (["store", "--segment-size", "0"], ["--segment-size", "at least"]),
        (["store", "--hicache-mooncake-master-addr", "10.0.0.5"], ["10.0.0.5", "HOST:PORT"]),
        (["store", "--hicache-mooncake-master-url", "10.0.0.5:9003"], ["--hicache-mooncake-master-url", "http://"]),
        (["store", "drain"], ["kvist store drain http://HOST:9301"]),
        (["store", "drian"], ["drian"]),
        (["master", "--mooncake-master-path", "/no/such/program"], ["--mooncake-master-path", "/no/such/program"]),
        (["master", "--hot-page-replication", "always"], ["--hot-page-replication", "off, observe, enforce"]),
    ],
)
@needs_mooncake
def test_wrong_settings_name_the_flag_and_the_remedy(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == cli.USAGE_ERROR
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@needs_mooncake
@pytest.mark.parametrize(("verb", "flag"), [("store", "--port"), ("master", "--port"), ("master", "--rpc-port")])
def test_a_port_in_use_is_an_error_with_its_flag(
    verb: str, flag: str, taken_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    [other] = free_ports(1)
    rest = [] if verb == "store" else ["--rpc-port" if flag == "--port" else "--port", str(other)]
    assert cli.main([verb, flag, str(taken_port), *rest]) == cli.USAGE_ERROR
    message = capsys.readouterr().err
    assert f"{flag} {taken_port}" in message
    assert "choose another port" in message


@needs_mooncake
def test_a_store_without_a_master_ends_with_the_address_it_has_tried(capsys: pytest.CaptureFixture[str]) -> None:
    [port] = free_ports(1)
    argv = ["store", "--port", "0", "--hicache-mooncake-master-addr", f"127.0.0.1:{port}", "--master-timeout-s", "1"]
    assert cli.main(argv) == 1
    message = capsys.readouterr().err
    assert f"no Mooncake master at 127.0.0.1:{port}" in message
    assert "--hicache-mooncake-master-addr" in message


def test_an_address_may_be_a_url() -> None:
    assert split_address("http://10.0.0.5:50051") == split_address("10.0.0.5:50051") == ("10.0.0.5", 50051)
    assert split_address("[::1]:50051") == ("::1", 50051)


def test_a_folder_is_used_by_one_store_at_a_time(tmp_path: Path) -> None:
    first = SsdFolder(tmp_path)
    with pytest.raises(ConfigError, match="another store uses this folder"):
        SsdFolder(tmp_path)
    first.close()
    SsdFolder(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, as_unprivileged_user: None) -> None:
    del as_unprivileged_user
    with pytest.raises(ConfigError, match=r"--ssd-path .* cannot write there"):
        SsdFolder(tmp_path)


def test_the_note_of_a_run_stays_until_the_run_ends_in_order(tmp_path: Path) -> None:
    folder, note = SsdFolder(tmp_path), RunNote(client_id="7-9", segment_name="10.0.0.7:9301")
    assert folder.note() is None
    folder.write_note(note)
    folder.close()
    after_crash = SsdFolder(tmp_path)
    assert after_crash.note() == note
    (tmp_path / "kvist-store.json").write_bytes(b"{torn")
    assert after_crash.note() is None
    after_crash.write_note(note)
    after_crash.remove_note()
    assert after_crash.note() is None
    after_crash.close()


def test_the_size_of_an_ssd_is_a_share_of_the_free_space_unless_it_is_given(tmp_path: Path) -> None:
    folder = SsdFolder(tmp_path)
    pages = tmp_path / "file_per_key_dir" / "a" / "b"
    pages.mkdir(parents=True)
    (pages / "default_page").write_bytes(bytes(1000))
    assert folder.contents().num_pages == 1
    assert folder.contents().num_bytes == 1000
    assert folder.capacity_bytes(0.5) == 500_000_000
    free = os.statvfs(tmp_path)
    assert 0 < folder.capacity_bytes(None) <= free.f_blocks * free.f_frsize
    folder.close()


def a_program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit 1\n")
    path.chmod(0o755)
    return path


FLAGS = program_flags(PoolOptions(), host="127.0.0.1", rpc_port=1, metrics_port=2)


def test_a_master_of_another_release_is_refused_with_the_flag_that_it_lacks(tmp_path: Path) -> None:
    known = "\n".join(f"    -{name} (text) type: string" for name in FLAGS)
    check_program(a_program(tmp_path / "same", known), FLAGS)
    newer = a_program(tmp_path / "newer", known.replace("client_ttl", "client_time_to_live"))
    with pytest.raises(ConfigError, match=r"does not know --client_ttl. Install 0.3.13 \(pip install"):
        check_program(newer, FLAGS)
    with pytest.raises(ConfigError, match="does not run"):
        check_program(tmp_path, FLAGS)


def test_snapshots_are_off_and_the_masters_own_http_is_on_loopback() -> None:
    assert (FLAGS["enable_snapshot"], FLAGS["enable_snapshot_restore"]) == ("false", "false")
    assert FLAGS["metrics_host"] == "127.0.0.1"
    flags = program_flags(PoolOptions(ssd_offload=False), host="10.0.0.5", rpc_port=1, metrics_port=2)
    assert (flags["enable_offload"], flags["promotion_on_hit"], flags["metrics_host"]) == (
        "false",
        "false",
        "127.0.0.1",
    )
