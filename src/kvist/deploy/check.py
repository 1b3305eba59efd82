"""Checks a manifest: the schemas of its documents, the options of its containers, and what would hurt in production.

The parser of the options is given by the caller, because it knows all verbs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvist.deploy.cluster_checks import CLUSTER_CHECKS
from kvist.deploy.compose_fields import compose_problems
from kvist.deploy.container_checks import CONTAINER_CHECKS
from kvist.deploy.finding import OF_COMPOSE, Finding, ReadOptions, Running
from kvist.deploy.manifest import Manifest, manifest_text_of, read_manifest
from kvist.deploy.object_checks import OBJECT_CHECKS, host_findings, title_of
from kvist.deploy.problem import Problem
from kvist.deploy.schemas import schema_problems
from kvist.errors import ConfigError
from kvist.wording import amount


def check_manifest(text: str, read_options: ReadOptions) -> list[Finding]:
    """Return what is wrong with the manifest, in its order. Raises `ConfigError` for text that is not a manifest."""
    return check_documents(read_manifest(text), read_options)


def check_documents(manifest: Manifest, read_options: ReadOptions) -> list[Finding]:
    """Return what is wrong with the manifest, in its order."""
    return [*_schema_findings(manifest), *findings_without_schemas(manifest, read_options)]


def refuse_errors(manifest: Manifest, read_options: ReadOptions) -> None:
    """Raise `ConfigError` for a manifest that would not work. Needs no further packages."""
    errors = [one for one in findings_without_schemas(manifest, read_options) if one.is_error]
    if errors:
        more = f" (and {amount(len(errors) - 1, 'further error')})" if errors[1:] else ""
        raise ConfigError(f"the manifest would not work: {errors[0].where}: {errors[0].problem}{more}")


def findings_without_schemas(manifest: Manifest, read_options: ReadOptions) -> list[Finding]:
    """Return what is wrong with the objects and their containers, beside violations of schemas."""
    findings = [finding for check in OBJECT_CHECKS for finding in check(manifest)]
    running = []
    arguments = OF_COMPOSE["args"] if manifest.is_compose else "args"
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
            running.append(Running(workload, container, options, manifest.is_compose))
    if not any(workload.containers for workload in manifest.workloads):
        problem = Problem(arguments, "no container runs Kvist", "let one run kvist serve, router, master or store")
        findings.append(Finding(where="the manifest", problem=problem))
    for one in running:
        for check in CONTAINER_CHECKS:
            findings += check(one)
    for check_all in CLUSTER_CHECKS:
        findings += check_all(running)
    return [*findings, *host_findings(manifest, running)]


def _schema_findings(manifest: Manifest) -> Iterator[Finding]:
    if manifest.is_compose:
        for problem in compose_problems(manifest.documents[0]):
            yield Finding(where="the project", problem=problem)
        return
    for document in manifest.documents:
        for problem in schema_problems(document):
            yield Finding(where=title_of(document), problem=problem)


def run_check(path: Path, read_options: ReadOptions) -> int:
    """Print the findings; return 1 if there are errors, else 0. Raises `ConfigError`."""
    findings = check_manifest(manifest_text_of(path), read_options)
    for finding in findings:
        print(finding)
    errors = sum(finding.is_error for finding in findings)
    print(f"{path}: {amount(errors, 'error')}, {amount(len(findings) - errors, 'warning')}", flush=True)
    return 1 if errors else 0
