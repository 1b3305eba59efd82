"""From a role to its pods: the template that a RoleBasedGroup and a StatefulSet share, and the objects beside them."""

from __future__ import annotations

from kvist.deploy.description import Deployment
from kvist.deploy.roles import API_KEY, CLUSTER_KEY, KEYS_FOLDER, Kind, RoleSpec, Volume

Document = dict[str, object]

USER_ID = 10001  # of the image
RBG_OLD, RBG = "rolebasedgroup.workloads.x-k8s.io", "rbg.workloads.x-k8s.io"  # prefixes of v1alpha1 and v1alpha2
QUEUE_METRIC = "kvist_num_requests_waiting"  # as the Prometheus adapter serves kvist:num_requests_waiting
_WAITING_PER_WORKER = "4"  # the autoscaler starts another worker above it
_GPU = "nvidia.com/gpu"
_START_S, _PERIOD_S = 1800, 5  # loading a large model from a slow disk takes long


def labels(deployment: Deployment, role: str) -> dict[str, str]:
    """Return the labels of a role's pods: those that select them, and RBG's of both API versions."""
    name = deployment.manifest.name
    return {
        **selector(deployment, role),
        "app.kubernetes.io/name": "kvist",
        f"{RBG_OLD}/name": name,
        f"{RBG_OLD}/role": role,
        f"{RBG}/group-name": name,
        f"{RBG}/role-name": role,
    }


def selector(deployment: Deployment, role: str | None = None) -> dict[str, str]:
    """Return the labels that select the pods of a role, or of the whole cluster."""
    whole = {"app.kubernetes.io/instance": deployment.manifest.name}
    return whole if role is None else {**whole, "app.kubernetes.io/component": role}


def metadata(deployment: Deployment, name: str) -> Document:
    namespace = deployment.manifest.namespace
    placed: Document = {} if namespace is None else {"namespace": namespace}
    return {"name": name, **placed, "labels": {"app.kubernetes.io/name": "kvist", **selector(deployment)}}


def pod_template(deployment: Deployment, role: RoleSpec) -> Document:
    """Return the template of the role's pods."""
    keys = {"name": "keys", "secret": {"secretName": deployment.manifest.secret, "defaultMode": 0o440}}
    return {
        "metadata": {"labels": labels(deployment, role.name)},
        "spec": {
            "terminationGracePeriodSeconds": role.grace_s,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(deployment, role)],
            "volumes": [
                *(_volume(deployment, volume) for volume in role.volumes),
                *([keys] if role.reads_pages_secret else []),
            ],
            **({"tolerations": [{"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}]} if role.gpus else {}),
        },
    }


def _container(deployment: Deployment, role: RoleSpec) -> Document:
    resources: Document = {"cpu": f"{role.cpus:g}", "memory": f"{role.memory_mb}M"}
    gpus: Document = {_GPU: str(role.gpus)} if role.gpus else {}
    http = role.ports[0].number
    return {
        "name": role.kind.value,
        "image": deployment.container.image,
        "command": ["kvist"],
        "args": list(role.args),
        "env": [*environment(deployment, role)],
        "ports": [{"name": port.name, "containerPort": port.number} for port in role.ports],
        "startupProbe": _probe("/health", failures=_START_S // _PERIOD_S),
        "readinessProbe": _probe("/ready", failures=1),
        "livenessProbe": _probe("/health", failures=6),
        **({"lifecycle": {"preStop": {"exec": {"command": drain_command(http)}}}} if role.drains else {}),
        "resources": {"requests": {**resources, **gpus}, "limits": {"memory": resources["memory"], **gpus}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            *(_mount(volume) for volume in role.volumes),
            *([{"name": "keys", "mountPath": KEYS_FOLDER, "readOnly": True}] if role.reads_pages_secret else []),
        ],
    }


def drain_command(http_port: int) -> list[str]:
    """Return the command that makes the container's server refuse new requests, before the signal comes."""
    return ["kvist", "drain", f"http://127.0.0.1:{http_port}"]


def environment(deployment: Deployment, role: RoleSpec) -> list[Document]:
    def from_secret(name: str, key: str) -> Document:
        reference = {"name": deployment.manifest.secret, "key": key}
        return {"name": name, "valueFrom": {"secretKeyRef": reference}}

    variables: list[Document] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "HOME", "value": "/tmp"},
        from_secret("KVIST_API_KEY", API_KEY),
    ]
    if role.kind in (Kind.WORKER, Kind.ROUTER):
        variables.append(from_secret("KVIST_CLUSTER_KEY", CLUSTER_KEY))
    return variables


def _probe(path: str, *, failures: int) -> Document:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": _PERIOD_S,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    }


def _mount(volume: Volume) -> Document:
    mount: Document = {"name": volume.name, "mountPath": volume.path}
    return {**mount, "readOnly": True} if volume.name == "models" else mount


def _volume(deployment: Deployment, volume: Volume) -> Document:
    container = deployment.container
    if volume.name == "models":
        if container.model_claim is not None:
            return {
                "name": volume.name,
                "persistentVolumeClaim": {"claimName": container.model_claim, "readOnly": True},
            }
        return {"name": volume.name, "hostPath": {"path": container.model_folder, "type": "Directory"}}
    folder: Document = {"medium": "Memory"} if volume.in_memory else {}
    if volume.megabytes is not None:
        folder["sizeLimit"] = f"{volume.megabytes}M"
    return {"name": volume.name, "emptyDir": folder}


def headless_service(deployment: Deployment, role: RoleSpec, name: str) -> Document:
    """Return the Service whose name resolves to all pods of the role, unready ones included.

    A worker that drains is unready, and routers must not forget it before its streams have ended."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(deployment, name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(deployment, role.name),
            "ports": _service_ports(role),
        },
    }


def service(deployment: Deployment, role: RoleSpec, name: str) -> Document:
    """Return the Service with one address for the role's ready pods."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(deployment, name),
        "spec": {"selector": selector(deployment, role.name), "ports": _service_ports(role)},
    }


def _service_ports(role: RoleSpec) -> list[Document]:
    return [{"name": port.name, "port": port.number, "targetPort": port.name} for port in role.ports]


def network_policies(deployment: Deployment, roles: list[RoleSpec]) -> list[Document]:
    """Return the policies: pods of the cluster reach each other, everybody reaches the router, Prometheus /metrics."""
    name = deployment.manifest.name
    from_cluster: list[Document] = [{"from": [{"podSelector": {"matchLabels": selector(deployment)}}]}]
    if (monitoring := deployment.manifest.monitoring_namespace) is not None:
        chosen = {"matchLabels": {"kubernetes.io/metadata.name": monitoring}}
        from_cluster.append({"from": [{"namespaceSelector": chosen}], "ports": [{"port": "http"}]})
    to_router: list[Document] = [{"ports": [{"port": "http"}]}]
    assert roles[-1].kind is Kind.ROUTER
    return [
        _policy(deployment, f"{name}-inside", selector(deployment), from_cluster),
        _policy(deployment, f"{name}-router", selector(deployment, "router"), to_router),
    ]


def _policy(deployment: Deployment, name: str, chosen: dict[str, str], ingress: list[Document]) -> Document:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(deployment, name),
        "spec": {"podSelector": {"matchLabels": chosen}, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def pod_monitor(deployment: Deployment) -> Document:
    """Return the object by which the Prometheus operator reads /metrics of every pod."""
    credentials = {"name": deployment.manifest.secret, "key": API_KEY}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(deployment, deployment.manifest.name),
        "spec": {
            "selector": {"matchLabels": selector(deployment)},
            "podMetricsEndpoints": [
                {"port": "http", "path": "/metrics", "authorization": {"type": "Bearer", "credentials": credentials}}
            ],
        },
    }


def autoscaler(deployment: Deployment, role: RoleSpec, target: Document) -> Document:
    """Return the autoscaler of a role of workers, by the requests that wait at each worker."""
    metric = {"metric": {"name": QUEUE_METRIC}, "target": {"type": "AverageValue", "averageValue": _WAITING_PER_WORKER}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(deployment, f"{deployment.manifest.name}-{role.name}"),
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": role.replicas,
            "maxReplicas": role.max_replicas,
            "metrics": [{"type": "Pods", "pods": metric}],
        },
    }


def disruption_budget(deployment: Deployment, role: RoleSpec) -> Document:
    """Return the limit of pods of the role that a node's maintenance may stop at once."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(deployment, f"{deployment.manifest.name}-{role.name}"),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(deployment, role.name)},
        },
    }


def workers_of(roles: list[RoleSpec]) -> list[RoleSpec]:
    return [role for role in roles if role.kind is Kind.WORKER]
