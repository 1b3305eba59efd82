"""Rules of RoleBasedGroup that its schemas do not state: names that stand for other parts, and updates that could never
proceed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from kvist.deploy.problem import Problem
from kvist.deploy.workloads import Json, as_dict, as_int, as_list, dicts
from kvist.flags import nearest

_PATTERNS = ("standalonePattern", "leaderWorkerPattern")
_COUNT_OR_SHARE = re.compile(r"\d+%?")


def group_problems(document: Json, groups: Mapping[str, Json]) -> Iterator[Problem]:
    """Yield the broken rules of a RoleBasedGroup, or of the policy of a group. `groups`: the manifest's, by name."""
    spec, name = as_dict(document.get("spec")), str(as_dict(document.get("metadata")).get("name"))
    if document.get("kind") == "CoordinatedPolicy" and name in groups:
        yield from _policies(spec, "policies", _names(as_dict(groups[name].get("spec")).get("roles")))
    elif document.get("kind") == "RoleBasedGroup":
        roles = dicts(spec.get("roles"))
        names, templates = _names(roles), _names(spec.get("roleTemplates"))
        needs = {
            name: list(map(str, as_list(role.get("dependencies")))) for name, role in zip(names, roles, strict=True)
        }
        yield from _policies(spec, "coordination", names)
        for index, (role, name) in enumerate(zip(roles, names, strict=True)):
            path = f"spec.roles.{index}"
            if name in names[:index]:
                yield Problem(f"{path}.name", f"{name} is the name of another role, too", "use another one")
            yield from _template(role, path, templates)
            yield from _rollout(role, f"{path}.rolloutStrategy.rollingUpdate")
            yield from _dependencies(name, f"{path}.dependencies", needs)


def _names(items: object) -> list[str]:
    return [str(item.get("name")) for item in dicts(items)]


def _policies(spec: Json, key: str, roles: Sequence[str]) -> Iterator[Problem]:
    for index, policy in enumerate(dicts(spec.get(key))):
        for number, role in enumerate(as_list(policy.get("roles"))):
            if str(role) not in roles:
                yield _unknown(f"spec.{key}.{index}.roles.{number}", "role", str(role), roles)


def _template(role: Json, path: str, templates: Sequence[str]) -> Iterator[Problem]:
    for pattern in ("", *_PATTERNS):
        holder = as_dict(role.get(pattern)) if pattern else role
        name = as_dict(holder.get("templateRef")).get("name")
        if name is not None and name not in templates:
            field = ".".join(filter(None, (path, pattern, "templateRef.name")))
            yield _unknown(field, "template of spec.roleTemplates", str(name), templates)


def _rollout(role: Json, path: str) -> Iterator[Problem]:
    update = as_dict(as_dict(role.get("rolloutStrategy")).get("rollingUpdate"))
    for key in ("maxSurge", "maxUnavailable", "partition"):
        value = update.get(key)
        if (isinstance(value, int) and value < 0) or (isinstance(value, str) and not _COUNT_OR_SHARE.fullmatch(value)):
            yield Problem(
                f"{path}.{key}", f"{value!r} is not a number of pods", "use 0 or more, or a share such as 50%"
            )
    if update.get("maxUnavailable") in (0, "0", "0%") and update.get("maxSurge", 0) in (0, "0", "0%"):
        yield Problem(
            f"{path}.maxUnavailable", "is 0, as is maxSurge: no pod could be replaced", "set one of them to 1"
        )
    partition, replicas = as_int(update.get("partition"), 0), as_int(role.get("replicas"), 1)
    if 0 < replicas <= partition:
        text = f"{partition} pods of {replicas} keep their version: none would be replaced"
        yield Problem(f"{path}.partition", text, f"use {replicas - 1} or less")


def _dependencies(name: str, path: str, needs: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    """Each dependency is a role, and no role waits for itself, directly or through others."""
    for number, other in enumerate(needs[name]):
        if other not in needs:
            yield _unknown(f"{path}.{number}", "role", other, list(needs))
        elif name in _all_before(other, needs):
            text = f"{name} waits for {other}, and {other} for {name}: neither would start"
            yield Problem(f"{path}.{number}", text, "remove one of the dependencies")


def _all_before(name: str, needs: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the role and all roles that it waits for."""
    found: set[str] = set()
    pending = [name]
    while pending:
        role = pending.pop()
        if role not in found:
            found.add(role)
            pending += needs.get(role, ())
    return found


def _unknown(path: str, what: str, name: str, known: Sequence[str]) -> Problem:
    remedy = nearest(name, known).removeprefix("; ") or (f"use one of {', '.join(known)}" if known else "add it")
    return Problem(path, f"there is no {what} named {name}", remedy)
