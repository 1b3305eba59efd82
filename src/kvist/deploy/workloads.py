"""The workloads of a manifest: what runs Kvist, and where, whichever document it stands in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

SECRET_VALUE = "of-a-secret-0123456789abcdef"  # stands for a value that the manifest does not have
POD_ADDRESS = "10.0.0.1"  # stands for the address of a pod
LIVENESS_S = 30.0  # of Kubernetes: three failures of a probe every ten seconds
_VERBS = ("serve", "router", "master", "store")
_VARIABLE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container that runs a verb of Kvist."""

    where: str  # for messages: the path in the document
    image: str
    verb: str
    args: tuple[str, ...]  # with the variables of `env` replaced
    env: Mapping[str, str]
    secret_keys: Mapping[str, str] = field(default_factory=dict)  # of the variables that come from a Secret
    ports: Mapping[str, int]
    mounts: Mapping[str, str]  # path in the container -> name of the volume
    memory_mb: float | None
    probes: Mapping[str, str]  # readinessProbe, livenessProbe, startupProbe -> path
    probe_ports: Mapping[str, object] = field(default_factory=dict)  # of the same probes: a number, or any other value
    liveness_s: float = LIVENESS_S  # of silence, after which it is restarted
    pre_stop: tuple[str, ...] = ()  # the command that runs before the request to stop
    gpus: object = None  # as the manifest has them, of any type; None: not stated


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
    labels: Mapping[str, str] = field(default_factory=dict)  # of its pods
    depends_on: tuple[str, ...] = ()  # workloads that are ready before it starts
    update_grace_s: float = 0.0  # from unready to the stop, when an image is replaced in place
    min_ready_s: float = 0.0  # a new pod is ready for this time before the next one is replaced
    surges: bool = False  # at an upgrade, a new pod is ready before an old one stops


def kvist_container(*, words: list[str], env: Mapping[str, str], **rest: Any) -> Container | None:
    """Return the container with these words of a command line, or None if it runs something else."""
    if len(words) == 3 and words[1] in ("-c", "-ec", "-lc"):  # of a shell
        words = [word for word in split_words(words[2]) if word != "exec"]
    words = [_VARIABLE.sub(lambda match: env.get(match[1], match[0]), word) for word in words]
    start = next((index for index, word in enumerate(words) if word in _VERBS), None)
    if start is None or not any(word.rsplit("/", 1)[-1] == "kvist" for word in words[:start]):
        return None
    return Container(verb=words[start], args=tuple(words[start + 1 :]), env=env, **rest)


def split_words(text: str) -> list[str]:
    """Return the words of a command line; none if its quotes do not match."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def as_dict(value: object) -> Json:
    """Return the value if it is an object, else an empty one: what a user wrote may have any type."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def dicts(value: object) -> list[Json]:
    return [item for item in as_list(value) if isinstance(item, dict)]


def as_int(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
