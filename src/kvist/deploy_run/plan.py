"""Plans a manifest as processes of this machine: one for each pod, with the pod's own loopback address.

Names, folders and keys that the cluster would provide are replaced in the arguments of the containers: Services by
addresses, mounted folders by folders of this machine, Secrets by random values. Pure; `run` carries the plan out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvist.channel import host_to_name
from kvist.deploy.manifest import Manifest
from kvist.deploy.workloads import POD_ADDRESS, SECRET_VALUE, Container, Json, Workload
from kvist.errors import ConfigError

MAX_PODS = 250
_WILDCARDS = ("0.0.0.0", "::")
_DISCOVERY = re.compile(r"--discovery=dns:([^:]+):(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFolder:
    """A volume of a pod; a folder that exists already belongs to the user."""

    path: Path
    exists_already: bool = False
    in_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPod:
    """One pod as a process."""

    name: str  # of the role and its number: prefill-0
    role: str
    image: str
    address: str
    port: int  # of HTTP
    args: tuple[str, ...]  # of the `kvist` command: the verb first
    environ: Mapping[str, str]
    folders: tuple[LocalFolder, ...]
    starts_after: tuple[str, ...]  # pods that must have been ready
    grace_s: float  # from the request to stop to the kill
    liveness_s: float  # of silence, after which the container is restarted
    update_grace_s: float = 0.0  # from unready to the stop, when its image is replaced
    min_ready_s: float = 0.0  # after an update, before the next one
    surges: bool = False  # when its image is replaced, the new process is ready before the old one stops
    pre_stop: tuple[str, ...] = ()  # the command that runs before the request to stop

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    pods: tuple[LocalPod, ...]
    discovery: Mapping[Path, tuple[str, ...]]  # files to write, with a URL on each line
    secrets: Mapping[Path, str]  # files to write, with mode 0600


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This machine, as the plan uses it."""

    folder: Path  # of the cluster, on a disk
    memory_folder: Path  # of the cluster, in memory
    secret_values: Mapping[str, str]  # by key of a Secret
    claims: Mapping[str, Path]  # folders that stand for PersistentVolumeClaims
    network: str = "127.77.0."  # the beginning of the addresses of its pods


def plan_local(manifest: Manifest, place: Place) -> LocalCluster:
    """Return the processes. Raises `ConfigError` for a manifest that this machine cannot stand for."""
    if manifest.is_compose:
        raise ConfigError("kvist deploy run starts manifests of Kubernetes; run this one with docker compose up")
    members = {workload.name: _pod_names(workload) for workload in manifest.workloads if workload.containers}
    names = [name for pods in members.values() for name in pods]
    if not names:
        raise ConfigError("no container of the manifest runs kvist serve, router, master or store")
    if len(names) > MAX_PODS:
        raise ConfigError(f"the manifest has {len(names)} pods; this machine stands for at most {MAX_PODS}")
    addresses = {name: f"{place.network}{index + 1}" for index, name in enumerate(names)}
    services = {
        service.name: tuple(
            addresses[pod]
            for workload in manifest.workloads
            if workload.containers and service.selector.items() <= workload.labels.items()
            for pod in members[workload.name]
        )
        for service in manifest.services
    }
    discovery: dict[Path, tuple[str, ...]] = {}
    secrets: dict[Path, str] = {}
    pods = []
    for workload in manifest.workloads:
        for name in members.get(workload.name, ()):
            before = tuple(pod for other in workload.depends_on for pod in members.get(other, ()))
            pods.append(_pod(workload, name, addresses[name], services, before, place, discovery, secrets))
    return LocalCluster(pods=tuple(pods), discovery=discovery, secrets=secrets)


def _pod_names(workload: Workload) -> list[str]:
    return [f"{workload.name}-{index}" for index in range(workload.replicas)]


def _pod(
    workload: Workload,
    name: str,
    address: str,
    services: Mapping[str, tuple[str, ...]],
    before: tuple[str, ...],
    place: Place,
    discovery: dict[Path, tuple[str, ...]],
    secrets: dict[Path, str],
) -> LocalPod:
    if len(workload.containers) != 1:
        raise ConfigError(f"{workload.where} has {len(workload.containers)} containers of Kvist: use one in a pod")
    (container,) = workload.containers
    folders = _folders(workload, container, name, place, secrets)
    args = [container.verb]
    for arg in container.args:
        if (found := _DISCOVERY.fullmatch(arg)) is not None:
            hosts = _addresses_of(found[1], services, container.where)
            path = place.folder / "discovery" / f"{found[1]}.urls"
            discovery[path] = tuple(f"http://{host}:{found[2]}" for host in hosts)
            args.append(f"--discovery=file:{path}")
        else:
            args.append(_localised(arg, address, services, folders))
    environ = {
        key: _localised(place.secret_values.get(container.secret_keys.get(key, ""), value), address, services, folders)
        for key, value in container.env.items()
    }
    if SECRET_VALUE in environ.values():
        missing = ", ".join(key for key, value in environ.items() if value == SECRET_VALUE)
        raise ConfigError(f"{container.where} takes {missing} from where this machine has no value")
    port = next(iter(container.ports.values()), 0)
    if not port:
        raise ConfigError(f"{container.where} names no port: list its HTTP port first")
    return LocalPod(
        name=name,
        role=workload.labels.get("app.kubernetes.io/component", workload.name),
        image=container.image,
        address=address,
        port=port,
        args=tuple(args),
        environ=environ,
        folders=tuple(folders.values()),
        starts_after=before,
        grace_s=workload.grace_s,
        liveness_s=container.liveness_s,
        update_grace_s=workload.update_grace_s,
        min_ready_s=workload.min_ready_s,
        surges=workload.surges,
        pre_stop=tuple(word.replace("://127.0.0.1:", f"://{address}:") for word in container.pre_stop),
    )


def _folders(
    workload: Workload, container: Container, pod: str, place: Place, secrets: dict[Path, str]
) -> dict[str, LocalFolder]:
    """Return the folder of this machine for each path that is mounted."""
    folders = {}
    for path, name in container.mounts.items():
        volume = workload.volumes.get(name, {})
        if path == "/dev/shm":  # shared by all processes of this machine
            continue
        if "secret" in volume:
            folder = place.folder / pod / "secrets" / name
            for key, value in place.secret_values.items():
                secrets[folder / key] = value
            folders[path] = LocalFolder(path=folder)
        else:
            folders[path] = _folder(volume, place, pod, name, container.where)
    return folders


def _folder(volume: Json, place: Place, pod: str, name: str, where: str) -> LocalFolder:
    if isinstance(host := volume.get("hostPath"), dict):
        return LocalFolder(path=Path(str(host.get("path"))), exists_already=True)
    if isinstance(claim := volume.get("persistentVolumeClaim"), dict):
        claimed = str(claim.get("claimName"))
        if claimed not in place.claims:
            raise ConfigError(
                f"{where} uses the PersistentVolumeClaim {claimed}: name a folder for it, --claims {claimed}=FOLDER",
                param="claims",
            )
        return LocalFolder(path=place.claims[claimed], exists_already=True)
    if isinstance(empty := volume.get("emptyDir"), dict):
        in_memory = empty.get("medium") == "Memory"
        return LocalFolder(path=(place.memory_folder if in_memory else place.folder) / pod / name, in_memory=in_memory)
    raise ConfigError(f"{where}: the volume {name} is of a kind that this machine cannot stand for")


def _localised(
    text: str, address: str, services: Mapping[str, tuple[str, ...]], folders: Mapping[str, LocalFolder]
) -> str:
    """Return the text with addresses, names of Services, and mounted paths of this machine."""
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    if value in (*_WILDCARDS, POD_ADDRESS):
        return f"{flag}{equals}{address}"
    if value.startswith("/"):
        path = PurePosixPath(value)
        for mounted in sorted(folders, key=len, reverse=True):
            if path.is_relative_to(mounted):
                return f"{flag}{equals}{folders[mounted].path / path.relative_to(mounted)}"
        return text
    for name in sorted(services, key=len, reverse=True):
        if services[name]:
            host = host_to_name(services[name][0], services[name][0])
            value = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])(\.[\w.-]+)?", host, value)
    return f"{flag}{equals}{value}"


def _addresses_of(name: str, services: Mapping[str, tuple[str, ...]], where: str) -> Sequence[str]:
    if name not in services:
        raise ConfigError(f"{where} looks for workers at {name}, and the manifest has no Service of this name")
    return services[name]


def updates(old: LocalCluster, new: LocalCluster) -> list[LocalPod]:
    """Return the pods whose image has changed, in the order in which they are replaced: as RBG does, from the last pod
    of a role to its first, with prefill and decode in step. Raises `ConfigError` for any other change."""
    before = {pod.name: pod for pod in old.pods}
    if before.keys() != {pod.name for pod in new.pods} or any(
        not _differs_by_image(before[pod.name], pod) for pod in new.pods
    ):
        raise ConfigError("only the images of a running manifest can be changed in place: stop it, and start it again")
    changed = [pod for pod in new.pods if pod.image != before[pod.name].image]
    rank = {pod.name: index for index, pod in enumerate(new.pods)}
    by_role: dict[str, list[LocalPod]] = {}
    for pod in changed:
        by_role.setdefault(pod.role, []).insert(0, pod)
    ordered = []
    pair = [by_role.pop(role) for role in ("prefill", "decode") if role in by_role]
    for role in sorted(by_role, key=lambda role: rank[by_role[role][-1].name]):
        if pair and role == "router":
            ordered += _in_step(pair)
            pair = []
        ordered += by_role[role]
    return ordered + _in_step(pair)


def _differs_by_image(old: LocalPod, new: LocalPod) -> bool:
    return (old.args, old.folders, old.port, dict(old.environ)) == (new.args, new.folders, new.port, dict(new.environ))


def _in_step(roles: list[list[LocalPod]]) -> list[LocalPod]:
    """Return the pods of both roles in turn, so that neither is ahead of the other by more than one."""
    longest = max((len(pods) for pods in roles), default=0)
    return [pods[index] for index in range(longest) for pods in roles if index < len(pods)]
