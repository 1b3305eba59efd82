"""Reads a manifest: from the text of a user's YAML to its workloads, of all kinds of documents."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from kvist.errors import ConfigError

Json = dict[str, Any]

MAX_BYTES = 4 << 20
_MAX_NODES = 200_000  # aliases counted each time: a small text can stand for a huge document
_VERBS = ("serve", "router", "master", "store")
_VARIABLE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
_UNITS = {"": 1e-6, "k": 1e-3, "M": 1.0, "G": 1e3, "T": 1e6, "Ki": 1.024e-3, "Mi": 1.048576, "Gi": 1073.741824}
_COMPOSE_UNITS = {"": "", "b": "", "k": "Ki", "kb": "Ki", "m": "Mi", "mb": "Mi", "g": "Gi", "gb": "Gi"}
SECRET_VALUE = "of-a-secret-0123456789abcdef"  # stands for a value that the manifest does not have


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container that runs a verb of Kvist."""

    where: str  # for messages: the path in the document
    image: str
    verb: str
    args: tuple[str, ...]  # with the variables of `env` replaced
    env: Mapping[str, str]
    ports: Mapping[str, int]
    mounts: Mapping[str, str]  # path in the container -> name of the volume
    memory_mb: float | None
    probes: Mapping[str, str]  # readinessProbe, livenessProbe, startupProbe -> path


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Pods from one template: a role of a RoleBasedGroup, a StatefulSet, a Deployment, or a service of Compose."""

    where: str
    name: str
    replicas: int
    containers: tuple[Container, ...]
    volumes: Mapping[str, Json]  # by name, as in the document
    grace_s: float
    host_network: bool = False
    pod_name: str = ""  # the longest that the workload makes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    documents: tuple[Json, ...]
    workloads: tuple[Workload, ...]
    is_compose: bool = field(default=False)


def read_manifest(text: str) -> Manifest:
    """Return the manifest's documents and workloads. Raises `ConfigError` for text that is not a manifest."""
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"the manifest has over {MAX_BYTES >> 20} MiB")
    try:
        loaded = [document for document in yaml.safe_load_all(text) if document is not None]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"the manifest is not YAML: {' '.join(str(error).split())}") from error
    budget = _MAX_NODES
    for document in loaded:
        budget -= _num_nodes(document, budget)
    if not loaded or not all(isinstance(document, dict) for document in loaded):
        raise ConfigError("the manifest has no objects: each document needs an `apiVersion` and a `kind`")
    if len(loaded) == 1 and "services" in loaded[0] and "kind" not in loaded[0]:
        return Manifest(documents=tuple(loaded), workloads=tuple(_services(loaded[0])), is_compose=True)
    workloads = tuple(workload for document in loaded for workload in _workloads(document))
    return Manifest(documents=tuple(loaded), workloads=workloads)


def _num_nodes(value: object, budget: int) -> int:
    """Return the size of the tree. Raises `ConfigError` beyond the budget, and for a tree that contains itself."""
    pending, number = [(value, 0)], 0
    while pending:
        node, depth = pending.pop()
        number += 1
        if number > budget or depth > 100:
            raise ConfigError(f"the manifest has over {_MAX_NODES} values, with its aliases expanded")
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        pending += ((item, depth + 1) for item in inner)
    return number


def _workloads(document: Json) -> Iterator[Workload]:
    kind, spec = document.get("kind"), _dict(document.get("spec"))
    name = str(_dict(document.get("metadata")).get("name", ""))
    if kind in ("StatefulSet", "Deployment", "DaemonSet"):
        yield _workload(f"{kind} {name}", name, name, _number(spec.get("replicas"), 1), _dict(spec.get("template")))
    elif kind == "Pod":
        yield _workload(f"Pod {name}", name, name, 1, document)
    elif kind == "RoleBasedGroup":
        shared = {item.get("name"): _dict(item.get("template")) for item in _dicts(spec.get("roleTemplates"))}
        for role in _dicts(spec.get("roles")):
            role_name = str(role.get("name", ""))
            holder = _dict(role.get("standalonePattern") or role.get("leaderWorkerPattern") or role)
            template = _dict(holder.get("template"))
            if reference := _dict(holder.get("templateRef")):
                base = shared.get(reference.get("name"), {})
                template = merged(base, _dict(reference.get("patch") or role.get("templatePatch")))
            replicas = _number(role.get("replicas"), 1)
            yield _workload(
                f"RoleBasedGroup {name}, role {role_name}", role_name, f"{name}-{role_name}", replicas, template
            )


def merged(base: Any, patch: Any) -> Any:
    """Return the template with the patch applied: objects are merged, and so are lists of named objects."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in patch.items()}}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in _dict(item) for item in [*base, *patch]):
        by_name = {item["name"]: item for item in base}
        for item in patch:
            by_name[item["name"]] = merged(by_name.get(item["name"]), item)
        return list(by_name.values())
    return patch


def _workload(where: str, name: str, pods: str, replicas: int, template: Json) -> Workload:
    spec = _dict(template.get("spec"))
    containers = [_container(where, item) for item in _dicts(spec.get("containers"))]
    return Workload(
        where=where,
        name=name,
        replicas=replicas,
        containers=tuple(item for item in containers if item is not None),
        volumes={str(item.get("name")): item for item in _dicts(spec.get("volumes"))},
        grace_s=_number(spec.get("terminationGracePeriodSeconds"), 30),
        host_network=spec.get("hostNetwork") is True,
        pod_name=f"{pods}-{max(0, replicas - 1)}",
    )


def _container(where: str, item: Json) -> Container | None:
    words = [str(word) for key in ("command", "args") for word in _list(item.get(key))]
    env = {str(one.get("name")): str(one.get("value", SECRET_VALUE)) for one in _dicts(item.get("env"))}
    env |= {name: "10.0.0.1" for name in env if env[name] == SECRET_VALUE and not name.startswith("KVIST_")}
    limits = _dict(_dict(item.get("resources")).get("limits"))
    probes = {
        key: str(_dict(_dict(item.get(key)).get("httpGet")).get("path", ""))
        for key in ("readinessProbe", "livenessProbe", "startupProbe")
        if key in item
    }
    return _kvist_container(
        where=f"{where}, container {item.get('name')}",
        image=str(item.get("image", "")),
        words=words,
        env=env,
        ports={str(port.get("name")): _number(port.get("containerPort"), 0) for port in _dicts(item.get("ports"))},
        mounts={str(one.get("mountPath")): str(one.get("name")) for one in _dicts(item.get("volumeMounts"))},
        memory_mb=megabytes(limits.get("memory")),
        probes=probes,
    )


def _kvist_container(*, words: list[str], env: dict[str, str], **rest: Any) -> Container | None:
    """Return the container, or None if it runs something else."""
    if len(words) == 3 and words[1] in ("-c", "-ec", "-lc"):  # of a shell
        try:
            words = [word for word in shlex.split(words[2]) if word != "exec"]
        except ValueError:
            return None
    words = [_VARIABLE.sub(lambda match: env.get(match[1], match[0]), word) for word in words]
    start = next((index for index, word in enumerate(words) if word in _VERBS), None)
    if start is None or not any(word.rsplit("/", 1)[-1] == "kvist" for word in words[:start]):
        return None
    return Container(verb=words[start], args=tuple(words[start + 1 :]), env=env, **rest)


def _services(project: Json) -> Iterator[Workload]:
    for name, service in _dict(project.get("services")).items():
        service = _dict(service)
        env = {key: SECRET_VALUE if "${" in value else value for key, value in _variables(service.get("environment"))}
        mounts, volumes = _compose_mounts(service)
        container = _kvist_container(
            where=f"service {name}",
            image=str(service.get("image", "")),
            words=[*_words(service.get("entrypoint")), *_words(service.get("command"))],
            env=env,
            ports={},
            mounts=mounts,
            memory_mb=megabytes(service.get("mem_limit"), compose=True),
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


def _compose_mounts(service: Json) -> tuple[dict[str, str], dict[str, Json]]:
    mounts, volumes = {}, {}
    for one in _list(service.get("volumes")):
        if isinstance(one, str):
            source, _, rest = one.partition(":")
            target = rest.partition(":")[0] or source
            one = {
                "type": "bind" if source.startswith((".", "/", "~")) else "volume",
                "source": source,
                "target": target,
            }
        one = _dict(one)
        name = str(one.get("source") or one.get("target"))
        mounts[str(one.get("target"))] = name
        medium = {"emptyDir": {"medium": "Memory"}} if one.get("type") == "tmpfs" else {"volume": {}}
        volumes[name] = medium
    return mounts, volumes


def _variables(value: object) -> list[tuple[str, str]]:
    """Return the variables of a service, which are an object, or a list of NAME=VALUE."""
    if isinstance(value, dict):
        return [(str(name), str(item)) for name, item in value.items()]
    parts = [str(item).partition("=") for item in _list(value)]
    return [(name, item) for name, _, item in parts]


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        try:
            return shlex.split(value)
        except ValueError:
            return []
    return [str(word) for word in _list(value)]


def _seconds(value: object, default: float) -> float:
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", str(value or ""))
    if match is None or not any(match.groups()):
        return default
    return 60.0 * int(match[1] or 0) + int(match[2] or 0)


def megabytes(quantity: object, *, compose: bool = False) -> float | None:
    """Return a quantity such as 512Mi or 2G in units of 10**6; None if it is none. Compose writes 512m for 512Mi."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(quantity))
    if match is None:
        return None
    unit = _COMPOSE_UNITS.get(match[2].lower(), "?") if compose else match[2]
    return float(match[1]) * _UNITS[unit] if unit in _UNITS else None


def _dict(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: object) -> list[Json]:
    return [item for item in _list(value) if isinstance(item, dict)]


def _number(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
