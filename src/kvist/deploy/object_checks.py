"""Checks of the objects of a manifest: their names, and whether objects that name each other fit together. Each check
is a function from the manifest to its findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvist.deploy.finding import Finding, Running
from kvist.deploy.group_rules import group_problems
from kvist.deploy.manifest import Manifest
from kvist.deploy.problem import Problem
from kvist.deploy.workloads import Json, as_dict, dicts
from kvist.flags import nearest


def title_of(document: Json) -> str:
    """Return the kind and the name of an object, for messages."""
    return f"{document.get('kind')} {as_dict(document.get('metadata')).get('name')}"


def _names(manifest: Manifest) -> Iterator[Finding]:
    """Each object has a name, and no two of one kind have the same: the later one would replace the earlier one."""
    seen = set()
    for document in () if manifest.is_compose else manifest.documents:
        metadata = as_dict(document.get("metadata"))
        name, key = metadata.get("name"), (title_of(document), str(metadata.get("namespace")))
        if not name or not isinstance(name, str):
            text = "is missing" if name is None else f"is {name!r}"
            yield Finding(where=title_of(document), problem=Problem("metadata.name", text, "write a text, in quotes"))
        elif key in seen:
            problem = Problem(
                "metadata.name", "is the name of two objects of this kind", "rename or remove one of them"
            )
            yield Finding(where=title_of(document), problem=problem)
        seen.add(key)


def _groups(manifest: Manifest) -> Iterator[Finding]:
    groups = {
        str(as_dict(one.get("metadata")).get("name")): one
        for one in manifest.documents
        if one.get("kind") == "RoleBasedGroup"
    }
    for document in manifest.documents:
        for problem in group_problems(document, groups):
            yield Finding(where=title_of(document), problem=problem)


def _monitors(manifest: Manifest) -> Iterator[Finding]:
    """A PodMonitor selects pods of the manifest, and reads ports that they have."""
    for document in manifest.documents:
        if document.get("kind") != "PodMonitor":
            continue
        where, spec = title_of(document), as_dict(document.get("spec"))
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


def _services(manifest: Manifest) -> Iterator[Finding]:
    """A Service with a selector stands for pods of the manifest."""
    for service in manifest.services:
        if not any(service.selector.items() <= one.labels.items() for one in manifest.workloads):
            problem = Problem("spec.selector", "selects no pod of the manifest", "use labels that the pods have")
            yield Finding(where=f"Service {service.name}", problem=problem, is_error=False)


OBJECT_CHECKS = (_names, _groups, _monitors, _services)


def host_findings(manifest: Manifest, running: Sequence[Running]) -> Iterator[Finding]:
    """A Service that a container looks for exists, if there are any: they may all be in another file."""
    services = [service.name for service in manifest.services]
    for one in running if any(one.get("kind") == "Service" for one in manifest.documents) else ():
        keys = ("hicache_storage_mooncake_master_addr", "hicache_mooncake_master_addr")  # of workers, of stores
        hosts = {("--hicache-mooncake-master-addr", one.text(key).rpartition(":")[0]) for key in keys}
        discovery = one.options.get("discovery")
        for place in discovery if isinstance(discovery, tuple) else ():
            kind, _, rest = str(place).partition(":")
            if kind == "dns":
                hosts.add(("--discovery", rest.partition(":")[0]))
        for flag, host in sorted(hosts):
            name, _, domain = host.partition(".")
            is_inside = host and not name.isdecimal() and (not domain or "svc" in domain.split("."))
            if is_inside and name not in services:
                remedy = nearest(name, services).removeprefix("; ") or "correct the name, or apply the Service, too"
                text = f"{flag} names {host}, and no Service of the manifest has this name"
                yield one.finding("args", text, remedy, is_error=False)
