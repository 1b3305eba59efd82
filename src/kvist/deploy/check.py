"""Checks a manifest: the schemas of its documents, the options of its containers, and what would hurt in production.

Each check is a function from the manifest to its findings. The parser of the options is given by the caller, because
it knows all verbs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from kvist.deploy.compose_fields import compose_problems
from kvist.deploy.description import MAX_POD_NAME, STOP_MARGIN_S
from kvist.deploy.group_rules import group_problems
from kvist.deploy.kubernetes_reader import GPU
from kvist.deploy.manifest import Manifest, manifest_text_of, read_manifest
from kvist.deploy.problem import Problem
from kvist.deploy.schemas import schema_problems
from kvist.deploy.workloads import Container, Workload, as_dict, dicts
from kvist.errors import ConfigError
from kvist.nodes.config import STOP_MARGIN_S as STORE_STOP_MARGIN_S
from kvist.wording import amount

ReadOptions = Callable[[str, Sequence[str], Mapping[str, str]], Mapping[str, object]]
"""From (verb, arguments, environment) to the values of the verb's options by key. Raises `ConfigError`."""

_LOOPBACK = ("127.", "localhost", "::1")
_GPUS = f"resources.limits.{GPU}"
_DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_RELEASE = re.compile(r"v?(\d+)\.(\d+)(?:\.\d+)?\b.*")


_OF_COMPOSE = {
    "args": "command",
    "env": "environment",
    "livenessProbe": "healthcheck",
    "metadata.name": "the name of the service",
    "readinessProbe": "healthcheck",
    "resources.limits.memory": "mem_limit",
    "terminationGracePeriodSeconds": "stop_grace_period",
    "volumeMounts": "volumes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """An error keeps the cluster from working or loses data; a warning costs users something."""

    where: str
    problem: Problem
    is_error: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.is_error else 'warning'}: {self.where}: {self.problem}"


@dataclass(frozen=True, slots=True)
class _Running:
    """A container with its options."""

    workload: Workload
    container: Container
    options: Mapping[str, object]
    is_compose: bool

    @property
    def where(self) -> str:
        return self.container.where

    def field(self, name: str) -> str:
        """Return the name of a field of Kubernetes in this kind of manifest."""
        return _OF_COMPOSE.get(name, name) if self.is_compose else name

    def finding(self, field: str, text: str, remedy: str, *, is_error: bool = True) -> Finding:
        """Return a finding about an option, or a field by its name in Kubernetes."""
        return Finding(where=self.where, problem=Problem(self.field(field), text, remedy), is_error=is_error)

    def number(self, key: str) -> float:
        value = self.options.get(key)
        return float(value) if isinstance(value, int | float) else 0.0

    def text(self, key: str) -> str:
        value = self.options.get(key)
        return "" if value is None else str(value)


def check_manifest(text: str, read_options: ReadOptions) -> list[Finding]:
    """Return what is wrong with the manifest, in its order. Raises `ConfigError` for text that is not a manifest."""
    return check_documents(read_manifest(text), read_options)


def check_documents(manifest: Manifest, read_options: ReadOptions) -> list[Finding]:
    """Return what is wrong with the manifest, in its order."""
    return [*_schema_findings(manifest), *_monitor_findings(manifest), *container_findings(manifest, read_options)]


def container_findings(manifest: Manifest, read_options: ReadOptions) -> list[Finding]:
    """Return what is wrong with the containers: their options, and all that would hurt. Needs no further packages."""
    findings = []
    running = []
    arguments = _OF_COMPOSE["args"] if manifest.is_compose else "args"
    for workload in manifest.workloads:
        for container in workload.containers:
            try:
                environ = {name: value for name, value in container.env.items() if name.startswith("KVIST_")}
                options = read_options(container.verb, container.args, environ)
            except ConfigError as error:
                remedy = f"`kvist {container.verb} --help-all` shows what is allowed"
                findings.append(
                    Finding(where=container.where, problem=Problem(arguments, error.message.rstrip(".?"), remedy))
                )
                continue
            running.append(_Running(workload, container, options, manifest.is_compose))
    if not any(workload.containers for workload in manifest.workloads):
        problem = Problem(arguments, "no container runs Kvist", "let one run kvist serve, router, master or store")
        findings.append(Finding(where="the manifest", problem=problem))
    for one in running:
        for check in _CHECKS:
            findings += check(one)
    for check_all in _CHECKS_OF_ALL:
        findings += check_all(running)
    return findings


def _schema_findings(manifest: Manifest) -> Iterator[Finding]:
    if manifest.is_compose:
        for problem in compose_problems(manifest.documents[0]):
            yield Finding(where="the project", problem=problem)
        return
    named = [(as_dict(one.get("metadata")).get("name"), one) for one in manifest.documents]
    groups = {str(name): one for name, one in named if one.get("kind") == "RoleBasedGroup"}
    for name, document in named:
        for problem in (*schema_problems(document), *group_problems(document, groups)):
            yield Finding(where=f"{document.get('kind')} {name}", problem=problem)


def _monitor_findings(manifest: Manifest) -> Iterator[Finding]:
    """A PodMonitor selects pods of the manifest, and reads ports that they have."""
    for document in manifest.documents:
        if document.get("kind") != "PodMonitor":
            continue
        where, spec = f"PodMonitor {as_dict(document.get('metadata')).get('name')}", as_dict(document.get("spec"))
        labels = as_dict(as_dict(spec.get("selector")).get("matchLabels"))
        chosen = [one for one in manifest.workloads if one.containers and labels.items() <= one.labels.items()]
        if not chosen:
            remedy = "use labels that the pods have"
            problem = Problem("spec.selector.matchLabels", "selects no pod of the manifest", remedy)
            yield Finding(where=where, problem=problem)
        names = sorted({name for workload in chosen for one in workload.containers for name in one.ports})
        for index, endpoint in enumerate(dicts(spec.get("podMetricsEndpoints"))):
            if chosen and endpoint.get("port") not in names:
                text = f"no pod has the port {endpoint.get('port')}"
                field = f"spec.podMetricsEndpoints.{index}.port"
                yield Finding(where=where, problem=Problem(field, text, f"use {' or '.join(names)}"))


# ---------------------------------------------------------------- one container


def _grace(one: _Running) -> Iterator[Finding]:
    if one.container.verb in ("serve", "router"):
        needs, why = max(one.number("shutdown_timeout_s"), one.number("drain_grace_s")) + STOP_MARGIN_S, "the drain"
    elif one.container.verb == "store" and one.text("ssd_path"):
        needs, why = one.number("flush_timeout_s") + STORE_STOP_MARGIN_S, "writing its pages to the SSD"
    else:
        return
    if one.workload.grace_s < needs:
        text = f"the container is killed after {one.workload.grace_s:g} s, during {why}"
        yield one.finding("terminationGracePeriodSeconds", text, f"set it to {needs:g} or more")


def _folders(one: _Running) -> Iterator[Finding]:
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


def _volume_at(one: _Running, folder: str) -> str | None:
    path = PurePosixPath(folder)
    mounted = {PurePosixPath(mount): name for mount, name in one.container.mounts.items()}
    return next((mounted[each] for each in (path, *path.parents) if each in mounted), None)


def _memory(one: _Running) -> Iterator[Finding]:
    """The host tier, and the page pool of a store, fit into the memory that the container may use."""
    limit = one.container.memory_mb
    needs_gb = one.number("hicache_size") if one.container.verb == "serve" else one.number("segment_size")
    if limit is not None and 1000 * needs_gb >= limit:
        flag = "--hicache-size" if one.container.verb == "serve" else "--segment-size"
        text = f"{flag} {needs_gb:g} GB does not fit into the memory limit of {limit:g} MB"
        yield one.finding("resources.limits.memory", text, "raise the limit, or lower the size")


def _gpus(one: _Running) -> Iterator[Finding]:
    """The container gets the GPUs on which its worker runs."""
    if one.container.gpus is None:
        return
    text = str(one.container.gpus)
    if not text.isdecimal():
        yield one.finding(_GPUS, f"{text} is not a number of GPUs", "use 0, or a whole number above it")
    elif one.container.verb == "serve" and one.text("device") != "cpu" and int(text) < (tp := int(one.number("tp"))):
        yield one.finding(_GPUS, f"the worker needs {tp} GPUs (--tp {tp}) and gets {text}", f"set it to {tp}")


def _keys(one: _Running) -> Iterator[Finding]:
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


def _probes(one: _Running) -> Iterator[Finding]:
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


def _names(one: _Running) -> Iterator[Finding]:
    name = one.workload.pod_name
    if not one.is_compose and not _DNS.fullmatch(name):
        remedy = "use lower-case letters, digits and '-', also in the name of the role"
        yield one.finding("metadata.name", f"makes the name {name}, which is not valid in DNS", remedy)
    if len(name) > MAX_POD_NAME:
        text = f"makes the name {name} with {len(name)} characters; DNS allows {MAX_POD_NAME}"
        yield one.finding("metadata.name", text, "use a shorter one, or a shorter name of the role")


def _port_numbers(one: _Running) -> Iterator[Finding]:
    for name, port in one.container.ports.items():
        if not 0 < port < 1 << 16:
            yield one.finding("ports", f"{port} of {name} is not a port", "use a number from 1 to 65535")


_CHECKS = (_grace, _folders, _memory, _gpus, _keys, _probes, _names, _port_numbers)


# ---------------------------------------------------------------- all containers


def _replicas(running: list[_Running]) -> Iterator[Finding]:
    stores = sum(one.workload.replicas for one in running if one.container.verb == "store")
    for one in running:
        copies = one.number("hicache_storage_mooncake_replica_num")
        if one.container.verb == "serve" and stores and copies > stores:
            yield one.finding(
                "--hicache-mooncake-replica-num",
                f"the container wants {copies:g} copies of each page, each in a store of its own, from {stores} stores",
                "lower it, or raise the number of stores",
            )


def _releases(running: list[_Running]) -> Iterator[Finding]:
    """Neighbouring releases hand over to each other; others do not."""
    workers = [one for one in running if one.container.verb == "serve"]
    found = {one.where: _release_of(one.container.image) for one in workers}
    known = sorted({release for release in found.values() if release is not None})
    if len(known) > 1 and (known[-1][0] != known[0][0] or known[-1][1] - known[0][1] > 1):
        low, high = (".".join(map(str, release)) for release in (known[0], known[-1]))
        text = f"the workers run releases {low} and {high}, which do not hand over to each other"
        problem = Problem("image", text, "use images that are at most one release apart")
        yield Finding(where="the workers", problem=problem)


def _release_of(image: str) -> tuple[int, int] | None:
    tag = image.rpartition("@")[0] or image
    match = _RELEASE.fullmatch(tag.rpartition("/")[2].partition(":")[2])
    return None if match is None else (int(match[1]), int(match[2]))


def _ports(running: list[_Running]) -> Iterator[Finding]:
    """Containers that share an address do not share a port: those of a pod, and those in the network of the host."""

    def address(one: _Running) -> str:
        return "the host's network" if one.workload.host_network else one.workload.where

    for where, group in groupby(sorted(running, key=address), key=address):
        used: dict[int, str] = {}
        for one in group:
            for key in ("port", "engine_port", "rpc_port"):
                if port := int(one.number(key)):
                    if port in used:
                        flag = f"--{key.replace('_', '-')}"
                        text = f"{one.where} and {used[port]} both use the port {port}"
                        problem = Problem(one.field("args"), text, f"give one of them another {flag}")
                        yield Finding(where=where, problem=problem)
                    used[port] = one.where


def _can_answer(running: list[_Running]) -> Iterator[Finding]:
    """Workers and router in one manifest make a cluster that can answer."""
    roles = {
        one.text("role") or "unified" for one in running if one.container.verb == "serve" and one.workload.replicas
    }
    if roles and "unified" not in roles and not {"prefill", "decode"} <= roles:
        text = f"all have the role {', '.join(roles)}, and no request can be answered"
        problem = Problem("--role", text, "add workers of the role that is missing")
        yield Finding(where="the workers", problem=problem)


_CHECKS_OF_ALL = (_replicas, _releases, _ports, _can_answer)


def run_check(path: Path, read_options: ReadOptions) -> int:
    """Print the findings; return 1 if there are errors, else 0. Raises `ConfigError`."""
    findings = check_manifest(manifest_text_of(path), read_options)
    for finding in findings:
        print(finding)
    errors = sum(finding.is_error for finding in findings)
    print(f"{path}: {amount(errors, 'error')}, {amount(len(findings) - errors, 'warning')}", flush=True)
    return 1 if errors else 0
