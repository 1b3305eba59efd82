"""Doors: each is a dict from the names of the implementations of one interface, its backends, to their rows.

    POLICIES: Door[[], Policy] = {
        "round_robin": backend(RoundRobin, text="each worker in turn"),
        "cache_aware": backend_with(CacheAwareOptions, CacheAware, text="cached prefix and load"),
    }

The dict is the only list of its backends. The flag's choices, `--help`, the tables of the docs and the conformance
suite read it, so a new backend is one file and one row. A row imports its backend's file when it makes the backend. The
options of a backend are a frozen dataclass of `kvist.config.option`s, which is imported with the door. On the command
line they are ordinary flags, shown under the backend's name, and refused while another backend is chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from kvist.config import option

P = ParamSpec("P")
T = TypeVar("T")
O = TypeVar("O")  # noqa: E741 (the options of a backend)
Name = TypeVar("Name", str, str | None)

Given = Mapping[str, str | int | float | bool | tuple[str, ...] | None]  # by field of the backend's options


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """The options of a backend that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend(Generic[P, T]):
    """One row of a door. `make(given, ...)` imports the backend and makes it; options that are not given have their
    defaults. Raises `ConfigError` if the backend cannot run here or if options contradict each other."""

    text: str  # for `--help` and the docs, after the name
    options: type  # a frozen dataclass
    make: Callable[Concatenate[Given, P], T]


Door = Mapping[str, Backend[P, T]]


def backend(make: Callable[P, T], *, text: str) -> Backend[P, T]:
    """Return the row of a backend without options."""

    def make_without(given: Given, /, *args: P.args, **kwargs: P.kwargs) -> T:
        NoOptions(**given)
        return make(*args, **kwargs)

    return Backend(text=text, options=NoOptions, make=make_without)


def backend_with(options: type[O], make: Callable[Concatenate[O, P], T], *, text: str) -> Backend[P, T]:
    """Return the row of a backend with options of its own; `make` gets them first."""

    def make_with(given: Given, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return make(options(**given), *args, **kwargs)

    return Backend(text=text, options=options, make=make_with)


# ---------------------------------------------------------------- as fields of a config


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorOptions:
    """Metadata of a field that holds the given options of a door's chosen backend."""

    door: Mapping[str, Backend[Any, Any]]
    chosen_by: str  # the field of the same config that names the backend
    title: str  # of the door, in headings and errors: "routing policy"
    prefix: str  # of the options' flags and keys
    several: bool = False  # several backends may be chosen

    def rows(self, chosen: object) -> list[Backend[Any, Any]]:
        """Return the rows of the chosen backends: none for None, and for an "auto" that stands for one backend."""
        if self.several:
            return [self.door[name] for name in names_of(self.door, str(chosen))]
        return [row for name, row in self.door.items() if name == chosen]


def choice_of(
    door: Mapping[str, Backend[P, T]],
    default: Name,
    text: str,
    *,
    auto: str = "",
    unset: str = "",
    several: bool = False,
) -> Name:
    """Declare the field that names a door's backend. The help has each backend's own line; `auto` is the line of the
    name "auto", if the config resolves it. With `several` the field may name several, and `names_of` reads it."""
    names = ("auto", *door) if auto else tuple(door)
    lines = [f"auto: {auto}"] if auto else []
    lines += [f"{name}: {row.text}" for name, row in door.items()]
    return option(default, f"{text}. {'; '.join(lines)}", choices=names, unset=unset, several=several)


def names_of(door: Mapping[str, Backend[P, T]], chosen: str) -> tuple[str, ...]:
    """Return the names in a choice of several backends: those between the commas, or for "auto" all."""
    return tuple(door) if chosen == "auto" else tuple(chosen.split(","))


def options_of_choice(
    door: Mapping[str, Backend[P, T]], *, chosen_by: str, title: str, prefix: str = "", several: bool = False
) -> Given:
    """Declare the field that holds the options given to the backend, or to all backends, that the field `chosen_by`
    names."""
    note = DoorOptions(door=door, chosen_by=chosen_by, title=title, prefix=prefix, several=several)
    held: Given = dataclasses.field(default_factory=dict, metadata={"door": note})
    return held
