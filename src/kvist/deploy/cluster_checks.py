"""Checks of all containers together: whether they make a cluster that can answer. Each check is a function from the
containers to its findings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from kvist.deploy.finding import Finding, Running
from kvist.deploy.problem import Problem

_RELEASE = re.compile(r"v?(\d+)\.(\d+)(?:\.\d+)?\b.*")


def _replicas(running: list[Running]) -> Iterator[Finding]:
    stores = sum(one.workload.replicas for one in running if one.container.verb == "store")
    for one in running:
        copies = one.number("hicache_storage_mooncake_replica_num")
        if one.container.verb == "serve" and stores and copies > stores:
            yield one.finding(
                "--hicache-mooncake-replica-num",
                f"the container wants {copies:g} copies of each page, each in a store of its own, from {stores} stores",
                "lower it, or raise the number of stores",
            )


def _releases(running: list[Running]) -> Iterator[Finding]:
    """Neighbouring releases hand over to each other; others do not."""
    workers = [one for one in running if one.container.verb == "serve"]
    found = {one.where: _release_of(one.container.image) for one in workers}
    known = sorted({release for release in found.values() if release is not None})
    if len(known) > 1 and (known[-1][0] != known[0][0] or known[-1][1] - known[0][1] > 1):
        low, high = (".".join(map(str, release)) for release in (known[0], known[-1]))
        text = f"the workers run releases {low} and {high}, which do not hand over to each other"
        problem = Problem("image", text, "use images that are at most one release apart")
        yield Finding(where="the workers", problem=problem)


def _page_sizes(running: list[Running]) -> Iterator[Finding]:
    sizes = sorted({int(one.number("page_size")) for one in running if one.container.verb == "serve"})
    if len(sizes) > 1:
        text = f"the workers have pages of {' and '.join(map(str, sizes))} tokens, and do not hand over to each other"
        yield Finding(where="the workers", problem=Problem("--page-size", text, "use one size for all"))


def _container_names(running: list[Running]) -> Iterator[Finding]:
    seen = set()
    for one in running:
        if one.where in seen:
            yield one.finding("name", "is the name of another container of the pod, too", "use another one")
        seen.add(one.where)


def _release_of(image: str) -> tuple[int, int] | None:
    tag = image.rpartition("@")[0] or image
    match = _RELEASE.fullmatch(tag.rpartition("/")[2].partition(":")[2])
    return None if match is None else (int(match[1]), int(match[2]))


def _ports(running: list[Running]) -> Iterator[Finding]:
    """Containers that share an address do not share a port: those of a pod, and those in the network of the host."""

    def address(one: Running) -> str:
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


def _can_answer(running: list[Running]) -> Iterator[Finding]:
    """Workers and router in one manifest make a cluster that can answer."""
    roles = {
        one.text("role") or "unified" for one in running if one.container.verb == "serve" and one.workload.replicas
    }
    if roles and "unified" not in roles and not {"prefill", "decode"} <= roles:
        text = f"all have the role {', '.join(roles)}, and no request can be answered"
        problem = Problem("--role", text, "add workers of the role that is missing")
        yield Finding(where="the workers", problem=problem)


CLUSTER_CHECKS = (_container_names, _replicas, _releases, _page_sizes, _ports, _can_answer)
