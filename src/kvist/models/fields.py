"""Typed look-ups in config.json or GGUF metadata; every failure is a `ModelLoadError` that names the field."""

from __future__ import annotations

from collections.abc import Mapping

from kvist.errors import ModelLoadError


class ConfigFields:
    """Read-only view of one JSON-like object. A field set to null counts as absent, as in Hugging Face configs."""

    def __init__(self, values: Mapping[str, object], *, origin: str, prefix: str = "") -> None:
        self._values = values
        self._origin = origin
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def error(self, name: str, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self._origin}: {self._prefix}{name} {problem}")

    def value(self, name: str) -> object:
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"must be an integer of at least {minimum}, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number above zero."""
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(name, f"must be a number above 0, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._given(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._given(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, not {value!r}")
        return value

    def section(self, name: str) -> ConfigFields | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be an object, not {value!r}")
        return ConfigFields(value, origin=self._origin, prefix=f"{self._prefix}{name}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return the ids of a field that is one id, a list of ids, or absent."""
        value = self._values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise self.error(name, f"must be a token id or a list of token ids, not {value!r}")
        return tuple(ids)

    def _given(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is None and default is None:
            raise self.error(name, "is missing")
        return default if value is None else value
