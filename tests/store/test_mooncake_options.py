"""The settings of a Mooncake store: flags before the extra config before the environment; nothing is ignored."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import ConfigError, RequestError
from kvist.store.mooncake_options import MooncakeStoreOptions, master_address

MASTER = "10.0.0.1:50051"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER", "PROTOCOL", "DEVICE", "LOCAL_HOSTNAME", "GLOBAL_SEGMENT_SIZE", "TENANT_ID", "CLIENT"):
        monkeypatch.delenv(f"MOONCAKE_{name}", raising=False)


def extra(**keys: object) -> MooncakeStoreOptions:
    return MooncakeStoreOptions(backend_extra_config=json.dumps(keys))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:50051", "10.0.0.1:50051"),
        ("http://10.0.0.1:50051", "10.0.0.1:50051"),
        ("http://master.example:6000/", "master.example:6000"),
        ("master", "master:50051"),
        ("[::1]:50051", "[::1]:50051"),
        ("mooncake://10.0.0.1", "10.0.0.1:50051"),
    ],
)
def test_the_master_is_an_address_or_a_url(text: str, address: str) -> None:
    assert master_address(text) == address
    assert MooncakeStoreOptions(mooncake_master_addr=text).resolved().master == address


@pytest.mark.parametrize("text", ["", "https://h:1", "h:0", "h:65536", "h:port", "a b", "::1:50051", "http://h:1/path"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write HOST:PORT or http://HOST:PORT") as caught:
        MooncakeStoreOptions(mooncake_master_addr=text)
    assert caught.value.param == "mooncake_master_addr"


def test_without_a_master_the_error_names_the_flag() -> None:
    with pytest.raises(ConfigError, match="--hicache-mooncake-master-addr HOST:PORT"):
        MooncakeStoreOptions().resolved()


def test_a_flag_is_stronger_than_the_extra_config_and_this_than_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"MASTER": "c:3", "PROTOCOL": "rdma", "LOCAL_HOSTNAME": "10.0.0.9"}.items():
        monkeypatch.setenv(f"MOONCAKE_{name}", value)
    config = json.dumps({"master_server_address": "b:2", "protocol": "tcp"})
    options = MooncakeStoreOptions(mooncake_master_addr="a:1", backend_extra_config=config).resolved()
    assert (options.master, options.mooncake_protocol, options.mooncake_host) == ("a:1", "tcp", "10.0.0.9")
    assert MooncakeStoreOptions(backend_extra_config=config).resolved().master == "b:2"
    assert MooncakeStoreOptions().resolved().master == "c:3"
    assert MooncakeStoreOptions().resolved().mooncake_protocol == "rdma"


def test_the_keys_of_sglang_are_understood() -> None:
    options = extra(
        master_server_address=MASTER,
        local_hostname="10.0.0.2",
        metadata_server="P2PHANDSHAKE",
        global_segment_size="4gb",
        protocol="rdma",
        device_name="mlx5_0,mlx5_1",
        tenant_id="blue",
        check_server=True,
        standalone_storage=False,
    ).resolved()
    assert options.segment_bytes == 4 << 30
    assert options.location == f"{MASTER}/blue"
    network = options.network("10.0.0.3")
    assert (network.host, network.protocol, network.devices) == ("10.0.0.2", "rdma", ("mlx5_0", "mlx5_1"))
    assert options.resolved() == options
    defaults = MooncakeStoreOptions(mooncake_master_addr=MASTER).resolved()
    assert defaults.network("10.0.0.3").host == "10.0.0.3"
    assert defaults.location == f"{MASTER}/default"


def test_the_port_of_the_masters_figures_is_part_of_its_url() -> None:
    assert extra(master_server_address=MASTER).resolved().master_url == "http://10.0.0.1:9003"
    options = extra(master_server_address=MASTER, master_metrics_port=9103)
    assert options.resolved().master_url == "http://10.0.0.1:9103"
    chosen = dataclasses.replace(options, mooncake_master_url="https://figures:1")
    assert chosen.resolved().master_url == "https://figures:1", "a flag is stronger"


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [(0, 0), (4294967296, 1 << 32), ("4gb", 1 << 32), ("4 GB", 1 << 32), ("512mb", 1 << 29), ("1.5g", 3 << 29)],
)
def test_sizes_are_read_as_mooncake_reads_them(size: object, num_bytes: int) -> None:
    options = extra(master_server_address=MASTER, global_segment_size=size).resolved()
    assert abs(options.segment_bytes - num_bytes) <= 1


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("metadata_server", "http://10.0.0.1:8080/metadata", "without a metadata server"),
        ("standalone_storage", True, "kvist store"),
        ("client_server_address", "10.0.0.1:50052", "kvist store"),
        ("enable_ssd_offload", True, "kvist store"),
        ("master_metrics_port", 0, "a number from 1 to 65535"),
        ("master_metrics_port", True, "a number from 1 to 65535"),
        ("check_server", False, "always checked"),
        ("prefetch_threshold", 512, "--hicache-storage-prefetch-threshold"),
        ("extra_backend_tag", "x", "the model and the layout already"),
        ("global_segment_size", "many", "4gb or 4294967296"),
        ("global_segment_size", True, "4gb or 4294967296"),
        ("protocol", 7, "not a text"),
        ("master_server_adress", MASTER, "did you mean master_server_address?"),
        ("colour", "red", "known are master_server_address"),
        ("device_name", ["mlx5_0"], "it must be one"),
    ],
)
def test_a_key_that_means_nothing_here_is_refused_with_what_to_do(key: str, value: object, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        extra(master_server_address=MASTER, **{key: value}).resolved()
    assert key in caught.value.message
    assert remedy in caught.value.message
    assert caught.value.param == "backend_extra_config"


@pytest.mark.parametrize("text", ["{", "[]", "7", "@/no/such/file.json", '"text"'])
def test_an_extra_config_other_than_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the extra config is not"):
        MooncakeStoreOptions(backend_extra_config=text).resolved()


def test_the_key_of_the_master_comes_from_a_file_that_must_have_one(tmp_path: Path) -> None:
    path = tmp_path / "key"
    options = MooncakeStoreOptions(mooncake_master_addr=MASTER, mooncake_master_api_key_file=str(path)).resolved()
    for content in (None, b"", b"two words\n", b"\xff\xfe"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=str(path)) as caught:
            options.master_api_key()
        assert caught.value.param == "mooncake_master_api_key_file"
    path.write_text("sk-of-the-master\n")
    assert options.master_api_key() == "sk-of-the-master"
    assert "sk-of" not in str(dataclasses.asdict(options))
    with pytest.raises(RequestError):
        options.with_request({"mooncake_master_api_key_file": "/etc/passwd"}, ())


def test_the_extra_config_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.json"
    path.write_text(json.dumps({"master_server_address": MASTER}))
    assert MooncakeStoreOptions(backend_extra_config=f"@{path}").resolved().master == MASTER


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MOONCAKE_TE_META_DATA_SERVER", "http://h:1/metadata"), ("MOONCAKE_CLIENT", "h:1"), ("MOONCAKE_MASTER", "a b")],
)
def test_a_variable_that_cannot_be_followed_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=variable):
        MooncakeStoreOptions(mooncake_master_addr=MASTER).resolved()


def test_a_client_of_http_reaches_only_the_masters_of_the_worker() -> None:
    ours = MooncakeStoreOptions(mooncake_master_addr=MASTER)
    assert ours.with_request({"mooncake_master_addr": f"http://{MASTER}"}, ()) == ours.resolved()
    assert ours.with_request({"mooncake_replica_num": 2}, ()).mooncake_replica_num == 2
    with pytest.raises(RequestError, match="--hicache-storage-roots mooncake://other:1") as caught:
        ours.with_request({"mooncake_master_addr": "other:1"}, ())
    assert caught.value.param == "mooncake_master_addr"
    assert ours.with_request({"mooncake_master_addr": "other:1"}, ("/mnt", "mooncake://other:1")).master == "other:1"
    assert (
        MooncakeStoreOptions().with_request({"mooncake_master_addr": MASTER}, [f"mooncake://{MASTER}"]).master == MASTER
    )
    with pytest.raises(RequestError):
        MooncakeStoreOptions().with_request({"mooncake_master_addr": MASTER}, ())


@pytest.mark.parametrize(
    "field",
    [
        {"mooncake_segment_size": 100.0},
        {"mooncake_local_cache_size": 100.0},
        {"mooncake_host": "10.0.0.5"},
        {"mooncake_protocol": "rdma"},
        {"mooncake_tenant_id": "red"},
        {"backend_extra_config": '{"local_hostname": "10.0.0.5"}'},
        {"backend_extra_config": '{"master_metrics_port": 9004}'},
        {"backend_extra_config": "@/etc/passwd"},
    ],
)
def test_a_client_of_http_changes_nothing_else(field: dict[str, str | float]) -> None:
    with pytest.raises(RequestError, match="a client cannot"):
        MooncakeStoreOptions(mooncake_master_addr=MASTER).with_request(field, ())


@given(st.text(max_size=30))
def test_no_text_as_an_extra_config_raises_another_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        MooncakeStoreOptions(mooncake_master_addr=MASTER, backend_extra_config=text.lstrip("@")).resolved()
