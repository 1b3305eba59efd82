"""From a description to the text of its manifest, and the verb `kvist deploy render`."""

from __future__ import annotations

from pathlib import Path

import yaml

from kvist.deploy.check import refuse_errors
from kvist.deploy.compose import compose_document
from kvist.deploy.description import Deployment
from kvist.deploy.finding import ReadOptions
from kvist.deploy.further_options import check_further_options
from kvist.deploy.kubernetes import kubernetes_documents
from kvist.deploy.manifest import manifest_of
from kvist.deploy.pods import Document
from kvist.errors import ConfigError

_WIDTH = 120


class _Dumper(yaml.SafeDumper):
    """Writes each value where it is used: no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        del data
        return True


def documents_of(deployment: Deployment) -> list[Document]:
    """Return the documents of the manifest."""
    if deployment.manifest.format == "compose":
        return [compose_document(deployment)]
    return kubernetes_documents(deployment)


def manifest_text(deployment: Deployment) -> str:
    """Return the manifest as YAML. Equal descriptions give equal texts."""
    text: str = yaml.dump_all(documents_of(deployment), Dumper=_Dumper, sort_keys=False, width=_WIDTH)
    return text


def check_deployment(deployment: Deployment, read_options: ReadOptions) -> None:
    """Raise `ConfigError` for a description whose containers would not start or not work together."""
    manifest = manifest_of(documents_of(deployment))
    check_further_options(deployment.container, manifest, read_options)
    refuse_errors(manifest, read_options)


def run_render(deployment: Deployment, output: Path | None, read_options: ReadOptions) -> int:
    """Write the manifest to a file, or to standard output. Raises `ConfigError` for a manifest that would not work, and
    for a file that cannot be written."""
    check_deployment(deployment, read_options)
    text = manifest_text(deployment)
    if output is None:
        print(text, end="", flush=True)
        return 0
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror}", param="output") from error
    return 0
