"""The options of `kvist deploy run`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from kvist.config import option
from kvist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRunOptions:
    """Raises `ConfigError`."""

    file: Path | None = option(None, "manifest to run", unset="none: it has to be given")
    api_key: str | None = option(None, "API key of the cluster", secret=True, unset="a random one")
    claims: tuple[str, ...] = option((), "folders that stand for PersistentVolumeClaims: --claims models=/srv/models")
    images: tuple[str, ...] = option(
        (),
        "the Python of each image, in whose environment that release of Kvist is installed: "
        "--images kvist:1.2=/opt/kvist-1.2/bin/python; without it, this one",
    )
    start_timeout_s: float = option(300.0, "maximum time until all pods are ready", unit="s", minimum=1)

    def __post_init__(self) -> None:
        _ = self.claim_folders, self.python_of_image

    @property
    def claim_folders(self) -> dict[str, Path]:
        return {name: Path(folder) for name, folder in _pairs(self.claims, "claims", "NAME=FOLDER").items()}

    @property
    def python_of_image(self) -> dict[str, str]:
        pythons = _pairs(self.images, "images", "IMAGE=PYTHON")
        for image, python in pythons.items():
            if shutil.which(python) is None:
                raise ConfigError(f"--images {image}={python}: {python} is not a program", param="images")
        return pythons


def _pairs(texts: tuple[str, ...], key: str, form: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not (equals and name and value):
            raise ConfigError(f"--{key} {text} is not {form}", param=key)
        pairs[name] = value
    return pairs
