"""Words of closed sets that the published schemas leave open."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest

from kvist.deploy.render import documents_of
from kvist.deploy.schemas import closed_sets
from kvist.deploy.schemas.closed_sets import open_word_problems
from tests.deploy.test_check import CLUSTER, container, findings, pod, role
from tests.deploy.test_render import SHAPES, deployment

Json = dict[str, Any]
RBG = "rbg.workloads.x-k8s.io"
IN_POD = "spec.roles.3.standalonePattern.template.spec"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda group: role(group, "decode")["rolloutStrategy"]["rollingUpdate"].update(type="InPlaceIfPosible"),
            "RoleBasedGroup kvist: spec.roles.3.rolloutStrategy.rollingUpdate.type: 'InPlaceIfPosible' is not one of "
            "its values: use RecreatePod, InPlaceIfPossible or InPlaceOnly",
        ),
        (
            lambda group: role(group, "decode")["annotations"].update({f"{RBG}/role-inplace-scheduling": "Prefered"}),
            f"{RBG}/role-inplace-scheduling: 'Prefered' is not one of its values: use Preferred or Required",
        ),
        (
            lambda group: role(group, "decode")["annotations"].update({f"{RBG}/role-workload-type": "StatefulSet"}),
            "use workloads.x-k8s.io/v1alpha2/RoleInstanceSet, apps/v1/StatefulSet, apps/v1/Deployment or",
        ),
        (
            lambda group: container(group, "decode").update(imagePullPolicy="always"),
            f"{IN_POD}.containers.0.imagePullPolicy: 'always' is not one of its values: use Always, IfNotPresent or",
        ),
        (
            lambda group: pod(group, "decode")["volumes"][0]["emptyDir"].update(medium="Memroy"),
            f"{IN_POD}.volumes.0.emptyDir.medium: 'Memroy' is not one of its values: use Memory or HugePages*",
        ),
        (
            lambda group: container(group, "decode")["ports"][0].update(protocol="tcp"),
            "ports.0.protocol: 'tcp' is not one of its values: use TCP, UDP or SCTP",
        ),
        (lambda group: pod(group, "decode").update(restartPolicy="No"), "use Always, OnFailure or Never"),
        (
            lambda group: group["spec"].update(
                roleTemplates=[{"name": "one", "template": {"spec": {"containers": [], "dnsPolicy": "none"}}}]
            ),
            "spec.roleTemplates.0.template.spec.dnsPolicy: 'none'",
        ),
    ],
)
def test_a_word_that_the_schema_does_not_know_is_named_with_those_that_are_allowed(
    change: Callable[[Json], object], words: str
) -> None:
    (found,) = findings(change)
    assert words in found


@pytest.mark.parametrize(
    ("kind", "spec", "field"),
    [
        ("StatefulSet", {"podManagementPolicy": "Paralel"}, "spec.podManagementPolicy"),
        ("StatefulSet", {"updateStrategy": {"type": "Rolling"}}, "spec.updateStrategy.type"),
        ("Deployment", {"strategy": {"type": "Rolling"}}, "spec.strategy.type"),
        ("Service", {"type": "LB"}, "spec.type"),
        ("NetworkPolicy", {"policyTypes": ["Ingress", "Egres"]}, "spec.policyTypes.1"),
        ("HorizontalPodAutoscaler", {"metrics": [{"type": "Pod"}]}, "spec.metrics.0.type"),
    ],
)
def test_words_of_other_kinds_are_checked_too(kind: str, spec: Json, field: str) -> None:
    (found,) = open_word_problems({"apiVersion": "v1", "kind": kind, "spec": spec})
    assert found.field == field


def test_names_that_users_choose_are_not_taken_for_fields() -> None:
    labels = {"imagePullPolicy": "mine", "dnsPolicy": "mine"}
    spec = {"selector": {"matchLabels": labels}, "template": {"spec": {"nodeSelector": labels}}}
    document = {"kind": "Deployment", "metadata": {"labels": labels, "annotations": labels}, "spec": spec}
    assert list(open_word_problems(document)) == []
    assert list(open_word_problems({"kind": "ConfigMap", "data": {"imagePullPolicy": "mine"}})) == []


@pytest.mark.parametrize(("version", "known"), [("v1alpha1", True), ("v1alpha2", False)])
def test_recreate_is_a_word_of_the_old_version_of_rbg(version: str, known: bool) -> None:
    update = {"rolloutStrategy": {"rollingUpdate": {"type": "Recreate"}}}
    group = {"kind": "RoleBasedGroup", "apiVersion": f"workloads.x-k8s.io/{version}", "spec": {"roles": [update]}}
    assert (list(open_word_problems(group)) == []) is known


def test_a_rendered_group_has_the_words_of_its_version() -> None:
    words = {}
    for version in ("v1alpha1", "v1alpha2"):
        documents: list[Json] = documents_of(deployment(rbg_version=version, **SHAPES["pair"]))
        (group,) = [one for one in documents if one["kind"] == "RoleBasedGroup"]
        words[version] = group["spec"]["roles"][-1]["rolloutStrategy"]["rollingUpdate"]["type"]
    assert words == {"v1alpha1": "Recreate", "v1alpha2": "RecreatePod"}


def fields_of(schema: Json, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Json]]:
    """Yield the path of each text of a schema, and its schema."""
    if schema.get("type") == "string":
        yield names, schema
    for name, inner in schema.get("properties", {}).items():
        yield from fields_of(inner, (*names, name))
    if isinstance(schema.get("items"), dict):
        yield from fields_of(schema["items"], names)


def test_the_fields_with_closed_sets_exist_and_have_no_set_in_the_schemas() -> None:
    """A field that was misspelt here, or that RBG's schemas close by themselves one day, would never be noticed."""
    packed = (resources.files("kvist.deploy.schemas") / "rbg.json.gz").read_bytes()
    texts = [
        one
        for kind in json.loads(gzip.decompress(packed))
        for schema in kind["versions"].values()
        for one in fields_of(schema, (kind["kind"],))
    ]
    of_kubernetes = {"Deployment", "Service", "policyTypes", "metrics", "target", "accessModes", "volumeMode"}
    of_kubernetes |= {"sessionAffinity", "externalTrafficPolicy", "internalTrafficPolicy", "ipFamilyPolicy"}
    of_kubernetes |= {"unhealthyPodEvictionPolicy"}
    for end in closed_sets._SETS:
        if end[0] == "annotations" or end[0] in of_kubernetes or "updateStrategy" in end:
            continue
        found = [schema for path, schema in texts if path[-len(end) :] == end]
        assert found, end
        assert end == ("podManagementPolicy",) or all("enum" not in schema for schema in found), end


def test_no_manifest_of_the_renderer_has_an_unknown_word() -> None:
    assert [list(open_word_problems(one)) for one in copy.deepcopy(CLUSTER)] == [[]] * len(CLUSTER)
