"""Fields that take one of a few words, and that the published schemas leave open: a wrong word is found only when the
object is applied, or, in the pods of a RoleBasedGroup, when no pod appears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from kvist.deploy.problem import Problem

_RBG = "rbg.workloads.x-k8s.io"
_RUNTIME_PROFILES = ("RuntimeDefault", "Localhost", "Unconfined")
_UPDATES = ("RecreatePod", "InPlaceIfPossible", "InPlaceOnly")
_BOOLEANS = ("true", "false")

# End of the field's path -> its values; a path begins with the kind of the object, and has no numbers of list items.
_SETS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    # RoleBasedGroup
    ("rollingUpdate", "type"): _UPDATES,
    ("workload", "apiVersion"): (
        *("apps/v1", "leaderworkerset.x-k8s.io/v1", "workloads.x-k8s.io/v1alpha1", "workloads.x-k8s.io/v1alpha2"),
    ),
    ("workload", "kind"): ("StatefulSet", "Deployment", "LeaderWorkerSet", "InstanceSet", "RoleInstanceSet"),
    ("annotations", f"{_RBG}/role-workload-type"): (
        "workloads.x-k8s.io/v1alpha2/RoleInstanceSet",
        "apps/v1/StatefulSet",
        "apps/v1/Deployment",
        "leaderworkerset.x-k8s.io/v1/LeaderWorkerSet",
    ),
    ("annotations", f"{_RBG}/role-inplace-scheduling"): ("Preferred", "Required"),
    ("annotations", f"{_RBG}/role-inplace-scheduling-granularity"): ("Pod", "Component"),
    ("annotations", f"{_RBG}/role-instance-pattern"): ("Stateful", "Stateless"),
    ("annotations", f"{_RBG}/restart-trigger-policy"): ("Inherit", "Ignore"),
    ("annotations", f"{_RBG}/group-gang-scheduling"): _BOOLEANS,
    ("annotations", f"{_RBG}/role-instance-gang-scheduling"): _BOOLEANS,
    ("annotations", f"{_RBG}/role-disable-exclusive"): _BOOLEANS,
    # pods
    ("dnsPolicy",): ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    ("preemptionPolicy",): ("PreemptLowerPriority", "Never"),
    ("spec", "restartPolicy"): ("Always", "OnFailure", "Never"),
    ("whenUnsatisfiable",): ("DoNotSchedule", "ScheduleAnyway"),
    ("tolerations", "effect"): ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    ("tolerations", "operator"): ("Exists", "Equal", "Lt", "Gt"),
    ("matchExpressions", "operator"): ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
    ("matchFields", "operator"): ("In", "NotIn"),
    ("emptyDir", "medium"): ("", "Memory", "HugePages*"),
    ("hostPath", "type"): (
        *("", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket", "CharDevice", "BlockDevice"),
    ),
    ("accessModes",): ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"),
    ("volumeMode",): ("Filesystem", "Block"),
    # containers
    ("imagePullPolicy",): ("Always", "IfNotPresent", "Never"),
    ("terminationMessagePolicy",): ("File", "FallbackToLogsOnError"),
    ("mountPropagation",): ("None", "HostToContainer", "Bidirectional"),
    ("recursiveReadOnly",): ("Disabled", "IfPossible", "Enabled"),
    ("resizePolicy", "restartPolicy"): ("NotRequired", "RestartContainer"),
    ("containers", "restartPolicy"): ("Always", "OnFailure", "Never"),
    ("initContainers", "restartPolicy"): ("Always", "OnFailure", "Never"),
    ("ports", "protocol"): ("TCP", "UDP", "SCTP"),
    ("servicePorts", "protocol"): ("TCP", "UDP", "SCTP"),
    ("httpGet", "scheme"): ("HTTP", "HTTPS"),
    ("procMount",): ("Default", "Unmasked"),
    ("seccompProfile", "type"): _RUNTIME_PROFILES,
    ("appArmorProfile", "type"): _RUNTIME_PROFILES,
    # other objects
    ("Deployment", "spec", "strategy", "type"): ("RollingUpdate", "Recreate"),
    ("spec", "updateStrategy", "type"): ("RollingUpdate", "OnDelete"),
    ("podManagementPolicy",): ("OrderedReady", "Parallel"),
    ("Service", "spec", "type"): ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    ("sessionAffinity",): ("None", "ClientIP"),
    ("externalTrafficPolicy",): ("Cluster", "Local"),
    ("internalTrafficPolicy",): ("Cluster", "Local"),
    ("ipFamilyPolicy",): ("SingleStack", "PreferDualStack", "RequireDualStack"),
    ("policyTypes",): ("Ingress", "Egress"),
    ("metrics", "type"): ("Resource", "ContainerResource", "Pods", "Object", "External"),
    ("target", "type"): ("Utilization", "Value", "AverageValue"),
    ("unhealthyPodEvictionPolicy",): ("IfHealthyBudget", "AlwaysAllow"),
}
_V1ALPHA1_SETS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    **_SETS,
    ("rollingUpdate", "type"): (*_UPDATES, "Recreate"),
}
_OWN_NAMES = frozenset({"labels", "matchLabels", "nodeSelector", "data", "stringData"})  # maps with a user's own names


def open_word_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield each text of the document that is not one of its field's words."""
    sets = _V1ALPHA1_SETS if str(document.get("apiVersion")).endswith("/v1alpha1") else _SETS
    yield from _problems(document, (str(document.get("kind")),), "", sets)


def _problems(
    value: object, names: tuple[str, ...], path: str, sets: Mapping[tuple[str, ...], tuple[str, ...]]
) -> Iterator[Problem]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in _OWN_NAMES:
                yield from _problems(inner, (*names, str(name)), f"{path}.{name}", sets)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, names, f"{path}.{index}", sets)
    elif isinstance(value, str):
        shortest = 2 if names[-2:-1] == ("annotations",) else 1  # a user's own annotation may have the name of a field
        ends = (names[-length:] for length in range(shortest, 5))
        words = next((sets[end] for end in ends if end in sets), None)
        if words is not None and not any(fnmatchcase(value, word) for word in words):
            *others, last = filter(None, words)
            text = f"{value!r} is not one of its values"
            yield Problem(path.removeprefix("."), text, f"use {', '.join(others)} or {last}")
