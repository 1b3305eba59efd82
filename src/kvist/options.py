"""The options of a settings class: its fields, those of its groups, and those of the backends that it can choose.

Owns the mapping between the three names of an option: field `page_size`, flag `--page-size`, variable
`KVIST_PAGE_SIZE` (the TOML key is the field's name), and the way between nested settings and flat values by key. A
field declared with `kvist.config.option` is an option; a field that is itself a dataclass is a group; a field declared
with `kvist.door.options_of_choice` holds the options of a chosen backend. Two groups that declare the same field share
one flag. Values are read from text in flags.py.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from kvist.config import OptionHelp
from kvist.door import DoorOptions
from kvist.errors import ConfigError

T = TypeVar("T")

ENV_PREFIX = "KVIST_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """The backends that an option belongs to."""

    chosen_by: str  # key of the option that names the backend
    title: str  # of the door
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    key: str  # the dataclass field; with the door's prefix for the option of a backend
    flags: tuple[str, ...]  # the first is printed in messages
    help: OptionHelp
    kinds: tuple[type, ...]  # allowed types: bool, int, float, Path, str, an enum with `choices`
    choices: tuple[object, ...]
    many: bool  # a tuple: repeatable, separated by spaces
    optional: bool  # may be None
    default: object
    group: str
    owners: Owners | None = None  # None: no backend's option

    def allows(self, value: object) -> bool:
        """Return whether the choices allow the value."""
        if not self.choices or value in self.choices:
            return True
        names = value.split(",") if self.help.several and isinstance(value, str) else []
        return bool(names) and len(names) == len(set(names)) and set(names) <= {*self.choices} - {"auto"}

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.key.upper()

    @property
    def is_switch(self) -> bool:
        return self.kinds == (bool,)


def group(config_class: type[T]) -> T:
    """Declare a field that holds a group of options: every option of the group is an option of the verb."""
    held: T = dataclasses.field(default_factory=config_class)
    return held


def options_of(settings_class: type) -> list[Option]:
    """Return every option of a settings dataclass and its groups, in field order, one per key."""
    found: dict[str, Option] = {}
    _collect(settings_class, "general", found)
    return list(found.values())


def _collect(settings_class: type, name: str, found: dict[str, Option]) -> None:
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        hint = hints[field.name]
        note, door = field.metadata.get("option"), field.metadata.get("door")
        if isinstance(note, OptionHelp):
            option = _option(field, hint, note, name)
            first = found.setdefault(field.name, option)
            assert first.kinds == option.kinds, f"two groups disagree about {field.name}"
        elif isinstance(door, DoorOptions):
            _collect_of_backends(door, found)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            _collect(hint, field.name, found)


def _collect_of_backends(door: DoorOptions, found: dict[str, Option]) -> None:
    for name, row in door.door.items():
        hints = typing.get_type_hints(row.options)
        for field in dataclasses.fields(row.options):
            option = _option(field, hints[field.name], field.metadata["option"], "", door.prefix)
            assert Path not in option.kinds, f"{option.key}: the options of a backend are sent as JSON; declare a str"
            first = found.get(option.key, option)
            names = (*(first.owners.names if first.owners else ()), name)
            owners = Owners(chosen_by=door.chosen_by, title=door.title, names=names)
            assert (first.kinds, first.default) == (option.kinds, option.default), f"{option.key} differs by backend"
            group = f"{door.title} {', '.join(names)}"
            found[option.key] = dataclasses.replace(first, owners=owners, group=group)


def _option(field: dataclasses.Field[object], hint: object, note: OptionHelp, group: str, prefix: str = "") -> Option:
    kinds: list[type] = []
    many = optional = False
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for member in members:
        if member is type(None):
            optional = True
            continue
        if typing.get_origin(member) is tuple:
            many, member = True, typing.get_args(member)[0]
        is_enum = isinstance(member, type) and issubclass(member, enum.Enum)
        assert is_enum or member in (bool, int, float, str, Path), (
            f"{field.name}: flags.py cannot read a {member} from text"
        )
        kinds.append(member)
    key = prefix + field.name
    spellings = [note.flag or "--" + key.replace("_", "-"), *note.aliases]
    return Option(
        key=key,
        flags=tuple(name if name.startswith("-") else f"--{name}" for name in spellings),
        help=note,
        kinds=tuple(dict.fromkeys(kinds)),
        choices=note.choices,
        many=many,
        optional=optional,
        default=field.default,
        group=group,
    )


# ---------------------------------------------------------------- between nested settings and flat values


def compose(settings_class: type[T], values: Mapping[str, object]) -> T:
    """Make the settings from values by key; options without a value have their defaults. Raises `ConfigError`."""
    hints = typing.get_type_hints(settings_class)
    fields = dataclasses.fields(settings_class)  # type: ignore[arg-type]
    arguments: dict[str, object] = {}
    for field in fields:
        hint, door = hints[field.name], field.metadata.get("door")
        if isinstance(field.metadata.get("option"), OptionHelp):
            if field.name in values:
                arguments[field.name] = values[field.name]
        elif isinstance(door, DoorOptions):
            default = next(other.default for other in fields if other.name == door.chosen_by)
            arguments[field.name] = _given_to_backend(door, values.get(door.chosen_by, default), values)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            arguments[field.name] = compose(hint, values)
    try:
        return settings_class(**arguments)
    except ValueError as error:  # a check in a config's __post_init__
        raise ConfigError(str(error)) from error


def _given_to_backend(door: DoorOptions, chosen: object, values: Mapping[str, object]) -> Mapping[str, object]:
    """Return the values of the chosen backends' options. Raises `ConfigError` if they contradict each other."""
    given: dict[str, object] = {}
    for row in door.rows(chosen):
        names = [field.name for field in dataclasses.fields(row.options) if door.prefix + field.name in values]
        given_here = {name: values[door.prefix + name] for name in names}
        try:
            row.options(**given_here)
        except ConfigError as error:  # a backend does not know its door's prefix
            param = None if error.param is None else door.prefix + error.param.removeprefix(door.prefix)
            raise ConfigError(error.message, param=param) from error
        given |= given_here
    return given


def given_values(settings: object) -> dict[str, object]:
    """Return key → value of every option of a settings object and its groups, and of the options given to backends."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value, door = getattr(settings, field.name), field.metadata.get("door")
        if isinstance(field.metadata.get("option"), OptionHelp):
            values.setdefault(field.name, value)
        elif isinstance(door, DoorOptions):
            values.update({door.prefix + name: item for name, item in value.items()})
        elif dataclasses.is_dataclass(value):
            for key, inner in given_values(value).items():
                values.setdefault(key, inner)
    return values


def to_argv(groups: Sequence[object], target_class: type) -> tuple[list[str], dict[str, str]]:
    """Return flags that give `target_class` the values of these groups; and environment variables for secrets, since
    other users can read the command line.

    Includes only options that the target has, with another value than its default.
    """
    values: dict[str, object] = {}
    for each in groups:
        values |= given_values(each)
    argv: list[str] = []
    environ: dict[str, str] = {}
    for option in options_of(target_class):
        value = values.get(option.key, option.default)
        if value == option.default or value is None:
            continue
        if option.help.secret:
            environ[option.env] = " ".join(value) if isinstance(value, tuple) else str(value)
        elif option.is_switch:
            argv.append(option.flags[0] if value else "--no-" + option.flags[0][2:])
        elif option.many:
            argv += [option.flags[0], *(str(item) for item in cast(tuple[object, ...], value))]
        else:
            argv.append(f"{option.flags[0]}={value!s}")
    return argv, environ
