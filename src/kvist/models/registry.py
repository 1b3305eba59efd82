"""Which families we serve: a plain dict from name to the file that holds the family's facts."""

from __future__ import annotations

import importlib

from kvist.errors import ModelLoadError
from kvist.models.family import Family

FAMILY_MODULES = {
    "llama": "kvist.models.llama",
    "qwen2": "kvist.models.qwen2",
    "qwen3": "kvist.models.qwen3",
}


def family_named(name: str, *, field: str, origin: str) -> Family:
    """The facts of `name`. Raises `ModelLoadError` that names the `field` of the file `origin` it was read from."""
    if name not in FAMILY_MODULES:
        raise ModelLoadError(f"{origin}: {field} is {name!r}; families we serve: {', '.join(sorted(FAMILY_MODULES))}")
    family: Family = importlib.import_module(FAMILY_MODULES[name]).FAMILY
    return family
