"""Reads a frozen settings dataclass from flags, environment, a TOML file and defaults, in that order of precedence.

Handles types, limits and nearest names, for any settings class: options.py finds its options and composes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

from kvist.config import OptionHelp
from kvist.config import option as declare
from kvist.errors import ConfigError
from kvist.options import Option, compose, options_of

T = TypeVar("T")

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shorthand:
    """A flag that sets another option: `--decode-only` is `--role decode`. With `value` None the flag takes a value."""

    flag: str
    key: str
    value: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()  # (value of another server, our value)
    text: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    source: str  # as the user wrote it: "--port", "KVIST_PORT", "port in kvist.toml"
    value: object


# ---------------------------------------------------------------- one value


def _allowed(option: Option) -> str:
    if option.choices:
        several = " (or several, with commas)" if option.help.several else ""
        return "one of " + ", ".join(str(choice) for choice in option.choices) + several
    kind = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "text"}
    words = " or ".join([*filter(None, [option.help.unset]), *(kind[item] for item in option.kinds)])
    low, high = option.help.minimum, option.help.maximum
    if low is not None and high is not None:
        words += f" from {low:g} to {high:g}" if max(abs(low), abs(high)) < 1e6 else f" from {low:.0f} to {high:.0f}"
    elif low is not None:
        words += f", at least {low:g}"
    elif high is not None:
        words += f", at most {high:g}"
    return f"{words} ({option.help.unit})" if option.help.unit else words


def _bad_value(option: Option, source: str, value: object) -> ConfigError:
    shown = "this value" if option.help.secret else repr(value)
    near = difflib.get_close_matches(str(value), [str(choice) for choice in option.choices], 1)
    hint = f" Did you mean {near[0]}?" if near and not option.help.secret else ""
    return ConfigError(f"{source}: {shown} is not allowed; it must be {_allowed(option)}.{hint}", param=option.key)


def _read_scalar(option: Option, source: str, raw: object) -> object:
    """Convert one text (flag, environment) or TOML value to the option's type. Raises `ConfigError`."""
    nothing = ("none", "null", option.help.unset)
    if isinstance(raw, str) and raw and raw.lower() in nothing and option.optional and raw not in option.choices:
        return None
    for kind in sorted(option.kinds, key=_reading_order):
        value = _as_kind(kind, raw)
        if value is not None and option.allows(value) and _within(option.help, value):
            return value
    raise _bad_value(option, source, raw)


def _check_secret(option: Option, source: str, raw: object) -> None:
    """Raise `ConfigError` for an empty secret, as from an unset shell variable: it would silently disable the check."""
    if isinstance(raw, str) and not raw.strip():
        raise ConfigError(f"{source} is empty: set a value, or omit it", param=option.key)


def _reading_order(kind: type) -> int:
    kinds = (bool, int, float, Path, str)
    return kinds.index(kind) if kind in kinds else len(kinds)


def _as_kind(kind: type, raw: object) -> object | None:
    if issubclass(kind, enum.Enum):
        return next((member for member in kind if member.value == raw), None)
    if kind is bool:
        if isinstance(raw, str):
            return True if raw.lower() in _TRUE else False if raw.lower() in _FALSE else None
        return raw if isinstance(raw, bool) else None
    if kind in (int, float):
        if isinstance(raw, bool) or not isinstance(raw, str | int | float) or (kind is int and isinstance(raw, float)):
            return None
        try:
            number = kind(raw)
        except ValueError:
            return None
        return cast(object, number) if math.isfinite(number) else None  # every time limit and size is finite
    if not isinstance(raw, str):
        return None
    return Path(raw).expanduser() if kind is Path else raw


def _within(note: OptionHelp, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (note.minimum is None or value >= note.minimum) and (note.maximum is None or value <= note.maximum)


def _read(option: Option, source: str, raw: object) -> object:
    if not option.many:
        if option.help.secret:
            _check_secret(option, source, raw)
        return _read_scalar(option, source, raw)
    items = raw.replace(",", " ").split() if isinstance(raw, str) else raw
    if not isinstance(items, list | tuple):
        raise _bad_value(option, source, raw)
    if option.help.secret:
        for item in items or ("",):
            _check_secret(option, source, item)
    return tuple(_read_scalar(option, source, item) for item in items)


# ---------------------------------------------------------------- the sources


def nearest(name: str, known: Sequence[str]) -> str:
    """Return "; did you mean X?", or "" without a similar name."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def nearest_flag(flag: str, known: Sequence[str]) -> str:
    """As `nearest`, for flags, which often share beginnings and ends: only a typing error is similar enough."""
    matches = difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
    return f"; did you mean {matches[0]}?" if matches else ""


class _Flags:
    """Parser of one argument list. Used for one call of `read_settings`."""

    def __init__(self, options: Sequence[Option], sources: Sources) -> None:
        shorthands = sources.shorthands
        self._positional, self._remedies = sources.positional, sources.remedies
        self._num_words = 0
        self._by_flag = {flag: option for option in options for flag in option.flags}
        self._by_key = {option.key: option for option in options}
        self._short = {item.flag: item for item in shorthands if item.key in self._by_key}
        self._negated = {
            "--no-" + flag[2:]: option
            for flag, option in self._by_flag.items()
            if option.is_switch and flag[:2] == "--"
        }
        self.given: dict[str, _Given] = {}

    def read(self, argv: Sequence[str]) -> dict[str, _Given]:
        left = list(argv)
        while left:
            word = left.pop(0)
            if not word.startswith("-"):
                self._word(word)
                continue
            flag, equals, inline = word.partition("=")
            self._one(flag, inline if equals else None, left)
        return self.given

    def _word(self, word: str) -> None:
        """Read a value without a flag."""
        if self._num_words == len(self._positional):
            known = "".join(f", and {name} is given already" for name in self._positional[-1:])
            raise ConfigError(f"unexpected argument {word!r}: options start with --{known}")
        option = self._by_key[self._positional[self._num_words]]
        self._num_words += 1
        self._set(option, f"the argument {word!r}", _read(option, option.flags[0], word))

    def _one(self, flag: str, inline: str | None, left: list[str]) -> None:
        if flag in self._negated and flag not in self._by_flag:
            self._set(self._negated[flag], flag, False)
        elif flag in self._short:
            self._shorthand(self._short[flag], inline, left)
        elif flag in self._by_flag:
            option = self._by_flag[flag]
            if option.is_switch:
                self._set(option, flag, True if inline is None else _read(option, flag, inline))
            elif option.many:
                items = [inline] if inline is not None else _take_values(left)
                if not items:
                    raise ConfigError(f"{flag} needs at least one value: {_allowed(option)}", param=option.key)
                before = self.given.get(option.key)
                earlier = cast(tuple[object, ...], before.value) if before else ()
                more = tuple(value for item in items for value in cast(tuple[object, ...], _read(option, flag, item)))
                self.given[option.key] = _Given(source=flag, value=earlier + more)
            else:
                self._set(option, flag, _read(option, flag, _value_after(flag, inline, left, option)))
        else:
            remedy = self._remedies.get(flag)
            hint = f"; {remedy}" if remedy else nearest_flag(flag, [*self._by_flag, *self._short])
            raise ConfigError(f"unknown flag {flag}{hint}", param=flag.lstrip("-"))

    def _shorthand(self, short: Shorthand, inline: str | None, left: list[str]) -> None:
        option = self._by_key[short.key]
        if short.value is not None:
            if inline is not None:
                raise ConfigError(f"{short.flag} takes no value", param=short.key)
            value = _read(option, short.flag, short.value)
        else:
            text = _value_after(short.flag, inline, left, option)
            value = _read(option, short.flag, dict(short.renamed).get(text, text))
        self._set(option, short.flag, value)

    def _set(self, option: Option, flag: str, value: object) -> None:
        before = self.given.get(option.key)
        if before is not None and before.source != flag and before.value != value:
            raise ConfigError(f"{before.source} and {flag} contradict each other: give one of them", param=option.key)
        self.given[option.key] = _Given(source=flag, value=value)


def _take_values(left: list[str]) -> list[str]:
    items = []
    while left and not left[0].startswith("--"):
        items.append(left.pop(0))
    return items


def _value_after(flag: str, inline: str | None, left: list[str], option: Option) -> str:
    if inline is not None:
        return inline
    if not left or (left[0].startswith("--")):
        raise ConfigError(f"{flag} needs a value: {_allowed(option)}", param=option.key)
    return left.pop(0)


def _from_environment(options: Sequence[Option], environ: Mapping[str, str]) -> dict[str, _Given]:
    return {
        option.key: _Given(source=option.env, value=_read(option, option.env, environ[option.env]))
        for option in options
        if option.env in environ
    }


def _from_file(options: Sequence[Option], path: Path, also_known: Sequence[str]) -> dict[str, _Given]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}", param="config") from error
    by_key = {option.key: option for option in options}
    given = {}
    for written, raw in table.items():
        key = written.replace("-", "_")
        if key in by_key:
            source = f"{written} in {path}"
            given[key] = _Given(source=source, value=_read(by_key[key], source, raw))
        elif key not in also_known:
            raise ConfigError(f"unknown key {written} in {path}{nearest(key, list(by_key))}", param=written)
    return given


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileConfig:
    config: Path | None = declare(None, "TOML file with options, one `name = value` per line")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Sources of settings; tests pass their own."""

    argv: Sequence[str]
    environ: Mapping[str, str]
    shorthands: Sequence[Shorthand] = ()
    other_keys: Sequence[str] = ()  # options of other verbs: one TOML file may serve all verbs
    positional: Sequence[str] = ()  # options set by words without a flag, in this order
    remedies: Mapping[str, str] = dataclasses.field(default_factory=dict)  # flag of another server → what to do instead
    # (key, value) → values by key that this value implies, where they are not given
    implied: Mapping[tuple[str, object], Mapping[str, object]] = dataclasses.field(default_factory=dict)


def read_settings(settings_class: type[T], sources: Sources) -> T:
    """Compose `settings_class`. Raises `ConfigError` naming the flag, variable or key, the value, and allowed
    values."""
    options = options_of(settings_class)
    flags = _Flags(options, sources).read(sources.argv)
    environment = _from_environment(options, sources.environ)
    given = {**environment, **flags}
    config = given.get("config")  # option with the path of the TOML file
    if config is not None and config.value is not None:
        given = {**_from_file(options, cast(Path, config.value), sources.other_keys), **given}
    for (key, value), others in sources.implied.items():
        if key in given and given[key].value == value:
            given = {**{other: _Given(source=given[key].source, value=each) for other, each in others.items()}, **given}
    _check_backends(options, given)
    return compose(settings_class, {key: item.value for key, item in given.items()})


def _check_backends(options: Sequence[Option], given: Mapping[str, _Given]) -> None:
    """Raise `ConfigError` for an option that belongs to another backend than the chosen one."""
    by_key = {option.key: option for option in options}
    for option in options:
        owners = option.owners
        if owners is None or option.key not in given:
            continue
        choice = by_key[owners.chosen_by]
        chosen = given[choice.key].value if choice.key in given else choice.default
        names = set(str(chosen).split(",")) if choice.help.several else {chosen}
        if not names & {*owners.names} and not (choice.help.several and chosen == "auto"):
            now = "none is chosen" if chosen is None else f"{choice.flags[0]} is {chosen}"
            raise ConfigError(
                f"{given[option.key].source} is an option of the {owners.title} {' and '.join(owners.names)}, and "
                f"{now}: add {choice.flags[0]} {owners.names[0]}, or omit the option",
                param=option.key,
            )
