"""Options are read from flags, environment and TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvist.config import option
from kvist.errors import ConfigError
from kvist.flag_help import HelpPage, help_text
from kvist.flags import Shorthand, Sources, read_settings
from kvist.options import options_of, to_argv


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    role: str = option("unified", "role of the worker", choices=("unified", "prefill", "decode"))
    page_size: int = option(16, "tokens in one KV page", unit="tokens", choices=(16, 32, 64))
    tp_size: int = option(1, "tensor-parallel ranks", flag="--tp", aliases=("--tensor-parallel-size",), minimum=1)
    mem_fraction_static: float = option(0.8, "share of memory for the pool", minimum=0.05, maximum=0.95)
    num_pages: int | None = option(None, "pages in the pool; not set: as many as fit", minimum=1)
    host: str = option("127.0.0.1", "address to bind")


@dataclass(frozen=True, slots=True, kw_only=True)
class WebConfig:
    host: str = option("127.0.0.1", "address to bind")
    port: int = option(30000, "port to bind", minimum=0, maximum=65535)
    api_key: str | None = option(None, "key of the clients", secret=True)
    worker_urls: tuple[str, ...] = option((), "workers")
    access_log: bool = option(False, "log every request")
    weight: float = option(1.0, "a number without limits")
    policy: str = option("cache_aware", "how workers are chosen", choices=("cache_aware", "round_robin"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    config: Path | None = option(None, "TOML file")
    engine: EngineConfig = field(default_factory=EngineConfig)
    web: WebConfig = field(default_factory=WebConfig)


SHORTHANDS = (
    Shorthand(flag="--decode-only", key="role", value="decode", text="same as --role decode"),
    Shorthand(flag="--disaggregation-mode", key="role", renamed=(("null", "unified"),), text="SGLang's name"),
)


def read(*argv: str, environ: dict[str, str] | None = None) -> Settings:
    return read_settings(Settings, Sources(argv=argv, environ=environ or {}, shorthands=SHORTHANDS))


def test_settings_without_a_source_are_the_defaults() -> None:
    assert read() == Settings()


def test_a_flag_is_read_with_its_type_with_or_without_an_equals_sign() -> None:
    assert read("--page-size", "32").engine.page_size == 32
    assert read("--mem-fraction-static=0.5").engine.mem_fraction_static == 0.5
    assert read("--role", "prefill").engine.role == "prefill"


@pytest.mark.parametrize("flag", ["--tp", "--tensor-parallel-size"])
def test_every_alias_of_a_flag_sets_the_same_option(flag: str) -> None:
    assert read(flag, "2").engine.tp_size == 2


def test_two_groups_that_declare_one_option_share_its_flag() -> None:
    settings = read("--host", "10.0.0.1")
    assert (settings.engine.host, settings.web.host) == ("10.0.0.1", "10.0.0.1")
    assert [item.key for item in options_of(Settings)].count("host") == 1


def test_flags_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "kvist.toml"
    file.write_text('port = 1\npage-size = 32\nrole = "decode"\n')
    settings = read("--config", str(file), "--port", "3", environ={"KVIST_PORT": "2", "KVIST_PAGE_SIZE": "64"})
    assert (settings.web.port, settings.engine.page_size, settings.engine.role) == (3, 64, "decode")


def test_an_unknown_flag_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown flag --page-sise; did you mean --page-size\?"):
        read("--page-sise", "16")


def test_an_unknown_key_of_the_file_names_the_nearest_known_one(tmp_path: Path) -> None:
    file = tmp_path / "kvist.toml"
    file.write_text("page_sizes = 16\n")
    with pytest.raises(ConfigError, match=r"unknown key page_sizes in .*kvist.toml; did you mean page_size\?"):
        read("--config", str(file))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--port", "banana"), ("--port", "'banana'", "from 0 to 65535")),
        (("--port", "70000"), ("--port", "70000", "from 0 to 65535")),
        (("--port", "1.5"), ("--port", "whole number")),
        (("--page-size", "17"), ("--page-size", "17", "16, 32, 64")),
        (("--mem-fraction-static", "nan"), ("--mem-fraction-static", "0.05 to 0.95")),
        (("--role", "prefil"), ("--role", "unified, prefill, decode", "Did you mean prefill?")),
        (("--policy", "random"), ("--policy", "cache_aware, round_robin")),
        (("--port",), ("--port", "needs a value")),
        (("--port", "--role", "decode"), ("--port", "needs a value")),
        (("serve",), ("unexpected argument 'serve'",)),
        (("--tp", "0"), ("--tp", "at least 1")),
        (("--weight", "nan"), ("--weight", "'nan'", "a number")),
        (("--weight", "inf"), ("--weight", "'inf'", "a number")),
    ],
)
def test_the_error_for_a_bad_value_names_flag_value_and_allowed_values(
    argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    for word in words:
        assert word in caught.value.message


def test_a_bad_environment_value_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="KVIST_PORT"):
        read(environ={"KVIST_PORT": "banana"})


def test_a_toml_value_of_the_wrong_type_is_refused_not_converted(tmp_path: Path) -> None:
    file = tmp_path / "kvist.toml"
    file.write_text("port = true\n")
    with pytest.raises(ConfigError, match="port in"):
        read("--config", str(file))


def test_list_options_accept_spaces_commas_and_repetition() -> None:
    urls = read("--worker-urls", "http://a", "http://b", "--port", "1", "--worker-urls", "http://c,http://d").web
    assert urls.worker_urls == ("http://a", "http://b", "http://c", "http://d")


def test_switches_accept_a_negated_flag_and_words() -> None:
    assert read("--access-log").web.access_log
    assert not read("--no-access-log", environ={"KVIST_ACCESS_LOG": "1"}).web.access_log
    assert not read("--access-log=false").web.access_log


def test_decode_only_and_disaggregation_mode_set_the_role() -> None:
    assert read("--decode-only").engine.role == "decode"
    assert read("--disaggregation-mode", "prefill").engine.role == "prefill"
    assert read("--disaggregation-mode", "null").engine.role == "unified"


def test_a_shorthand_that_contradicts_its_option_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--role and --decode-only contradict"):
        read("--role", "prefill", "--decode-only")


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert read("--port", "1", "--port", "2").web.port == 2


def test_none_is_accepted_only_for_optional_options() -> None:
    assert read("--num-pages", "none", environ={"KVIST_NUM_PAGES": "7"}).engine.num_pages is None
    with pytest.raises(ConfigError):
        read("--port", "none")


def test_to_argv_round_trips_settings_and_passes_secrets_by_environment() -> None:
    before = read(
        "--decode-only", "--tp=2", "--access-log", "--worker-urls", "http://a", "http://b", "--api-key", "hush"
    )
    argv, environ = to_argv((before,), Settings)
    assert "hush" not in " ".join(argv)
    assert read(*argv, environ=environ) == before


def test_a_refused_secret_is_not_quoted(tmp_path: Path) -> None:
    file = tmp_path / "kvist.toml"
    file.write_text("api-key = 123456789\n")
    with pytest.raises(ConfigError) as caught:
        read("--config", str(file))
    assert "api-key" in str(caught.value)
    assert "123456789" not in str(caught.value)


def test_help_shows_default_unit_choices_and_text_of_every_option() -> None:
    page = help_text(Settings, HelpPage(usage="kvist test", summary="A test.", shorthands=SHORTHANDS))
    for option_ in options_of(Settings):
        assert all(flag in page for flag in option_.flags)
        assert option_.help.text.split()[0] in page
    assert "{16,32,64}" in page
    assert "unit: tokens" in page
    assert "default: 30000" in page
    assert "--decode-only" in page
