"""Checks of one container: what would lose data, keep its pods from working, or hurt its users. Each check is a
function from the container to its findings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from kvist.deploy.description import MAX_POD_NAME, STOP_MARGIN_S
from kvist.deploy.finding import Finding, Running
from kvist.deploy.kubernetes_reader import GPU, megabytes
from kvist.deploy.workloads import as_dict
from kvist.nodes.config import STOP_MARGIN_S as STORE_STOP_MARGIN_S

_LOOPBACK = ("127.", "localhost", "::1")
_GPUS = f"resources.limits.{GPU}"
_DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def _grace(one: Running) -> Iterator[Finding]:
    if one.container.verb in ("serve", "router"):
        needs, why = max(one.number("shutdown_timeout_s"), one.number("drain_grace_s")) + STOP_MARGIN_S, "the drain"
    elif one.container.verb == "store" and one.text("ssd_path"):
        needs, why = one.number("flush_timeout_s") + STORE_STOP_MARGIN_S, "writing its pages to the SSD"
    else:
        return
    if one.workload.grace_s < needs:
        text = f"the container is killed after {one.workload.grace_s:g} s, during {why}"
        yield one.finding("terminationGracePeriodSeconds", text, f"set it to {needs:g} or more")


def _pre_stop(one: Running) -> Iterator[Finding]:
    command = one.container.pre_stop
    if command[:1] == ("kvist",) and command[1:2] != ("drain",):
        text = f"`{' '.join(command)}` does not drain the server"
        yield one.finding("lifecycle.preStop", text, f"use kvist drain http://127.0.0.1:{int(one.number('port'))}")


def _folders(one: Running) -> Iterator[Finding]:
    """Pages that a restart of the container must find again are in a volume."""
    for key, flag, what in (
        ("hicache_persist", "--hicache-persist", "the host tier"),
        ("ssd_path", "--ssd-path", "the store's pages"),
    ):
        if (folder := one.text(key)) and _volume_at(one, folder) is None:
            yield one.finding(
                "volumeMounts",
                f"{flag} {folder} is in no volume, and {what} would be lost at each restart of the container",
                f"mount {'a volume' if one.is_compose else 'an emptyDir'} at {folder}",
            )
    if (
        one.container.verb == "serve"
        and one.options.get("enable_hierarchical_cache")
        and not one.text("hicache_persist")
    ):
        yield one.finding(
            "args",
            "a host tier without --hicache-persist: an upgrade in place would lose it",
            "add --hicache-persist and its volume",
            is_error=False,
        )


def _mounts(one: Running) -> Iterator[Finding]:
    """Each mounted volume exists, and has room for what the container keeps in it."""
    for name in sorted(set(one.container.mounts.values()) - one.workload.volumes.keys()):
        yield one.finding("volumeMounts", f"the pod has no volume named {name}", "add it to the volumes of the pod")
    for folder_key, size_key in (("hicache_persist", "hicache_size"), ("ssd_path", "ssd_size")):
        volume = one.workload.volumes.get((one.text(folder_key) and _volume_at(one, one.text(folder_key))) or "", {})
        limit, needs_gb = megabytes(as_dict(volume.get("emptyDir")).get("sizeLimit")), one.number(size_key)
        if limit is not None and 1000 * needs_gb > limit:
            flag = f"--{size_key.replace('_', '-')}"
            text = f"the volume {volume.get('name')} has room for {limit:g} MB, and {flag} is {needs_gb:g} GB"
            yield one.finding("volumes", f"{text}: the pod would be evicted", "raise sizeLimit, or lower the size")


def _shared_memory(one: Running) -> Iterator[Finding]:
    """On a CPU, the pages of a worker are in shared memory, of which a container has 64 MB."""
    on_cpu = one.container.verb == "serve" and one.text("device") != "cuda" and not one.container.gpus
    if on_cpu and not one.is_compose and _volume_at(one, "/dev/shm") is None:
        text = "no volume is mounted at /dev/shm, and 64 MB of shared memory are too few for the pages of a CPU"
        yield one.finding("volumeMounts", text, "mount an emptyDir with `medium: Memory` there")


def _image(one: Running) -> Iterator[Finding]:
    if not one.container.image.strip():
        yield one.finding("image", "is missing", "name an image that has Kvist")


def _volume_at(one: Running, folder: str) -> str | None:
    path = PurePosixPath(folder)
    mounted = {PurePosixPath(mount): name for mount, name in one.container.mounts.items()}
    return next((mounted[each] for each in (path, *path.parents) if each in mounted), None)


def _memory(one: Running) -> Iterator[Finding]:
    """The host tier, and the page pool of a store, fit into the memory that the container may use."""
    limit = one.container.memory_mb
    needs_gb = one.number("hicache_size") if one.container.verb == "serve" else one.number("segment_size")
    if limit is not None and 1000 * needs_gb >= limit:
        flag = "--hicache-size" if one.container.verb == "serve" else "--segment-size"
        text = f"{flag} {needs_gb:g} GB does not fit into the memory limit of {limit:g} MB"
        yield one.finding("resources.limits.memory", text, "raise the limit, or lower the size")


def _gpus(one: Running) -> Iterator[Finding]:
    """The container gets the GPUs on which its worker runs."""
    if one.container.gpus is None:
        return
    text = str(one.container.gpus)
    if not text.isdecimal():
        yield one.finding(_GPUS, f"{text} is not a number of GPUs", "use 0, or a whole number above it")
    elif one.container.verb == "serve" and one.text("device") != "cpu" and int(text) < (tp := int(one.number("tp"))):
        yield one.finding(_GPUS, f"the worker needs {tp} GPUs (--tp {tp}) and gets {text}", f"set it to {tp}")


def _keys(one: Running) -> Iterator[Finding]:
    if _is_loopback(one.text("host")):
        return
    if not one.options.get("api_key"):
        text = f"the container listens on {one.text('host')} without an API key"
        yield one.finding("env", text, "set KVIST_API_KEY from a Secret")
    needs_key = one.container.verb == "router" or (
        one.container.verb == "serve" and not _is_loopback(one.text("engine_host"))
    )
    if needs_key and not (one.text("cluster_key") or one.text("cluster_key_file")):
        text = "the container has no cluster key, and cannot talk to the other pods"
        yield one.finding("env", text, "set KVIST_CLUSTER_KEY from a Secret")


def _is_loopback(host: str) -> bool:
    return host.startswith(_LOOPBACK) or not host


def _probes(one: Running) -> Iterator[Finding]:
    probes = one.container.probes
    if "readinessProbe" not in probes:
        text = "is missing: the container gets requests before it can answer"
        yield one.finding("readinessProbe", text, "probe /ready", is_error=False)
    if probes.get("livenessProbe") == "/ready":
        text = "/ready would kill the container while it loads or drains"
        yield one.finding("livenessProbe", text, "probe /health")
    for name, port in one.container.probe_ports.items():
        if port != (own := int(one.number("port"))):
            text = f"asks the port {port}, and the container listens on {own} (--port)"
            yield one.finding(f"{name}.httpGet.port", text, f"use {own}, or the name of that port in `ports`")


def _names(one: Running) -> Iterator[Finding]:
    name = one.workload.pod_name
    if not one.is_compose and not name.startswith("-") and not _DNS.fullmatch(name):
        remedy = "use lower-case letters, digits and '-', also in the name of the role"
        yield one.finding("metadata.name", f"makes the name {name}, which is not valid in DNS", remedy)
    if len(name) > MAX_POD_NAME:
        text = f"makes the name {name} with {len(name)} characters; DNS allows {MAX_POD_NAME}"
        yield one.finding("metadata.name", text, "use a shorter one, or a shorter name of the role")


def _port_numbers(one: Running) -> Iterator[Finding]:
    for name, port in one.container.ports.items():
        if not 0 < port < 1 << 16:
            yield one.finding("ports", f"{port} of {name} is not a port", "use a number from 1 to 65535")


CONTAINER_CHECKS = (
    *(_image, _names, _port_numbers, _probes, _keys),
    *(_grace, _pre_stop, _folders, _mounts, _shared_memory, _memory, _gpus),
)
