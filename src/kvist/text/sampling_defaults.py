"""The recommended sampling parameters of a model: generation_config.json of a folder, `general.sampling.*` of GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvist.checkpoint import Checkpoint, CheckpointKind, read_json
from kvist.errors import ConfigError, ModelLoadError
from kvist.text.config import AUTO_CONFIG, NO_CONFIG


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values for requests that do not set a field. None: the model has no recommendation."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


_GGUF_NAMES = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def load_sampling_defaults(checkpoint: Checkpoint, source: str = AUTO_CONFIG) -> SamplingDefaults:
    """Load the defaults from `source` (`TextConfig.generation_config`). Raises `ConfigError` when `source` is not a
    folder with a generation_config.json, and `ModelLoadError` that names the file and the invalid field."""
    if source == NO_CONFIG:
        return SamplingDefaults()
    if source != AUTO_CONFIG:
        path = Path(source).expanduser() / "generation_config.json"
        if not path.is_file():
            message = f"--generation-config {source}: there is no {path}; use a folder that has one, 'auto' or 'vllm'"
            raise ConfigError(message, param="generation_config")
        return _read(read_json(path), str(path))
    if checkpoint.kind is CheckpointKind.GGUF:
        metadata = checkpoint.gguf_header.metadata
        return _read({name: metadata.get(key) for name, key in _GGUF_NAMES.items()}, str(checkpoint.path))
    path = checkpoint.path / "generation_config.json"
    return _read(read_json(path), str(path)) if path.is_file() else SamplingDefaults()


def _read(values: Mapping[str, object], origin: str) -> SamplingDefaults:
    return SamplingDefaults(
        temperature=_number(values, "temperature", origin, 0.0, 100.0),
        top_p=_number(values, "top_p", origin, 0.0, 1.0),
        top_k=_integer(values, "top_k", origin, -1),
        min_p=_number(values, "min_p", origin, 0.0, 1.0),
        repetition_penalty=_number(values, "repetition_penalty", origin, 0.01, 100.0),
        max_new_tokens=_integer(values, "max_new_tokens", origin, 1),
    )


def _number(values: Mapping[str, object], name: str, origin: str, low: float, high: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ModelLoadError(f"{origin}: {name} must be a number from {low:g} to {high:g}, not {value!r}")
    return float(value)


def _integer(values: Mapping[str, object], name: str, origin: str, least: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ModelLoadError(f"{origin}: {name} must be an integer of at least {least}, not {value!r}")
    return value
