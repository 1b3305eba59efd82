"""Documents for Compose: the same roles as containers of one host."""

from __future__ import annotations

from kvist.deploy.description import Deployment
from kvist.deploy.pods import USER_ID, Document
from kvist.deploy.roles import (
    API_KEY,
    CLUSTER_KEY,
    HTTP_PORT,
    KEYS_FOLDER,
    OWN_ADDRESS,
    PAGES_SECRET,
    Addresses,
    Kind,
    RoleSpec,
    Volume,
    roles_of,
    worker_counts,
)

_CHECK = "import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/ready', timeout=3)"


def compose_document(deployment: Deployment) -> Document:
    """Return the project. Each worker and store is a service of its own, with its name as its address."""
    roles = roles_of(deployment, _addresses(deployment))
    members = {role.name: _members(role) for role in roles}
    services = {
        member: _service(deployment, role, member, [other for name in role.depends_on for other in members[name]])
        for role in roles
        for member in members[role.name]
    }
    folders: dict[str, Document] = {
        f"{member}-{volume.name}": {}
        for role in roles
        for member in members[role.name]
        for volume in role.volumes
        if _outlives_container(volume)
    }
    files = {PAGES_SECRET: {"file": f"./{PAGES_SECRET}"}, API_KEY: {"environment": "KVIST_API_KEY"}}
    keys = files if any(role.reads_pages_secret for role in roles) else {}
    project: Document = {"name": deployment.manifest.name, "services": services}
    return {**project, **({"volumes": folders} if folders else {}), **({"secrets": keys} if keys else {})}


def _members(role: RoleSpec) -> list[str]:
    if role.kind in (Kind.MASTER, Kind.ROUTER):
        return [role.name]
    return [f"{role.name}-{index}" for index in range(role.replicas)]


def _addresses(deployment: Deployment) -> Addresses:
    workers = {role: tuple(f"{role}-{index}" for index in range(number)) for role, number in worker_counts(deployment)}
    return Addresses(workers=workers, master="mooncake-master")


def _outlives_container(volume: Volume) -> bool:
    return volume.name in ("host-tier", "ssd")


def _service(deployment: Deployment, role: RoleSpec, member: str, before: list[str]) -> Document:
    check = _CHECK.format(port=role.ports[0].number)
    service: Document = {
        "image": deployment.container.image,
        "command": [arg.replace(OWN_ADDRESS, member) for arg in role.args],
        "entrypoint": ["kvist"],
        "hostname": member,
        "user": f"{USER_ID}:{USER_ID}",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{role.grace_s}s",
        "mem_limit": f"{role.memory_mb}m",
        "cpus": role.cpus,
        "environment": _environment(role),
        "healthcheck": {
            "test": ["CMD", "python", "-c", check],
            "interval": "5s",
            "timeout": "5s",
            "retries": 360,
        },
    }
    volumes = [_mount(deployment, volume, member) for volume in role.volumes if volume.path != "/dev/shm"]
    service["volumes"] = volumes
    if (shared := next((item for item in role.volumes if item.path == "/dev/shm"), None)) is not None:
        service["shm_size"] = f"{shared.megabytes}m"
    if before:
        service["depends_on"] = {name: {"condition": "service_healthy"} for name in before}
    if role.kind is Kind.ROUTER:
        service["ports"] = [f"127.0.0.1:{HTTP_PORT}:{HTTP_PORT}"]
    if role.reads_pages_secret:
        service["secrets"] = [{"source": key, "target": f"{KEYS_FOLDER}/{key}"} for key in (PAGES_SECRET, API_KEY)]
    if role.gpus:
        device = {"driver": "nvidia", "count": role.gpus, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def _environment(role: RoleSpec) -> Document:
    """Return the variables; Compose takes the keys from its own environment, or from a file named .env."""
    keys = {"KVIST_API_KEY": API_KEY}
    if role.kind in (Kind.WORKER, Kind.ROUTER):
        keys["KVIST_CLUSTER_KEY"] = CLUSTER_KEY
    return {"HOME": "/tmp", **{name: f"${{{name}:?set it to the {key}}}" for name, key in keys.items()}}


def _mount(deployment: Deployment, volume: Volume, member: str) -> Document:
    if volume.name == "models":
        folder = deployment.container.model_folder
        return {"type": "bind", "source": folder, "target": volume.path, "read_only": True}
    if not _outlives_container(volume):
        return {"type": "tmpfs", "target": volume.path, "tmpfs": {"size": f"{volume.megabytes}m"}}
    return {"type": "volume", "source": f"{member}-{volume.name}", "target": volume.path}
