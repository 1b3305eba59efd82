"""Rules of RoleBasedGroup that its schemas do not state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvist.deploy.group_rules import group_problems
from kvist.deploy.render import documents_of
from tests.deploy.test_check import CLUSTER, findings, role
from tests.deploy.test_render import SHAPES, deployment

Json = dict[str, Any]


def rolling(name: str, **fields: object) -> Callable[[Json], object]:
    return lambda group: role(group, name)["rolloutStrategy"]["rollingUpdate"].update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda group: role(group, "decode").update(dependencies=["mooncake-stroe"]),
            "spec.roles.3.dependencies.0: there is no role named mooncake-stroe: did you mean mooncake-store?",
        ),
        (
            lambda group: role(group, "decode").update(dependencies=["x"]),
            "there is no role named x: use one of mooncake-master, mooncake-store, prefill, decode, router",
        ),
        (
            lambda group: role(group, "decode").update(dependencies=["decode"]),
            "decode waits for decode, and decode for decode: neither would start: remove one of the dependencies",
        ),
        (
            lambda group: role(group, "mooncake-master").update(dependencies=["router"]),
            "spec.roles.0.dependencies.0: mooncake-master waits for router, and router for mooncake-master",
        ),
        (
            lambda group: group["spec"]["roles"].append({**role(group, "decode"), "name": "prefill"}),
            "spec.roles.5.name: prefill is the name of another role, too: use another one",
        ),
        (
            lambda group: role(group, "decode").update(standalonePattern={"templateRef": {"name": "engine"}}),
            "standalonePattern.templateRef.name: there is no template of spec.roleTemplates named engine: add it",
        ),
        (rolling("decode", maxUnavailable=0), "rollingUpdate.maxUnavailable: is 0, as is maxSurge: no pod could be"),
        (
            rolling("decode", maxUnavailable=-1),
            "rollingUpdate.maxUnavailable: -1 is not a number of pods: use 0 or more",
        ),
        (rolling("decode", maxSurge="many"), "rollingUpdate.maxSurge: 'many' is not a number of pods"),
        (rolling("decode", partition=3), "rollingUpdate.partition: 3 pods of 3 keep their version: none would be"),
    ],
)
def test_a_broken_rule_of_a_group_is_named(change: Callable[[Json], object], words: str) -> None:
    found = findings(change)
    assert [line for line in found if words in line], found


def test_a_policy_names_roles_of_its_group() -> None:
    documents: list[Json] = documents_of(deployment(**SHAPES["pool"]))
    (group,) = CLUSTER
    (policy,) = [one for one in documents if one["kind"] == "CoordinatedPolicy"]
    assert list(group_problems(policy, {"kvist": group})) == []
    policy["spec"]["policies"][0]["roles"] = ["prefil", "decode"]
    (found,) = group_problems(policy, {"kvist": group})
    assert str(found) == "spec.policies.0.roles.0: there is no role named prefil: did you mean prefill?"
    assert list(group_problems(policy, {})) == []  # its group may be in another file


def test_a_coordination_of_the_old_version_names_roles_of_its_group() -> None:
    documents: list[Json] = documents_of(deployment(rbg_version="v1alpha1", **SHAPES["pool"]))
    (group,) = [one for one in documents if one["kind"] == "RoleBasedGroup"]
    assert list(group_problems(group, {})) == []
    group["spec"]["coordination"][0]["roles"].append("rooter")
    (found,) = group_problems(group, {})
    assert str(found) == "spec.coordination.0.roles.2: there is no role named rooter: did you mean router?"
