"""Manifests are valid for Kubernetes and RBG, their containers start, and their objects fit together."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import yaml

from kvist.deploy.check import check_manifest
from kvist.deploy.description import ContainerOptions, Deployment, ManifestOptions, RoleCounts
from kvist.deploy.render import manifest_text
from kvist.errors import ConfigError
from kvist.verbs import option_values

GPU = {"device": "cuda", "tp": 2, "model_path": "/models/qwen", "model_claim": "models"}
POOL = {"hicache_size": 8.0, "ssd_size": 50.0}


def deployment(
    *, counts: dict[str, int] | None = None, container: dict[str, Any] | None = None, **manifest: Any
) -> Deployment:
    return Deployment(
        manifest=ManifestOptions(**manifest),
        counts=RoleCounts(**(counts or {})),
        container=ContainerOptions(**(container or {})),
    )


SHAPES: dict[str, dict[str, Any]] = {
    "pair": {},
    "unified": {"counts": {"prefill": 0, "decode": 0, "unified": 3}},
    "pool": {"counts": {"prefill": 2, "decode": 3, "stores": 3}, "container": POOL},
    "gpus": {"counts": {"stores": 2, "max_replicas": 4}, "container": {**GPU, **POOL}},
    "monitored": {"monitoring_namespace": "monitoring", "namespace": "llm", "network_policy": False},
}
ON_KUBERNETES = [("rbg", "v1alpha2"), ("rbg", "v1alpha1"), ("kubernetes", "v1alpha2")]


def documents(described: Deployment) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest_text(described)))


@pytest.mark.parametrize(("kind", "version"), ON_KUBERNETES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_manifest_passes_its_own_check(shape: str, kind: str, version: str) -> None:
    """Schemas, CEL rules and unknown fields; every option of every container; and all that would hurt."""
    text = manifest_text(deployment(format=kind, rbg_version=version, **SHAPES[shape]))
    assert check_manifest(text, option_values) == []


@pytest.mark.parametrize("shape", ["pair", "unified", "pool"])
def test_a_project_of_compose_passes_its_own_check(shape: str) -> None:
    assert check_manifest(manifest_text(deployment(format="compose", **SHAPES[shape])), option_values) == []


def pods(all_documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pod templates."""
    found = []
    for document in all_documents:
        if document["kind"] == "RoleBasedGroup":
            found += [role["standalonePattern"]["template"] for role in document["spec"]["roles"]]
        elif document["kind"] in ("StatefulSet", "Deployment"):
            found.append(document["spec"]["template"])
    return found


@pytest.mark.parametrize("kind", ["rbg", "kubernetes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_objects_of_a_manifest_fit_together(shape: str, kind: str) -> None:
    rendered = documents(deployment(format=kind, **SHAPES[shape]))
    templates = pods(rendered)
    assert templates
    for document in rendered:
        selector = document["spec"].get("selector")
        if document["kind"] == "Service":
            chosen = [pod for pod in templates if selector.items() <= pod["metadata"]["labels"].items()]
            assert len(chosen) == 1, document
            offered = {port["name"] for container in chosen[0]["spec"]["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= offered
    for pod in templates:
        (container,) = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            item["name"] for item in pod["spec"]["volumes"]
        }
    services = {document["metadata"]["name"] for document in rendered if document["kind"] == "Service"}
    args = [arg for pod in templates for arg in pod["spec"]["containers"][0]["args"]]
    named = {arg.split(":")[1] for arg in args if arg.startswith("--discovery=dns:")}
    named |= {arg.split("=")[1].split(":")[0] for arg in args if arg.startswith("--hicache-mooncake-master-addr=")}
    assert named
    assert named <= services


@pytest.mark.parametrize("kind", ["rbg", "kubernetes"])
def test_pods_are_found_by_the_labels_of_both_versions_of_rbg(kind: str) -> None:
    """`kubectl get pods -l rolebasedgroup.workloads.x-k8s.io/name=NAME` works as in RBG's older releases."""
    for pod in pods(documents(deployment(format=kind, name="chat"))):
        labels = pod["metadata"]["labels"]
        assert labels["rolebasedgroup.workloads.x-k8s.io/name"] == labels["rbg.workloads.x-k8s.io/group-name"] == "chat"
        role = labels["app.kubernetes.io/component"]
        assert labels["rolebasedgroup.workloads.x-k8s.io/role"] == labels["rbg.workloads.x-k8s.io/role-name"] == role


def test_pods_run_without_privileges_and_drain_before_the_kill() -> None:
    for pod in pods(documents(deployment(**SHAPES["pool"]))):
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not [variable for variable in container["env"] if "KEY" in variable["name"] and "value" in variable]
        if container["name"] in ("worker", "router"):
            assert container["lifecycle"]["preStop"]["exec"]["command"][:2] == ["kvist", "drain"]
            assert spec["terminationGracePeriodSeconds"] == 60 + 30


def test_the_host_tier_lies_in_memory_that_outlives_the_container() -> None:
    (group,) = [one for one in documents(deployment(**SHAPES["pool"])) if one["kind"] == "RoleBasedGroup"]
    roles = {role["name"]: role for role in group["spec"]["roles"]}
    assert list(roles) == ["mooncake-master", "mooncake-store", "prefill", "decode", "router"]
    for name in ("prefill", "decode"):
        spec = roles[name]["standalonePattern"]["template"]["spec"]
        (tier,) = [volume for volume in spec["volumes"] if volume["name"] == "host-tier"]
        assert tier["emptyDir"] == {"medium": "Memory", "sizeLimit": "8160M"}
        assert roles[name]["rolloutStrategy"]["rollingUpdate"]["type"] == "InPlaceIfPossible"
        assert roles[name]["dependencies"] == ["mooncake-master", "mooncake-store"]
    assert roles["router"]["dependencies"] == ["prefill", "decode"]


def test_prefill_and_decode_are_upgraded_in_step() -> None:
    (policy,) = [one for one in documents(deployment(**SHAPES["pool"])) if one["kind"] == "CoordinatedPolicy"]
    assert policy["metadata"]["name"] == "kvist"  # RBG finds it by the name of the group
    (rule,) = policy["spec"]["policies"]
    assert (rule["roles"], rule["strategy"]["rollingUpdate"]["maxSkew"]) == (["prefill", "decode"], 1)
    (group,) = [
        one
        for one in documents(deployment(rbg_version="v1alpha1", **SHAPES["pool"]))
        if one["kind"] == "RoleBasedGroup"
    ]
    (rule,) = group["spec"]["coordination"]
    assert rule["strategy"]["rollingUpdate"]["maxSkew"] == "50%"  # one of the two prefill workers


@pytest.mark.parametrize("kind", ["rbg", "kubernetes"])
def test_an_autoscaler_scales_what_exists(kind: str) -> None:
    rendered = documents(deployment(format=kind, **SHAPES["gpus"]))
    targets = [one["spec"]["scaleTargetRef"] for one in rendered if one["kind"] == "HorizontalPodAutoscaler"]
    assert [target["name"] for target in targets] == ["kvist-prefill", "kvist-decode"]
    if kind == "kubernetes":
        names = {one["metadata"]["name"] for one in rendered if one["kind"] == "StatefulSet"}
        assert {target["name"] for target in targets} <= names
    else:
        (group,) = [one for one in rendered if one["kind"] == "RoleBasedGroup"]
        scaled = [role["name"] for role in group["spec"]["roles"] if role.get("scalingAdapter", {}).get("enable")]
        assert scaled == ["prefill", "decode"]


def test_only_the_router_is_open_to_other_pods() -> None:
    policies = [one["spec"] for one in documents(deployment()) if one["kind"] == "NetworkPolicy"]
    inside, router = policies
    assert all("from" in rule for rule in inside["ingress"])
    assert router["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    assert router["ingress"] == [{"ports": [{"port": "http"}]}]


def test_equal_descriptions_give_equal_texts() -> None:
    for kind, shape in itertools.product(("rbg", "kubernetes", "compose"), ("pair", "pool")):
        assert manifest_text(deployment(format=kind, **SHAPES[shape])) == manifest_text(
            deployment(format=kind, **SHAPES[shape])
        )


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"name": "Chat"}, "--name 'Chat' is not a valid name"),
        ({"name": ""}, "--name '' is not a valid name"),
        ({"monitoring_namespace": "A_B"}, "--monitoring-namespace 'A_B' is not a valid name"),
        ({"container": {"model_claim": "My_Claim"}}, "--model-claim 'My_Claim' is not a valid name"),
        ({"container": {"model_folder": "models"}}, "--model-folder models is not an absolute path"),
        ({"container": {"image": "kvist latest"}}, "--image 'kvist latest' is empty or has a space in it"),
        ({"container": {"model_path": ""}}, "--model-path '' is empty or has a space in it"),
        ({"name": "x" * 60}, "has 60 characters"),
        ({"namespace": "a_b"}, "--namespace 'a_b'"),
        ({"counts": {"prefill": 0}}, "cannot answer a request"),
        ({"counts": {"prefill": 3, "max_replicas": 2}}, "--max-replicas 2 is below"),
        ({"counts": {"stores": 1}, "container": {"hicache_size": 1.0}}, "more than --stores 1"),
        ({"counts": {"stores": 2}}, "add --hicache-size"),
        ({"format": "compose", "container": {"model_claim": "x"}}, "use --model-folder"),
        ({"format": "compose", "counts": {"max_replicas": 2}}, "compose has no autoscaler"),
        ({"container": {"model_claim": "x", "model_folder": "/x"}}, "are both set"),
    ],
)
def test_a_description_that_cannot_work_is_refused(described: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deployment(**described)
    assert words in caught.value.message
