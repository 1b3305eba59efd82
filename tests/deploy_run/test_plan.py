"""A manifest as processes of one machine: addresses, folders, keys and order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvist.deploy.manifest import read_manifest
from kvist.deploy.render import manifest_text
from kvist.deploy_run.plan import LocalCluster, Place, plan_local, updates
from kvist.errors import ConfigError
from kvist.verbs import option_values
from tests.deploy.test_render import SHAPES, deployment

PLACE = Place(
    folder=Path("/disk"),
    memory_folder=Path("/memory"),
    secret_values={"api-key": "a" * 32, "cluster-key": "c" * 32, "pages-secret": "p" * 32},
    claims={"models": Path("/my/models")},
)
GROUPS = [("rbg", "v1alpha2"), ("rbg", "v1alpha1"), ("kubernetes", "v1alpha2")]


def planned(kind: str = "rbg", version: str = "v1alpha2", shape: str = "pool", **changes: Any) -> LocalCluster:
    return plan_local(read_manifest(text(kind, version, shape, **changes)), PLACE)


def text(kind: str = "rbg", version: str = "v1alpha2", shape: str = "pool", **changes: Any) -> str:
    described = {**SHAPES[shape], **changes}
    return manifest_text(deployment(format=kind, rbg_version=version, **described))


@pytest.mark.parametrize(("kind", "version"), GROUPS)
def test_every_pod_has_an_address_of_its_own(kind: str, version: str) -> None:
    cluster = planned(kind, version)
    assert len(cluster.pods) == 1 + 3 + 2 + 3 + 1
    addresses = [pod.address for pod in cluster.pods]
    assert len(set(addresses)) == len(addresses)
    for pod in cluster.pods:
        assert f"--host={pod.address}" in pod.args
        assert pod.url == f"http://{pod.address}:{pod.port}"
        assert not [arg for arg in pod.args if "0.0.0.0" in arg or "$(" in arg]


@pytest.mark.parametrize(("kind", "version"), GROUPS)
@pytest.mark.parametrize("shape", ["pair", "pool", "gpus"])
def test_the_arguments_of_every_process_can_be_read(kind: str, version: str, shape: str) -> None:
    for pod in planned(kind, version, shape).pods:
        environ = {name: value for name, value in pod.environ.items() if name.startswith("KVIST_")}
        options = option_values(pod.args[0], pod.args[1:], environ)
        assert options["host"] == pod.address
        assert options["api_key"] == ("a" * 32,)


def test_pre_stop_is_sent_to_the_address_of_the_pod() -> None:
    commands = {pod.role: pod.pre_stop for pod in planned().pods if pod.name.endswith("-0")}
    addresses = {pod.role: pod.url for pod in planned().pods if pod.name.endswith("-0")}
    for role in ("prefill", "decode", "router"):
        assert commands[role] == ("kvist", "drain", addresses[role])
    assert commands["mooncake-master"] == ()


def test_the_router_finds_its_workers_in_files() -> None:
    cluster = planned()
    (router,) = [pod for pod in cluster.pods if pod.role == "router"]
    named = [arg.removeprefix("--discovery=file:") for arg in router.args if arg.startswith("--discovery")]
    urls = {url for path in named for url in cluster.discovery[Path(path)]}
    assert urls == {pod.url for pod in cluster.pods if pod.role in ("prefill", "decode")}


def test_the_pool_finds_its_master_by_address() -> None:
    cluster = planned()
    master = next(pod for pod in cluster.pods if pod.role == "mooncake-master")
    for pod in cluster.pods:
        if pod.role in ("mooncake-store", "prefill", "decode"):
            assert f"--hicache-mooncake-master-addr={master.address}:50051" in pod.args
        if pod.role == "mooncake-store":
            assert f"--hicache-mooncake-master-url=http://{master.address}:9003" in pod.args


def test_volumes_are_folders_of_each_pod_in_memory_or_on_disk() -> None:
    cluster = planned()
    worker = next(pod for pod in cluster.pods if pod.name == "decode-1")
    assert "--hicache-persist=/memory/decode-1/host-tier" in worker.args
    assert "--hicache-storage-secret-file=/disk/decode-1/secrets/keys/pages-secret" in worker.args
    assert cluster.secrets[Path("/disk/decode-1/secrets/keys/pages-secret")] == "p" * 32
    store = next(pod for pod in cluster.pods if pod.name == "mooncake-store-2")
    assert "--ssd-path=/disk/mooncake-store-2/ssd" in store.args
    paths = [folder.path for pod in cluster.pods for folder in pod.folders]
    assert len(set(paths)) == len(paths)
    gpu = planned(shape="gpus").pods
    assert all("--model-path=/my/models/qwen" in pod.args for pod in gpu if pod.role in ("prefill", "decode", "router"))


def test_pods_start_after_those_that_they_depend_on() -> None:
    for pod in planned().pods:
        roles = {name.rpartition("-")[0] for name in pod.starts_after}
        wanted = {"mooncake-master": set(), "mooncake-store": {"mooncake-master"}, "router": {"prefill", "decode"}}
        assert roles == wanted.get(pod.role, {"mooncake-master", "mooncake-store"})
        if pod.role in ("prefill", "decode", "router"):
            surges = pod.role == "router"
            assert pod.min_ready_s == (0 if surges else 5)
            assert (pod.grace_s, pod.update_grace_s, pod.liveness_s, pod.surges) == (90, 0 if surges else 5, 30, surges)


def with_images(kind: str, **images: str) -> LocalCluster:
    cluster = planned(kind)
    return replace(
        cluster,
        pods=tuple(replace(pod, image=images.get(pod.role.replace("-", "_"), pod.image)) for pod in cluster.pods),
    )


def test_an_upgrade_keeps_prefill_and_decode_in_step() -> None:
    every = dict.fromkeys(("mooncake_master", "mooncake_store", "prefill", "decode", "router"), "kvist:2")
    order = [pod.name for pod in updates(planned(), with_images("rbg", **every))]
    assert sorted(order) == sorted(pod.name for pod in planned().pods)
    for number in range(len(order)):
        done = [name.rpartition("-")[0] for name in order[:number]]
        left = {"prefill": 2 - done.count("prefill"), "decode": 3 - done.count("decode")}
        if all(left.values()):
            assert abs(done.count("prefill") - done.count("decode")) <= 1
    assert order[0] == "mooncake-master-0"
    assert order[-1] == "router-0"
    assert [name for name in order if name.startswith("mooncake-store")] == [f"mooncake-store-{n}" for n in (2, 1, 0)]


def test_only_pods_with_another_image_are_replaced() -> None:
    assert updates(planned(), planned()) == []
    names = [pod.name for pod in updates(planned(), with_images("rbg", decode="kvist:2"))]
    assert names == ["decode-2", "decode-1", "decode-0"]


@pytest.mark.parametrize(
    "changes",
    [{"counts": {"prefill": 3, "decode": 3, "stores": 3}}, {"container": {"hicache_size": 9.0, "ssd_size": 50.0}}],
    ids=["another number of pods", "another option"],
)
def test_other_changes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        updates(planned(), planned(**changes))
    assert "only the images" in caught.value.message


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (text(kind="compose", shape="pair"), "docker compose up"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {}\n", "no container of the manifest runs"),
        (text(shape="pair").replace("replicas: 1", "replicas: 99"), "at most 250"),
        (text(shape="pair").replace("kind: Service\n", "kind: ConfigMap\n"), "no Service of this name"),
        (text(shape="gpus").replace("claimName: models", "claimName: other"), "--claims other=FOLDER"),
        (text(shape="pair").replace("key: api-key", "key: another-key"), "takes KVIST_API_KEY from where"),
        (text(shape="pair").replace("emptyDir:", "nfs:"), "of a kind that this machine cannot stand for"),
    ],
    ids=["compose", "nothing to run", "too many pods", "no Service", "a claim", "a key", "a volume"],
)
def test_a_manifest_that_this_machine_cannot_stand_for_is_refused(manifest: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_local(read_manifest(manifest), PLACE)
    assert words in caught.value.message


def test_names_of_services_are_replaced_whole() -> None:
    """A Service's name is a part of others: kvist-decode and kvist-decode-canary."""
    manifest = text(shape="pair").replace(
        "dns:kvist-prefill:30000", "dns:kvist-prefill:30000\n            - --x=kvist-router-2"
    )
    router = next(pod for pod in plan_local(read_manifest(manifest), PLACE).pods if pod.role == "router")
    assert "--x=kvist-router-2" in router.args


def test_plans_do_not_depend_on_anything_but_the_manifest() -> None:
    for (kind, version), shape in itertools.product(GROUPS, ("pair", "pool")):
        assert planned(kind, version, shape) == planned(kind, version, shape)
