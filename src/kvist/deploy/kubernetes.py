"""Documents for Kubernetes: a RoleBasedGroup, or the workloads that Kubernetes has itself."""

from __future__ import annotations

from kvist.deploy.description import Deployment
from kvist.deploy.pods import (
    Document,
    autoscaler,
    disruption_budget,
    headless_service,
    metadata,
    network_policies,
    pod_monitor,
    pod_template,
    selector,
    service,
    workers_of,
)
from kvist.deploy.roles import DRAIN_GRACE_S, MIN_READY_S, Addresses, Kind, RoleSpec, roles_of, worker_counts

_GROUP = "workloads.x-k8s.io"
_RELEASES_IN_STEP = 1  # workers of prefill and decode whose releases may differ by more than their counterparts


def kubernetes_documents(deployment: Deployment) -> list[Document]:
    """Return all documents of a cluster on Kubernetes, in the order in which they are applied."""
    roles = roles_of(deployment, _addresses(deployment))
    name = deployment.manifest.name
    documents = [headless_service(deployment, role, f"{name}-{role.name}") for role in workers_of(roles)]
    documents += [
        headless_service(deployment, role, f"{name}-{role.name}") for role in roles if role.kind is Kind.STORE
    ]
    for role in roles:
        if role.kind in (Kind.MASTER, Kind.ROUTER):
            documents.append(service(deployment, role, f"{name}-{role.name}"))
    if deployment.manifest.format == "rbg":
        documents += _group_documents(deployment, roles)
    else:
        documents += [_workload(deployment, role) for role in roles]
        documents += [disruption_budget(deployment, role) for role in roles if role.replicas > 1]
    for role in workers_of(roles):
        if role.max_replicas:
            documents.append(autoscaler(deployment, role, _scaled(deployment, role)))
    if deployment.manifest.network_policy:
        documents += network_policies(deployment, roles)
    if deployment.manifest.monitoring_namespace is not None:
        documents.append(pod_monitor(deployment))
    return documents


def _addresses(deployment: Deployment) -> Addresses:
    name = deployment.manifest.name
    workers = {role: (f"{name}-{role}",) for role, _ in worker_counts(deployment)}
    return Addresses(workers=workers, master=f"{name}-mooncake-master")


def _scaled(deployment: Deployment, role: RoleSpec) -> Document:
    name = f"{deployment.manifest.name}-{role.name}"
    if deployment.manifest.format == "rbg":  # the adapter of this name is made by RBG for a role with one
        version = deployment.manifest.rbg_version
        return {"apiVersion": f"{_GROUP}/{version}", "kind": "RoleBasedGroupScalingAdapter", "name": name}
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": name}


def _workload(deployment: Deployment, role: RoleSpec) -> Document:
    """Return the StatefulSet of workers and stores, or the Deployment of router and master."""
    name = f"{deployment.manifest.name}-{role.name}"
    chosen = {"matchLabels": selector(deployment, role.name)}
    spec: Document = {"replicas": role.replicas, "selector": chosen, **_min_ready(role)}
    if role.kind in (Kind.WORKER, Kind.STORE):
        spec |= {
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "RollingUpdate"},
        }
    elif role.kind is Kind.ROUTER:  # the new one is ready before the old one drains
        spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    else:  # a pool has one master
        spec["strategy"] = {"type": "Recreate"}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet" if role.kind in (Kind.WORKER, Kind.STORE) else "Deployment",
        "metadata": metadata(deployment, name),
        "spec": {**spec, "template": pod_template(deployment, role)},
    }


def _group_documents(deployment: Deployment, roles: list[RoleSpec]) -> list[Document]:
    old = deployment.manifest.rbg_version == "v1alpha1"
    spec: Document = {"roles": [_old_role(deployment, role) if old else _role(deployment, role) for role in roles]}
    pair = [role.name for role in roles if role.name in ("prefill", "decode")]
    in_step = len(pair) == 2 and max(role.replicas for role in roles if role.name in pair) > 1
    if old and in_step:
        skew = {"rollingUpdate": {"maxSkew": _percent(roles, pair)}}
        spec["coordination"] = [{"name": "pair", "roles": pair, "strategy": skew}]
    group: Document = {
        "apiVersion": f"{_GROUP}/{deployment.manifest.rbg_version}",
        "kind": "RoleBasedGroup",
        "metadata": metadata(deployment, deployment.manifest.name),
        "spec": spec,
    }
    return [group, _policy(deployment, pair)] if in_step and not old else [group]


def _percent(roles: list[RoleSpec], pair: list[str]) -> str:
    """Return one worker as a share of the smaller role, which is how v1alpha1 states a skew."""
    fewest = min(role.replicas for role in roles if role.name in pair)
    return f"{max(1, round(100 * _RELEASES_IN_STEP / fewest))}%"


def _policy(deployment: Deployment, pair: list[str]) -> Document:
    """Return the policy that upgrades prefill and decode workers in step. RBG finds it by the name of the group."""
    rolling: Document = {"maxSkew": _RELEASES_IN_STEP, "maxUnavailable": 1}
    return {
        "apiVersion": f"{_GROUP}/v1alpha2",
        "kind": "CoordinatedPolicy",
        "metadata": metadata(deployment, deployment.manifest.name),
        "spec": {"policies": [{"name": "pair", "roles": pair, "strategy": {"rollingUpdate": rolling}}]},
    }


def _common(role: RoleSpec, recreate: str = "RecreatePod") -> Document:
    rolling: Document = {"type": "InPlaceIfPossible", "maxUnavailable": 1}
    if role.kind is Kind.ROUTER:  # nothing to keep, and no moment without one: the new one starts first
        rolling = {"type": recreate, "maxSurge": 1, "maxUnavailable": 0}
    elif role.drains:
        rolling["inPlaceUpdateStrategy"] = {"gracePeriodSeconds": round(DRAIN_GRACE_S)}
    common: Document = {
        "name": role.name,
        "replicas": role.replicas,
        **_min_ready(role),
        "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdate": rolling},
    }
    if role.depends_on:
        common["dependencies"] = list(role.depends_on)
    if role.max_replicas:
        common["scalingAdapter"] = {"enable": True}
    return common


def _min_ready(role: RoleSpec) -> Document:
    return {"minReadySeconds": MIN_READY_S} if role.kind is Kind.WORKER else {}


def _role(deployment: Deployment, role: RoleSpec) -> Document:
    annotations = {"rbg.workloads.x-k8s.io/role-inplace-scheduling": "Preferred"}  # a new pod returns to its node
    pattern = {"template": pod_template(deployment, role)}
    return {**_common(role), "annotations": annotations, "standalonePattern": pattern}


def _old_role(deployment: Deployment, role: RoleSpec) -> Document:
    workload = {"apiVersion": f"{_GROUP}/v1alpha1", "kind": "InstanceSet"}  # the kind that is upgraded in place
    return {**_common(role, recreate="Recreate"), "workload": workload, "template": pod_template(deployment, role)}
