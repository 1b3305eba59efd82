"""Reads a manifest: from the text of a user's YAML to its documents, workloads and Services."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from kvist.deploy.compose_reader import workloads_of_project
from kvist.deploy.kubernetes_reader import Service, services_of, workloads_of
from kvist.deploy.workloads import Json, Workload
from kvist.errors import ConfigError

MAX_BYTES = 4 << 20
_MAX_NODES = 200_000  # aliases counted each time: a small text can stand for a huge document
_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    documents: tuple[Json, ...]
    workloads: tuple[Workload, ...]
    services: tuple[Service, ...] = ()
    is_compose: bool = False


def manifest_text_of(path: Path) -> str:
    """Return the text of a user's file. Raises `ConfigError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read: {problem}", param="file") from error


def read_manifest(text: str) -> Manifest:
    """Return the manifest's documents and workloads. Raises `ConfigError` for text that is not a manifest."""
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"the manifest has over {MAX_BYTES >> 20} MiB")
    try:
        loaded = [document for document in yaml.safe_load_all(text) if document is not None]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"the manifest is not YAML: {' '.join(str(error).split())}") from error
    _check_size(loaded)
    return manifest_of(loaded)


def manifest_of(loaded: Sequence[Json]) -> Manifest:
    """Return the manifest of documents. Raises `ConfigError` if one of them is not an object, which YAML allows."""
    if not loaded or not all(isinstance(document, dict) for document in loaded):
        raise ConfigError("the manifest has no objects: each document needs an `apiVersion` and a `kind`")
    if len(loaded) == 1 and "services" in loaded[0] and "kind" not in loaded[0]:
        return Manifest(documents=tuple(loaded), workloads=tuple(workloads_of_project(loaded[0])), is_compose=True)
    return Manifest(
        documents=tuple(loaded),
        workloads=tuple(workload for document in loaded for workload in workloads_of(document)),
        services=tuple(service for document in loaded for service in services_of(document)),
    )


def _check_size(documents: Sequence[object]) -> None:
    """Raise `ConfigError` for documents with too many values, or that contain themselves."""
    pending: list[tuple[object, int]] = [(documents, 0)]
    number = 0
    while pending:
        node, depth = pending.pop()
        number += 1
        if number > _MAX_NODES or depth > _MAX_DEPTH:
            raise ConfigError(f"the manifest has over {_MAX_NODES} values, with its aliases expanded")
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        pending += ((item, depth + 1) for item in inner)
