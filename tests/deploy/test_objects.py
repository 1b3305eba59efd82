"""Faults between the objects of a manifest, and between a container and its pod."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from kvist.deploy.check import check_documents
from kvist.deploy.manifest import manifest_of
from kvist.deploy.render import documents_of
from tests.deploy.test_check import container, pod, read_options, with_args
from tests.deploy.test_render import SHAPES, deployment

Json = dict[str, Any]
CLUSTER: list[Json] = documents_of(deployment(**SHAPES["pool"]))


def named(documents: list[Json], kind: str, name: str = "kvist") -> Json:
    return next(one for one in documents if one["kind"] == kind and one["metadata"]["name"] == name)


def of_group(change: Callable[[Json], object]) -> Callable[[list[Json]], object]:
    return lambda documents: change(named(documents, "RoleBasedGroup"))


def replace_args(name: str, old: str, new: str) -> Callable[[list[Json]], object]:
    def change(group: Json) -> None:
        args = container(group, name)["args"]
        args[:] = [arg.replace(old, new) for arg in args]

    return of_group(change)


def volume(group: Json, name: str) -> Json:
    found: Json = next(one for one in pod(group, "decode")["volumes"] if one["name"] == name)
    return found


def without_mount(group: Json, path: str) -> None:
    one = container(group, "decode")
    one["volumeMounts"] = [mount for mount in one["volumeMounts"] if mount["mountPath"] != path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            of_group(lambda group: group["metadata"].pop("name")),
            "error: RoleBasedGroup None: metadata.name: is missing: write a text, in quotes",
        ),
        (of_group(lambda group: group["metadata"].update(name=7)), "metadata.name: is 7: write a text, in quotes"),
        (
            lambda documents: documents.append(copy.deepcopy(documents[0])),
            "error: Service kvist-prefill: metadata.name: is the name of two objects of this kind: rename or remove",
        ),
        (
            lambda documents: named(documents, "Service", "kvist-prefill")["spec"].update(selector={"app": "x"}),
            "warning: Service kvist-prefill: spec.selector: selects no pod of the manifest: use labels that",
        ),
        (
            replace_args("router", "dns:kvist-prefill:", "dns:kvist-prefil:"),
            "warning: RoleBasedGroup kvist, role router, container router: args: --discovery names kvist-prefil, and "
            "no Service of the manifest has this name: did you mean kvist-prefill?",
        ),
        (
            replace_args("decode", "kvist-mooncake-master:", "kvist-mooncake-mster.default.svc.cluster.local:"),
            "args: --hicache-mooncake-master-addr names kvist-mooncake-mster.default.svc.cluster.local, and no",
        ),
        (
            replace_args("mooncake-store", "kvist-mooncake-master:50051", "master:50051"),
            "container store: args: --hicache-mooncake-master-addr names master, and no Service",
        ),
        (
            of_group(lambda group: volume(group, "host-tier").update(name="tier")),
            "volumeMounts: the pod has no volume named host-tier: add it to the volumes of the pod",
        ),
        (
            of_group(lambda group: volume(group, "host-tier")["emptyDir"].update(sizeLimit="1Gi")),
            "volumes: the volume host-tier has room for 1073.74 MB, and --hicache-size is 8 GB: the pod would be "
            "evicted: raise sizeLimit, or lower the size",
        ),
        (
            of_group(lambda group: without_mount(group, "/dev/shm")),
            "volumeMounts: no volume is mounted at /dev/shm, and 64 MB of shared memory are too few",
        ),
        (of_group(lambda group: container(group, "decode").update(image=" ")), "image: is missing: name an image"),
        (
            of_group(
                lambda group: container(group, "decode")["lifecycle"]["preStop"]["exec"].update(command=["kvist"])
            ),
            "lifecycle.preStop: `kvist` does not drain the server: use kvist drain http://127.0.0.1:30000",
        ),
        (
            of_group(with_args("decode", "--page-size=32")),
            "error: the workers: --page-size: the workers have pages of 16 and 32 tokens, and do not hand over",
        ),
        (
            of_group(lambda group: pod(group, "decode")["containers"].append(container(group, "decode"))),
            "container worker: name: is the name of another container of the pod, too: use another one",
        ),
        (
            of_group(lambda group: container(group, "decode")["resources"]["limits"].update(memory="lots")),
            "limits.memory: 'lots' does not have the form of this field: use a number and a unit, such as 512Mi or 2G",
        ),
    ],
)
def test_a_fault_is_named_with_its_remedy(change: Callable[[list[Json]], object], words: str) -> None:
    documents = copy.deepcopy(CLUSTER)
    change(documents)
    found = [str(finding) for finding in check_documents(manifest_of(documents), read_options)]
    assert [line for line in found if words in line], found


@pytest.mark.parametrize("host", ["10.1.2.3", "master.example.org"])
def test_a_master_outside_the_manifest_is_accepted(host: str) -> None:
    documents = copy.deepcopy(CLUSTER)
    replace_args("decode", "kvist-mooncake-master:", f"{host}:")(documents)
    assert check_documents(manifest_of(documents), read_options) == []


def test_a_volume_of_a_claim_template_counts_as_a_volume() -> None:
    documents: list[Json] = documents_of(deployment(format="kubernetes", **SHAPES["pool"]))
    stores = named(documents, "StatefulSet", "kvist-mooncake-store")["spec"]
    volumes = stores["template"]["spec"]["volumes"]
    volumes[:] = [one for one in volumes if one["name"] != "ssd"]
    assert len(check_documents(manifest_of(documents), read_options)) == 1
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "60G"}}}
    stores["volumeClaimTemplates"] = [{"metadata": {"name": "ssd"}, "spec": claim}]
    assert check_documents(manifest_of(documents), read_options) == []
