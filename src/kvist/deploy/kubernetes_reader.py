"""Reads the workloads and Services of documents of Kubernetes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvist.deploy.workloads import (
    LIVENESS_S,
    POD_ADDRESS,
    SECRET_VALUE,
    Container,
    Json,
    Workload,
    as_dict,
    as_int,
    as_list,
    dicts,
    kvist_container,
)

GPU = "nvidia.com/gpu"
_UNITS = {"": 1e-6, "k": 1e-3, "M": 1.0, "G": 1e3, "T": 1e6, "Ki": 1.024e-3, "Mi": 1.048576, "Gi": 1073.741824}


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    name: str
    selector: dict[str, str]


def services_of(document: Json) -> Iterator[Service]:
    """Yield the Service of the document, and those that RBG makes for the roles of a group."""
    kind, spec, name = document.get("kind"), as_dict(document.get("spec")), _name(document)
    if kind == "Service" and (selector := as_dict(spec.get("selector"))):
        yield Service(name=name, selector={str(key): str(value) for key, value in selector.items()})
    elif kind == "RoleBasedGroup":
        for role in dicts(spec.get("roles")):
            labels = {
                "rbg.workloads.x-k8s.io/group-name": name,
                "rbg.workloads.x-k8s.io/role-name": str(role.get("name")),
            }
            yield Service(name=f"s-{name}-{role.get('name')}", selector=labels)


def workloads_of(document: Json) -> Iterator[Workload]:
    """Yield the workloads of the document."""
    kind, spec, name = document.get("kind"), as_dict(document.get("spec")), _name(document)
    if kind in ("StatefulSet", "Deployment", "DaemonSet"):
        replicas, template = as_int(spec.get("replicas"), 1), as_dict(spec.get("template"))
        rolling = as_dict(as_dict(spec.get("strategy")).get("rollingUpdate"))
        surges = bool(rolling.get("maxSurge", kind == "Deployment" and "strategy" not in spec))
        yield _workload(
            template,
            where=f"{kind} {name}",
            name=name,
            pods=name,
            replicas=replicas,
            min_ready_s=as_int(spec.get("minReadySeconds"), 0),
            surges=surges,
            claims=dicts(spec.get("volumeClaimTemplates")),
        )
    elif kind == "Pod":
        yield _workload(document, where=f"Pod {name}", name=name, pods=name, replicas=1)
    elif kind == "RoleBasedGroup":
        shared = {item.get("name"): as_dict(item.get("template")) for item in dicts(spec.get("roleTemplates"))}
        for role in dicts(spec.get("roles")):
            yield _role(role, name, shared)


def _role(role: Json, group: str, shared: dict[Any, Json]) -> Workload:
    name = str(role.get("name", ""))
    holder = as_dict(role.get("standalonePattern") or role.get("leaderWorkerPattern") or role)
    template = as_dict(holder.get("template"))
    if reference := as_dict(holder.get("templateRef")):
        patch = as_dict(reference.get("patch") or role.get("templatePatch"))
        template = merged(shared.get(reference.get("name"), {}), patch)
    update = as_dict(as_dict(role.get("rolloutStrategy")).get("rollingUpdate"))
    return _workload(
        template,
        where=f"RoleBasedGroup {group}, role {name}",
        name=name,
        pods=f"{group}-{name}",
        replicas=as_int(role.get("replicas"), 1),
        more_labels={"rbg.workloads.x-k8s.io/group-name": group, "rbg.workloads.x-k8s.io/role-name": name},
        depends_on=tuple(str(other) for other in as_list(role.get("dependencies"))),
        update_grace_s=as_int(as_dict(update.get("inPlaceUpdateStrategy")).get("gracePeriodSeconds"), 0),
        min_ready_s=as_int(role.get("minReadySeconds"), 0),
        surges=bool(update.get("maxSurge")),
    )


def merged(base: Any, patch: Any) -> Any:
    """Return the template with the patch applied: objects are merged, and so are lists of named objects."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in patch.items()}}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in as_dict(item) for item in [*base, *patch]):
        by_name = {item["name"]: item for item in base}
        for item in patch:
            by_name[item["name"]] = merged(by_name.get(item["name"]), item)
        return list(by_name.values())
    return patch


def _workload(
    template: Json,
    *,
    where: str,
    name: str,
    pods: str,
    replicas: int,
    more_labels: dict[str, str] | None = None,
    depends_on: tuple[str, ...] = (),
    update_grace_s: float = 0.0,
    min_ready_s: float = 0.0,
    surges: bool = False,
    claims: Sequence[Json] = (),
) -> Workload:
    spec = as_dict(template.get("spec"))
    containers = [_container(where, item) for item in dicts(spec.get("containers"))]
    labels = {str(key): str(value) for key, value in as_dict(as_dict(template.get("metadata")).get("labels")).items()}
    return Workload(
        where=where,
        name=name,
        replicas=replicas,
        containers=tuple(item for item in containers if item is not None),
        volumes={
            **{str(as_dict(claim.get("metadata")).get("name")): {"volumeClaimTemplate": claim} for claim in claims},
            **{str(item.get("name")): item for item in dicts(spec.get("volumes"))},
        },
        grace_s=as_int(spec.get("terminationGracePeriodSeconds"), 30),
        host_network=spec.get("hostNetwork") is True,
        pod_name=f"{pods}-{max(0, replicas - 1)}",
        labels={**labels, **(more_labels or {})},
        depends_on=depends_on,
        update_grace_s=update_grace_s,
        min_ready_s=min_ready_s,
        surges=surges,
    )


def _container(where: str, item: Json) -> Container | None:
    env, secret_keys = {}, {}
    for one in dicts(item.get("env")):
        name, source = str(one.get("name")), as_dict(one.get("valueFrom"))
        env[name] = str(one["value"]) if "value" in one else POD_ADDRESS if "fieldRef" in source else SECRET_VALUE
        if reference := as_dict(source.get("secretKeyRef")):
            secret_keys[name] = str(reference.get("key"))
    limits = as_dict(as_dict(item.get("resources")).get("limits"))
    probes = {key: as_dict(item.get(key)) for key in ("readinessProbe", "livenessProbe", "startupProbe") if key in item}
    liveness = probes.get("livenessProbe", {})
    pre_stop = as_dict(as_dict(item.get("lifecycle")).get("preStop"))
    ports = {str(port.get("name")): as_int(port.get("containerPort"), 0) for port in dicts(item.get("ports"))}
    asked = {key: as_dict(probe["httpGet"]).get("port") for key, probe in probes.items() if "httpGet" in probe}
    period_s, failures = as_int(liveness.get("periodSeconds"), 10), as_int(liveness.get("failureThreshold"), 3)
    return kvist_container(
        where=f"{where}, container {item.get('name')}",
        image=str(item.get("image", "")),
        words=[str(word) for key in ("command", "args") for word in as_list(item.get(key))],
        env=env,
        secret_keys=secret_keys,
        ports=ports,
        mounts={str(one.get("mountPath")): str(one.get("name")) for one in dicts(item.get("volumeMounts"))},
        memory_mb=megabytes(limits.get("memory")),
        gpus=limits.get(GPU),
        probes={key: str(as_dict(probe.get("httpGet")).get("path", "")) for key, probe in probes.items()},
        probe_ports={key: ports.get(str(port), port) for key, port in asked.items()},
        liveness_s=max(1.0, float(period_s * failures)) if liveness else LIVENESS_S,
        pre_stop=tuple(map(str, as_list(as_dict(pre_stop.get("exec")).get("command")))),
    )


def megabytes(quantity: object) -> float | None:
    """Return a quantity such as 512Mi or 2G in units of 10**6; None if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(quantity))
    return float(match[1]) * _UNITS[match[2]] if match is not None and match[2] in _UNITS else None


def _name(document: Json) -> str:
    return str(as_dict(document.get("metadata")).get("name", ""))
