"""`kvist deploy check` finds the faults of a manifest that somebody changed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvist.deploy.check import check_documents, check_manifest, run_check
from kvist.deploy.compose_reader import compose_megabytes
from kvist.deploy.finding import Finding
from kvist.deploy.kubernetes_reader import megabytes, merged
from kvist.deploy.manifest import MAX_BYTES, manifest_of, read_manifest
from kvist.deploy.render import documents_of
from kvist.errors import ConfigError
from kvist.verbs import option_values
from tests.deploy.test_render import SHAPES, deployment

Json = dict[str, Any]
CLUSTER = [one for one in documents_of(deployment(**SHAPES["pool"])) if one["kind"] == "RoleBasedGroup"]
(PROJECT,) = documents_of(deployment(format="compose", **SHAPES["pool"]))


@cache
def _option_values(verb: str, argv: tuple[str, ...], environ: frozenset[tuple[str, str]]) -> Mapping[str, object]:
    return option_values(verb, argv, dict(environ))


def read_options(verb: str, argv: Sequence[str], environ: Mapping[str, str]) -> Mapping[str, object]:
    """Return the options of a container: a test changes one of many containers."""
    return _option_values(verb, tuple(argv), frozenset(environ.items()))


def findings(change: Callable[[Json], object], documents: list[Any] = CLUSTER) -> list[str]:
    return [str(finding) for finding in check(change, documents)]


def check(change: Callable[[Json], object], documents: list[Any] = CLUSTER) -> list[Finding]:
    """Return the findings after a change of the group."""
    changed = copy.deepcopy(documents)
    change(next(one for one in changed if one["kind"] == "RoleBasedGroup"))
    return check_documents(manifest_of(changed), read_options)


def role(group: Json, name: str) -> Json:
    found: Json = next(one for one in group["spec"]["roles"] if one["name"] == name)
    return found


def pod(group: Json, name: str) -> Json:
    found: Json = role(group, name)["standalonePattern"]["template"]["spec"]
    return found


def container(group: Json, name: str) -> Json:
    found: Json = pod(group, name)["containers"][0]
    return found


def with_args(name: str, *args: str) -> Callable[[Json], object]:
    return lambda group: container(group, name)["args"].extend(args)


def without_env(name: str, variable: str) -> Callable[[Json], object]:
    def change(group: Json) -> None:
        kept = [one for one in container(group, name)["env"] if one["name"] != variable]
        container(group, name)["env"] = kept

    return change


WRONG: list[tuple[str, Callable[[Json], object], str]] = [
    ("an unknown field", lambda group: pod(group, "decode").update(colour="red"), "colour: is an unknown field"),
    ("a wrong type", lambda group: role(group, "decode").update(replicas="two"), 'not of type "integer"'),
    ("an impossible count", lambda group: role(group, "decode").update(replicas=-1), "less than the minimum of 0"),
    (
        "two patterns",
        lambda group: role(group, "decode").update(leaderWorkerPattern={"size": 2}),
        "mutually exclusive",
    ),
    ("an unknown option", with_args("decode", "--no-such-option"), "--no-such-option"),
    ("a wrong value", with_args("router", "--policy=best"), "--policy"),
    (
        "a short grace",
        lambda group: pod(group, "decode").update(terminationGracePeriodSeconds=30),
        "set it to 90 or more",
    ),
    ("a longer drain", with_args("prefill", "--drain-timeout-s=600"), "set it to 630 or more"),
    (
        "a store killed while it writes",
        lambda group: pod(group, "mooncake-store").update(terminationGracePeriodSeconds=30),
        "writing its pages to the SSD",
    ),
    (
        "a host tier without its volume",
        lambda group: container(group, "decode").update(volumeMounts=[]),
        "is in no volume, and the host tier would be lost",
    ),
    (
        "a host tier that is not kept",
        with_args("decode", "--hicache-persist=none"),
        "an upgrade in place would lose it",
    ),
    ("no room for the host tier", with_args("decode", "--hicache-size=500"), "does not fit into the memory limit"),
    (
        "no room for the segment",
        with_args("mooncake-store", "--segment-size=500"),
        "--segment-size 500 GB does not fit",
    ),
    ("no API key", without_env("router", "KVIST_API_KEY"), "listens on 0.0.0.0 without an API key"),
    ("no API key of a store", without_env("mooncake-store", "KVIST_API_KEY"), "listens on 0.0.0.0 without an API key"),
    ("no cluster key", without_env("decode", "KVIST_CLUSTER_KEY"), "has no cluster key"),
    ("fewer stores than copies", lambda group: role(group, "mooncake-store").update(replicas=1), "wants 2 copies"),
    (
        "releases too far apart",
        lambda group: [
            container(group, name).update(image=f"registry:5000/kvist:{tag}")
            for name, tag in (("prefill", "1.2.0"), ("decode", "v1.4.1"))
        ],
        "run releases 1.2 and 1.4",
    ),
    (
        "two roles on one port",
        lambda group: [pod(group, name).update(hostNetwork=True) for name in ("prefill", "decode")],
        "both use the port 30000",
    ),
    (
        "two containers of one pod on one port",
        lambda group: pod(group, "decode")["containers"].append({**container(group, "decode"), "name": "other"}),
        "both use the port 9001",
    ),
    (
        "a port that nobody probes",
        with_args("decode", "--port=30001"),
        "readinessProbe.httpGet.port: asks the port 30000, and the container listens on 30001 (--port): use 30001, or",
    ),
    (
        "a probe of a port without a name",
        lambda group: container(group, "decode")["livenessProbe"]["httpGet"].update(port="web"),
        "livenessProbe.httpGet.port: asks the port web, and the container listens on 30000",
    ),
    (
        "no readiness probe",
        lambda group: container(group, "decode").pop("readinessProbe"),
        "readinessProbe: is missing",
    ),
    (
        "a liveness probe that kills",
        lambda group: container(group, "decode")["livenessProbe"]["httpGet"].update(path="/ready"),
        "would kill the container while it loads or drains",
    ),
    ("a name too long for DNS", lambda group: group["metadata"].update(name="x" * 60), "DNS allows 63"),
    ("no decode worker", lambda group: role(group, "decode").update(replicas=0), "no request can be answered"),
]


IN_POD = "standalonePattern.template.spec"
REMEDIES = [
    ("an unknown field", f"spec.roles.3.{IN_POD}.colour: is an unknown field: correct its name, or remove it"),
    ("a field with a typing error", "spec.roles.3.replica: is an unknown field: did you mean replicas?"),
    ("an impossible count", "spec.roles.3.replicas: -1 is less than the minimum of 0: use 0 or more"),
    (
        "a wrong type",
        'spec.roles.3.replicas: "two" is not of type "integer": write a whole number without quotes',
    ),
    ("a missing field", f"spec.roles.3.{IN_POD}.containers: is missing: add it"),
    ("a value of neither type", ": write a whole number without quotes, or a text; numbers, yes and no in quotes"),
    (
        "a value that is not in a list",
        'rolloutStrategy.type: "Sometimes" is not one of "RollingUpdate": use RollingUpdate',
    ),
    ("two patterns", "so that this holds"),
    ("an unknown kind of Kubernetes", "kind: is Depoyment of apps/v1, which Kubernetes does not have: correct kind or"),
    ("an unknown field of Kubernetes", "Service other: spec.port: is an unknown field: did you mean ports?"),
    ("a wrong type of Kubernetes", "Service other: spec.ports: 3 is not of type 'array', 'null': write a list, each"),
    ("an impossible count of Kubernetes", "ReplicaSet other: spec.replicas: -1 is less than 0: use 0 or more"),
    ("an autoscaler without room", "spec.maxReplicas: 2 is below minReplicas (3): use 3 or more"),
    (
        "a name that DNS does not know",
        "metadata.name: makes the name kvist_A-decode-2, which is not valid in DNS: use lower",
    ),
    ("no number of GPUs", "resources.limits.nvidia.com/gpu: -2 is not a number of GPUs: use 0, or"),
    ("too few GPUs", "resources.limits.nvidia.com/gpu: the worker needs 4 GPUs (--tp 4) and gets 2: set it to 4"),
    ("no port", "ports: 99999 of http is not a port: use a number from 1 to 65535"),
    ("an unknown option", "role decode, container worker: args: "),
    ("a short grace", "terminationGracePeriodSeconds: the container is killed after 30 s, during the drain: "),
    ("a host tier without its volume", "volumeMounts: --hicache-persist /"),
    ("a name too long for DNS", "metadata.name: makes the name xxx"),
    ("two roles on one port", "the host's network: args: "),
    ("two containers of one pod on one port", "give one of them another --engine-port"),
    ("fewer stores than copies", "--hicache-mooncake-replica-num: the container wants 2 copies"),
    ("no room for the host tier", "resources.limits.memory: --hicache-size 500 GB"),
    ("no API key", "env: the container listens on 0.0.0.0 without an API key: set KVIST_API_KEY from a Secret"),
    ("no decode worker", "--role: all have the role prefill, and no request can be answered: add workers"),
]
MORE_WRONG: dict[str, Callable[[Json], object]] = {
    "a name that DNS does not know": lambda group: group["metadata"].update(name="kvist_A"),
    "no number of GPUs": lambda group: container(group, "decode")["resources"]["limits"].update({"nvidia.com/gpu": -2}),
    "too few GPUs": lambda group: (
        container(group, "decode")["args"].extend(["--device=cuda", "--tp=4"]),
        container(group, "decode")["resources"]["limits"].update({"nvidia.com/gpu": "2"}),
    ),
    "no port": lambda group: container(group, "decode")["ports"][0].update(containerPort=99999),
    "a field with a typing error": lambda group: role(group, "decode").update(replica=2),
    "a missing field": lambda group: pod(group, "decode").pop("containers"),
    "a value of neither type": lambda group: container(group, "decode")["readinessProbe"]["httpGet"].update(port=[1]),
    "a value that is not in a list": lambda group: role(group, "decode")["rolloutStrategy"].update(type="Sometimes"),
}
OTHER_WRONG: dict[str, Json] = {
    "an impossible count of Kubernetes": {
        "kind": "ReplicaSet",
        "apiVersion": "apps/v1",
        "metadata": {"name": "other"},
        "spec": {"replicas": -1, "selector": {}},
    },
    "an autoscaler without room": {
        "kind": "HorizontalPodAutoscaler",
        "apiVersion": "autoscaling/v2",
        "metadata": {"name": "other"},
        "spec": {
            "minReplicas": 3,
            "maxReplicas": 2,
            "scaleTargetRef": {"kind": "StatefulSet", "name": "kvist-decode", "apiVersion": "apps/v1"},
        },
    },
    "an unknown kind of Kubernetes": {"kind": "Depoyment", "apiVersion": "apps/v1", "metadata": {"name": "other"}},
    "an unknown field of Kubernetes": {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": "other"},
        "spec": {"port": 1},
    },
    "a wrong type of Kubernetes": {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": "other"},
        "spec": {"ports": 3},
    },
}


CHANGES = {**{name: change for name, change, _ in WRONG}, **MORE_WRONG}


@cache
def findings_of(name: str) -> list[Finding]:
    if name in OTHER_WRONG:
        return check_manifest(yaml.safe_dump(OTHER_WRONG[name]), option_values)
    return check(CHANGES[name])


@pytest.mark.parametrize(
    ("name", "words"), [*((name, words) for name, _, words in WRONG), *REMEDIES], ids=lambda value: value
)
def test_a_finding_names_the_fault_the_field_and_the_remedy(name: str, words: str) -> None:
    found = findings_of(name)
    assert [finding for finding in found if words in str(finding)], found
    assert all(finding.problem.field and finding.problem.remedy for finding in found)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            {"selector": {"matchLabels": {"app": "x"}}},
            "spec.selector.matchLabels: selects no pod of the manifest: use labels",
        ),
        ({"podMetricsEndpoints": [{"port": "web"}]}, "podMetricsEndpoints.0.port: no pod has the port web: use "),
    ],
)
def test_a_monitor_that_reads_nothing_is_named(spec: Json, words: str) -> None:
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": {"name": "m"}, "spec": spec}
    (found,) = findings(lambda _group: None, [*CLUSTER, monitor])
    assert found.startswith("error: PodMonitor m: ")
    assert words in found


def of_project(change: Callable[[Json], object]) -> list[str]:
    project = copy.deepcopy(PROJECT)
    change(project)
    return [str(finding) for finding in check_documents(manifest_of([project]), read_options)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda project: project.update(service={}),
            "service: is a field that Compose does not have: did you mean s",
        ),
        (lambda project: project.update(colour=1), "colour: is a field that Compose does not have: remove it"),
        (
            lambda project: project["services"]["decode-0"].update(imagee="x"),
            "services.decode-0.imagee: is a field that Compose does not have: did you mean image?",
        ),
        (
            lambda project: project["services"]["decode-0"].update(scale=-1),
            "services.decode-0.scale: -1 is not a number of containers: use 0 or more",
        ),
        (
            lambda project: project["services"]["decode-0"].update(deploy={"replicas": "two"}),
            "services.decode-0.deploy.replicas: 'two' is not a number of containers",
        ),
        (
            lambda project: project["services"]["decode-0"].update(ports=["127.0.0.1:30000:30000"]),
            "127.0.0.1:30000, which services.decode-0 publishes, too: give one of them another port",
        ),
        (
            lambda project: project["services"]["decode-0"].update(
                ports=[{"host_ip": "127.0.0.1", "published": 30000, "target": 1}]
            ),
            "services.router.ports: publishes 127.0.0.1:30000, which services.decode-0 publishes",
        ),
    ],
)
def test_a_fault_of_a_project_of_compose_is_named(change: Callable[[Json], object], words: str) -> None:
    found = of_project(change)
    assert [line for line in found if words in line], found


def test_extensions_of_a_project_are_accepted() -> None:
    assert of_project(lambda project: project.update({"x-note": 1})) == []
    assert of_project(lambda project: project["services"]["decode-0"].update(scale="${DECODE}")) == []


def test_the_last_line_of_a_check_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump_all(CLUSTER), encoding="utf-8")
    assert run_check(path, option_values) == 0
    assert capsys.readouterr().out == f"{path}: 0 errors, 0 warnings\n"


def test_a_finding_that_only_costs_something_is_a_warning() -> None:
    (line,) = findings(with_args("decode", "--hicache-persist=none"))
    assert line.startswith("warning: RoleBasedGroup kvist, role decode, container worker: ")


def test_neighbouring_releases_are_accepted() -> None:
    def change(group: Json) -> None:
        container(group, "prefill")["image"] = "kvist:1.2.7"
        container(group, "decode")["image"] = "kvist:1.3.0@sha256:" + "0" * 64

    assert findings(change) == []


def test_a_role_with_a_shared_template_is_checked_as_the_pod_that_it_makes() -> None:
    def change(group: Json) -> None:
        template = role(group, "decode")["standalonePattern"].pop("template")
        group["spec"]["roleTemplates"] = [{"name": "engine", "template": template}]
        patch = {
            "spec": {"containers": [{"name": "worker", "args": [*template["spec"]["containers"][0]["args"], "--x"]}]}
        }
        role(group, "decode")["standalonePattern"]["templateRef"] = {"name": "engine", "patch": patch}

    line, also = findings(change)  # a group whose decode workers do not start cannot answer
    assert "role decode, container worker" in line
    assert "--x" in line
    assert "no request can be answered" in also


def test_lists_of_named_objects_are_merged_by_name() -> None:
    base = {"containers": [{"name": "a", "image": "1", "args": ["x"]}, {"name": "b"}], "volumes": [{"name": "v"}]}
    patch = {"containers": [{"name": "a", "args": ["y"]}, {"name": "c"}]}
    assert merged(base, patch) == {
        "containers": [{"name": "a", "image": "1", "args": ["y"]}, {"name": "b"}, {"name": "c"}],
        "volumes": [{"name": "v"}],
    }


def test_a_container_started_by_a_shell_is_checked_too() -> None:
    text = yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "one"},
            "spec": {
                "containers": [
                    {
                        "name": "main",
                        "image": "kvist",
                        "command": ["sh", "-c"],
                        "args": ["exec python -m kvist serve --host 0.0.0.0 --api-keys=$KEY"],
                    }
                ]
            },
        }
    )
    (line, *_) = map(str, check_manifest(text, option_values))
    assert "--api-keys" in line


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no objects"),
        ("- 1\n", "no objects"),
        ("a: [", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("!!python/object/apply:os.system [true]", "not YAML"),
        (LAUGHS, "over 200000 values"),
        ("a: &a {b: *a}", "over 200000 values"),
        ("x" * (MAX_BYTES + 1), "over 4 MiB"),
    ],
    ids=["empty", "a list", "cut off", "deep", "an object of Python", "billion laughs", "inside itself", "large"],
)
def test_text_that_is_not_a_manifest_is_refused_in_bounded_time(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_manifest(text)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "kind: Service\napiVersion: v1\nspec: [1]\n",
        "kind: RoleBasedGroup\napiVersion: workloads.x-k8s.io/v1alpha2\nspec: {roles: [1, {name: [2]}]}\n",
        "kind: StatefulSet\napiVersion: apps/v1\nspec: {template: {spec: {containers: [{command: 3}]}}}\n",
        "kind: 1\n",
        "kind: Unknown\napiVersion: v9\n",
        "kind: Unknown\napiVersion: workloads.x-k8s.io/v1alpha2\n",
        "services: {a: 1, b: {command: [serve], volumes: [1, {}], environment: [A, B=1]}}\n",
    ],
)
def test_a_manifest_of_wrong_types_gives_findings(text: str) -> None:
    assert check_manifest(text, option_values)


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [("512Mi", 536.870912), ("2G", 2000.0), ("1500M", 1500.0), (1_000_000, 1.0), ("2 pounds", None), (None, None)],
)
def test_quantities_are_read(quantity: object, expected: float | None) -> None:
    assert megabytes(quantity) == (None if expected is None else pytest.approx(expected))


def test_quantities_of_compose_are_binary() -> None:
    assert compose_megabytes("512m") == pytest.approx(536.870912)
