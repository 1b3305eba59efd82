"""Options of other servers are accepted as aliases, or answered with what to do instead."""

from __future__ import annotations

import pytest

from kvist import cli, settings
from kvist.errors import ConfigError
from kvist.foreign_flags import REMEDIES
from kvist.options import options_of


def serve(*argv: str, environ: dict[str, str] | None = None) -> settings.ServeSettings:
    read = settings.read("serve", argv, environ or {})
    assert isinstance(read, settings.ServeSettings)
    return read


@pytest.mark.case("wrong-hints")
def test_options_of_vllm_and_sglang_with_the_same_meaning_are_aliases() -> None:
    engine = serve("--max-num-seqs", "8", "--gpu-memory-utilization=0.9", "-tp", "2", "--block-size", "32").engine
    assert (engine.scheduler.max_running_requests, engine.runner.mem_fraction_static) == (8, 0.9)
    assert (engine.runner.tp, engine.runner.page_size) == (2, 32)
    engine = serve("--max-num-batched-tokens", "512", "--max-model-len", "2048", "--enforce-eager").engine
    assert (engine.scheduler.chunked_prefill_size, engine.scheduler.context_length) == (512, 2048)
    assert engine.runner.disable_cuda_graph


@pytest.mark.case("wrong-hints")
@pytest.mark.parametrize("verb", ["serve", "router", "up"])
def test_the_model_may_be_the_first_argument_after_the_verb(verb: str) -> None:
    more = ["--worker-urls", "http://a:1"] if verb == "router" else []
    read = settings.read(verb, ["/models/qwen", *more], {})
    if isinstance(read, settings.RouterSettings):
        assert read.tokenizer.model_path == "/models/qwen"
    else:
        assert isinstance(read, settings.ServeSettings | settings.UpSettings)
        assert read.engine.model.model_path == "/models/qwen"


def test_two_models_are_an_error() -> None:
    with pytest.raises(ConfigError, match="unexpected argument 'second'"):
        serve("first", "second")
    with pytest.raises(ConfigError, match="contradict"):
        serve("first", "--model-path", "second")


@pytest.mark.case("wrong-hints")
@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--quantization", "unquantized checkpoint"),
        ("--enable-prefix-caching", "leave it out"),
        ("--data-parallel-size", "kvist up --unified N"),
        ("--tokenizer-mode", "leave it out"),
    ],
)
def test_an_unsupported_option_of_another_server_is_answered_with_its_remedy(flag: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(flag, "8")
    assert remedy in caught.value.message
    assert "did you mean" not in caught.value.message


def test_only_a_flag_close_to_a_known_one_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"^unknown flag --frobnicate-threads$"):
        serve("--frobnicate-threads", "2")
    with pytest.raises(ConfigError, match=r"did you mean --page-size\?"):
        serve("--pagesize", "16")


@pytest.mark.case("wrong-hints")
def test_an_unknown_variable_is_a_warning_that_names_the_nearest_variable(capsys: pytest.CaptureFixture[str]) -> None:
    serve(environ={"KVIST_PAGESIZE": "32"})
    assert "KVIST_PAGESIZE sets no option; did you mean KVIST_PAGE_SIZE?" in capsys.readouterr().err


def test_every_remedy_is_for_a_flag_that_kvist_lacks() -> None:
    known = {flag for verb in cli.VERBS for option in options_of(settings._SETTINGS[verb]) for flag in option.flags}
    assert not known & set(REMEDIES)


@pytest.mark.parametrize("verb", ["serve", "router", "up"])
def test_help_is_short_and_help_all_has_everything(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    short = capsys.readouterr().out
    assert cli.main([verb, "--help-all"]) == 0
    everything = capsys.readouterr().out
    assert "--host" in short
    assert "--flush-timeout-s" not in short
    assert "--flush-timeout-s" in everything
    assert len(short) < len(everything) / 2
    assert "\x1b[" not in short + everything  # no colours without a terminal
