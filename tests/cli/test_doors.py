"""A door's dict is the only list of its backends: flags, values and help come from its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from kvist.config import option
from kvist.door import Door, Given, backend, backend_with, choice_of, names_of, options_of_choice
from kvist.errors import ConfigError
from kvist.flag_help import HelpPage, help_text
from kvist.flags import Sources, read_settings
from kvist.options import given_values, options_of, to_argv


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    path: str | None = option(None, "folder of the pages")
    size: float = option(64.0, "size of the store", unit="GB", minimum=0.1)

    def __post_init__(self) -> None:
        if self.path == "":
            raise ConfigError("the path is empty: name a folder", param="path")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    size: float = option(64.0, "size of the store", unit="GB", minimum=0.1)


DOOR: Door[[int], str] = {
    "file": backend_with(FileOptions, lambda options, pages: f"file {options} {pages}", text="a folder on a disk"),
    "memory": backend_with(MemoryOptions, lambda options, pages: f"memory {options} {pages}", text="for tests"),
    "null": backend(lambda pages: f"null {pages}", text="stores nothing"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    store: str | None = choice_of(DOOR, None, "where pages are kept", unset="none")
    store_options: Given = options_of_choice(DOOR, chosen_by="store", title="store", prefix="store_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    config: Path | None = option(None, "TOML file")
    storage: StoreConfig = field(default_factory=StoreConfig)


def read(*argv: str, environ: dict[str, str] | None = None) -> StoreConfig:
    return read_settings(Settings, Sources(argv=argv, environ=environ or {})).storage


def test_the_options_of_the_chosen_backend_are_read_as_flags_with_the_doors_prefix() -> None:
    config = read("--store", "file", "--store-path", "/pages", environ={"KVIST_STORE_SIZE": "2"})
    assert config == StoreConfig(store="file", store_options={"path": "/pages", "size": 2.0})
    assert DOOR["file"].make(config.store_options, 7) == f"file {FileOptions(path='/pages', size=2.0)} 7"


def test_given_options_travel_as_json() -> None:
    config = read("--store", "file", "--store-path", "/pages", "--store-size", "2")
    assert msgspec.json.decode(msgspec.json.encode(config), type=StoreConfig) == config


def test_options_that_are_not_given_have_the_backends_defaults() -> None:
    config = read("--store", "memory")
    assert config.store_options == {}
    assert DOOR["memory"].make(config.store_options, 1) == f"memory {MemoryOptions()} 1"
    assert DOOR["null"].make({}, 3) == "null 3"


def test_a_backend_without_options_refuses_options() -> None:
    with pytest.raises(TypeError):
        DOOR["null"].make({"size": 1.0}, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--store", "memory", "--store-path", "/pages"),
            "--store-path is an option of the store file, and --store is memory: add --store file, or omit the option",
        ),
        (
            ("--store-size", "2"),
            "--store-size is an option of the store file and memory, and none is chosen: add --store file, or omit the "
            "option",
        ),
    ],
)
def test_an_option_of_a_backend_that_is_not_chosen_is_refused(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    assert caught.value.message == message


def test_the_source_of_a_refused_option_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kvist.toml"
    file.write_text('store_path = "/pages"\n')
    with pytest.raises(ConfigError, match=r"store_path in .*kvist.toml is an option of the store file"):
        read("--config", str(file))
    with pytest.raises(ConfigError, match="KVIST_STORE_PATH is an option of the store file"):
        read(environ={"KVIST_STORE_PATH": "/pages"})


def test_a_backends_own_check_runs_when_the_settings_are_read() -> None:
    with pytest.raises(ConfigError, match="the path is empty") as caught:
        read("--store", "file", "--store-path=")
    assert caught.value.param == "store_path"


def test_values_outside_an_options_limits_and_unknown_backends_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least 0\.1"):
        read("--store", "file", "--store-size", "0")
    with pytest.raises(ConfigError, match="one of file, memory, null"):
        read("--store", "tape")


def test_help_has_every_backends_line_and_its_options_under_its_name() -> None:
    page = help_text(Settings, HelpPage(usage="kvist", summary="x"))
    assert "--store {file,memory,null}" in page
    for row in DOOR.values():
        assert row.text in " ".join(page.split())
    assert page.index("Store file:") < page.index("--store-path") < page.index("Store file, memory:")
    assert page.index("Store file, memory:") < page.index("--store-size")


def test_given_options_become_flags_again() -> None:
    config = read("--store", "file", "--store-path", "/pages", "--store-size", "64")
    assert given_values(config) == {"store": "file", "store_path": "/pages", "store_size": 64.0}
    argv, environ = to_argv((config,), Settings)
    assert (argv, environ) == (["--store=file", "--store-path=/pages"], {})
    assert [each.key for each in options_of(StoreConfig)] == ["store", "store_path", "store_size"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralConfig:
    stores: str = choice_of(DOOR, "auto", "where pages are kept", auto="all", several=True)
    store_options: Given = options_of_choice(DOOR, chosen_by="stores", title="store", prefix="store_", several=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralSettings:
    config: Path | None = option(None, "TOML file")
    storage: SeveralConfig = field(default_factory=SeveralConfig)


def read_several(*argv: str) -> SeveralConfig:
    return read_settings(SeveralSettings, Sources(argv=argv, environ={})).storage


def test_several_backends_are_named_with_commas_and_have_their_options() -> None:
    config = read_several("--stores", "memory,file", "--store-path", "/pages", "--store-size", "2")
    assert config == SeveralConfig(stores="memory,file", store_options={"path": "/pages", "size": 2.0})
    assert names_of(DOOR, config.stores) == ("memory", "file")
    assert to_argv((config,), SeveralSettings)[0] == ["--stores=memory,file", "--store-path=/pages", "--store-size=2.0"]
    assert "--stores {auto,file,memory,null},..." in help_text(SeveralSettings, HelpPage(usage="kvist", summary="x"))


def test_auto_stands_for_all_backends_and_takes_the_options_of_each() -> None:
    config = read_several("--store-path", "/pages")
    assert config == SeveralConfig(store_options={"path": "/pages"})
    assert names_of(DOOR, config.stores) == tuple(DOOR)


@pytest.mark.parametrize("wrong", ["file,tape", "file,file", "auto,file", "file,", ","])
def test_a_list_with_an_unknown_or_repeated_backend_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"one of auto, file, memory, null \(or several, with commas\)"):
        read_several("--stores", wrong)


def test_an_option_of_a_backend_outside_the_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="--store-path is an option of the store file, and --stores is memory,null"):
        read_several("--stores", "memory,null", "--store-path", "/pages")
    with pytest.raises(ConfigError, match="the path is empty") as caught:
        read_several("--stores", "null,file", "--store-path=")
    assert caught.value.param == "store_path"
