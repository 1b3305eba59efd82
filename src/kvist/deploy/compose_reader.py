"""Reads the services of a project of Compose as workloads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvist.deploy.kubernetes_reader import megabytes
from kvist.deploy.workloads import (
    SECRET_VALUE,
    Json,
    Workload,
    as_dict,
    as_list,
    kvist_container,
    split_words,
)

_KUBERNETES_UNITS = {"": "", "b": "", "k": "Ki", "kb": "Ki", "m": "Mi", "mb": "Mi", "g": "Gi", "gb": "Gi"}


def workloads_of_project(project: Json) -> Iterator[Workload]:
    """Yield a workload for each service."""
    for name, value in as_dict(project.get("services")).items():
        service = as_dict(value)
        env = {key: SECRET_VALUE if "${" in text else text for key, text in _variables(service.get("environment"))}
        mounts, volumes = _mounts(service)
        container = kvist_container(
            where=f"service {name}",
            image=str(service.get("image", "")),
            words=[*_words(service.get("entrypoint")), *_words(service.get("command"))],
            env=env,
            ports={},
            mounts=mounts,
            memory_mb=compose_megabytes(service.get("mem_limit")),
            probes={"readinessProbe": "/ready"} if "healthcheck" in service else {},
        )
        yield Workload(
            where=f"service {name}",
            name=str(name),
            replicas=1,
            containers=() if container is None else (container,),
            volumes=volumes,
            grace_s=_seconds(service.get("stop_grace_period"), 10.0),
            pod_name=str(name),
        )


def _mounts(service: Json) -> tuple[dict[str, str], dict[str, Json]]:
    """Return the name of the volume at each path, and whether each volume is in memory."""
    mounts, volumes = {}, {}
    for value in as_list(service.get("volumes")):
        if isinstance(value, str):
            source, _, rest = value.partition(":")
            mount: Json = {"source": source, "target": rest.partition(":")[0] or source}
        else:
            mount = as_dict(value)
        name = str(mount.get("source") or mount.get("target"))
        mounts[str(mount.get("target"))] = name
        volumes[name] = {"emptyDir": {"medium": "Memory"}} if mount.get("type") == "tmpfs" else {"volume": {}}
    return mounts, volumes


def _variables(value: object) -> list[tuple[str, str]]:
    """Return the variables of a service, which are an object, or a list of NAME=VALUE."""
    if isinstance(value, dict):
        return [(str(name), str(item)) for name, item in value.items()]
    parts = [str(item).partition("=") for item in as_list(value)]
    return [(name, item) for name, _, item in parts]


def _words(value: object) -> list[str]:
    return split_words(value) if isinstance(value, str) else [str(word) for word in as_list(value)]


def _seconds(value: object, default: float) -> float:
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", str(value or ""))
    if match is None or not any(match.groups()):
        return default
    return 60.0 * int(match[1] or 0) + int(match[2] or 0)


def compose_megabytes(quantity: object) -> float | None:
    """Return a quantity such as 512m, which is 512 MiB, in units of 10**6; None if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(quantity))
    unit = None if match is None else _KUBERNETES_UNITS.get(match[2].lower())
    return None if match is None or unit is None else megabytes(match[1] + unit)
