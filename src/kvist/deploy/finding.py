"""A finding of the check, and a container with its options, which the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvist.deploy.problem import Problem
from kvist.deploy.workloads import Container, Workload

ReadOptions = Callable[[str, Sequence[str], Mapping[str, str]], Mapping[str, object]]
"""From (verb, arguments, environment) to the values of the verb's options by key. Raises `ConfigError`."""

OF_COMPOSE = {
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
class Running:
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
        return OF_COMPOSE.get(name, name) if self.is_compose else name

    def finding(self, field: str, text: str, remedy: str, *, is_error: bool = True) -> Finding:
        """Return a finding about an option, or a field by its name in Kubernetes."""
        return Finding(where=self.where, problem=Problem(self.field(field), text, remedy), is_error=is_error)

    def number(self, key: str) -> float:
        value = self.options.get(key)
        return float(value) if isinstance(value, int | float) else 0.0

    def text(self, key: str) -> str:
        value = self.options.get(key)
        return "" if value is None else str(value)
