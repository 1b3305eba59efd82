"""Chooses the files of a repository that Kvist reads. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from kvist.checkpoint import INDEX_FILE, SINGLE_FILE
from kvist.errors import ModelLoadError
from kvist.hub.name import HubName

CONFIG_FILE = "config.json"
SMALL_FILES = (  # everything but the weights; a repository need not have all
    CONFIG_FILE,
    INDEX_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_MAX_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The files to download. `gguf`: the model is this one file; None: it is the folder."""

    files: frozenset[str]
    gguf: str | None = None


def choose_files(name: HubName, held: Collection[str], indexed: Collection[str], *, weights: bool) -> Chosen:
    """Return the files to download from a repository that holds the files `held`, `indexed` being the weight files that
    its index lists, if it has one. Raises `ModelLoadError` for a repository that Kvist cannot serve."""
    ggufs = sorted(path for path in held if path.endswith(".gguf"))
    if name.file is not None:
        if name.file not in held:
            raise ModelLoadError(f"{name.repo} has no file {name.file}; {_listed(name, ggufs)}", param="model_path")
        return Chosen(files=frozenset({name.file}), gguf=name.file)
    files = {path for path in SMALL_FILES if path in held}
    of_weights = set(indexed) if INDEX_FILE in held else {SINGLE_FILE}
    if CONFIG_FILE in held and (missing := of_weights - set(held)) == set():
        return Chosen(files=frozenset(files | of_weights if weights else files))
    if len(ggufs) == 1:
        return Chosen(files=frozenset(ggufs), gguf=ggufs[0])
    if ggufs:
        raise ModelLoadError(f"{name} has several GGUF files: {_listed(name, ggufs)}", param="model_path")
    if CONFIG_FILE in held and INDEX_FILE in held:
        raise ModelLoadError(f"{name}: {INDEX_FILE} lists {min(missing)}, which is missing", param="model_path")
    raise ModelLoadError(
        f"{name} has no model that Kvist can read: neither {CONFIG_FILE} with {SINGLE_FILE} or {INDEX_FILE}, nor a "
        "GGUF file. Pickled weights (.bin, .pt) are not read",
        param="model_path",
    )


def missing_bytes(sizes: Mapping[str, int], chosen: Chosen, present: Collection[str]) -> int:
    """Return how much is left to download."""
    return sum(sizes[path] for path in chosen.files if path not in present)


def _listed(name: HubName, ggufs: list[str]) -> str:
    if not ggufs:
        return "it has no GGUF files"
    more = f" and {len(ggufs) - _MAX_SHOWN} more" if len(ggufs) > _MAX_SHOWN else ""
    return f"name one of {', '.join(ggufs[:_MAX_SHOWN])}{more}, as in --model-path {name.repo}/{ggufs[0]}"
