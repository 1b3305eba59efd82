"""The kvist command: start-up time, exit status, error messages, and settings of each verb."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvist
from kvist import cli, settings, verbs
from kvist.cluster.plan import plan_cluster
from kvist.errors import ConfigError
from kvist.options import options_of
from kvist.request import Role

HEAVY = ("torch", "transformers", "numpy.linalg", "uvicorn", "starlette")


def loaded_after(code: str) -> set[str]:
    """Run the code in a new interpreter and return the heavy modules that it has loaded."""
    probe = f"import sys, io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()):\n    {code}\n"
    probe += f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_version_does_not_import_torch() -> None:
    assert loaded_after("import kvist; print(kvist.__version__)") == set()


def test_help_version_and_flag_errors_do_not_import_torch() -> None:
    lines = [
        ["--version"],
        ["--help"],
        ["serve", "--help"],
        ["up", "--help"],
        ["serve", "--prot"],
        ["bench", "--help"],
        ["bench", "rate", "--help"],
        ["bench", "engine", "--help"],
    ]
    assert not loaded_after(f"from kvist.cli import main; [main(argv) for argv in {lines}]") & {"torch", "transformers"}


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvist {kvist.__version__}\n"


def test_help_into_a_pipe_that_closes_early_leaves_no_traceback() -> None:
    code = "from kvist.cli import main; import sys; sys.stdin.read(); sys.exit(main(['serve', '--help']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    child.stdin.close()
    assert child.stderr.read() == b""
    assert child.wait(120) == 0


def test_kvist_without_a_command_shows_the_commands_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.USAGE_ERROR
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sreve"], ["did you mean serve?"]),
        (["serve", "--prot", "1"], ["kvist serve:", "--prot", "did you mean --port?"]),
        (["serve", "--role", "prefiller"], ["--role", "prefiller", "unified, prefill, decode"]),
        (["serve", "--model-path", "/no/such/model", "--port", "0"], ["/no/such/model"]),
        (["router", "--allowed-worker-hosts", "http://h"], ["--allowed-worker-hosts", "*.SUFFIX"]),
        (["router", "--worker-urls", "ftp://x", "--port", "0"], ["ftp://x", "http://HOST:PORT"]),
        (["up", "--prefill", "0"], ["--prefill 0", "--unified"]),
        (["bench"], ["single", "multiturn", "engine"]),
        (["bench", "singel"], ["did you mean bench single?"]),
        (["bench", "offline", "--input-tokens", "9-3"], ["--input-tokens", "'9-3'", "LOW-HIGH"]),
        (["bench", "single", "--base-url", "localhost:1"], ["--base-url", "http://HOST:PORT"]),
        (["bench", "single", "--rate", "3"], ["unknown flag --rate"]),
        (["bench", "custom", "/no/such/file.json"], ["/no/such/file.json"]),
        (["bench", "engine", "--shapes", "8"], ["--shapes", "'8'", "8@1024"]),
        (["bench", "engine", "--role", "decode"], ["unknown flag --role"]),
        (["up", "--prefill", "two"], ["--prefill", "'two'", "from 0 to 64"]),
        (["serve", "--max-prefill-tokens", "some"], ["--max-prefill-tokens", "auto or a whole number, at least 1"]),
        (
            ["serve", "--max-prefill-tokens", "7", "--max-running-requests", "8"],
            ["--max-prefill-tokens 7 is below --max-running-requests 8"],
        ),
        (["serve", "--quantization", "fp8"], ["unknown flag --quantization"]),
        (["serve", "--kv-cache-dtype", "fp8_e4m3"], ["unknown flag --kv-cache-dtype"]),
    ],
)
def test_a_config_error_is_one_line_on_standard_error_and_status_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == cli.USAGE_ERROR
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    for word in words:
        assert word in shown


@pytest.mark.parametrize(
    ("verb", "answer"),
    [
        ("xyzzy", "kvist xyzzy: unknown command. Known: serve, "),
        ("serv", "kvist serv: unknown command; did you mean serve? Known: serve, "),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest_one(
    verb: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb]) == 2
    assert capsys.readouterr().err.startswith(answer)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_of_a_verb_has_its_own_flags(verb: str) -> None:
    flags = [flag for option in options_of(settings._SETTINGS[verb]) for flag in option.flags]
    flags += [short.flag for short in settings.SHORTHANDS]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_of_a_verb_is_in_its_help(verb: str) -> None:
    page = settings.help_for(verb, cli.VERBS[verb])
    assert all(flag in page for option in options_of(settings._SETTINGS[verb]) for flag in option.flags)


def test_the_two_commands_of_the_sglang_article_are_parsed() -> None:
    common = ["--model-path", "M", "--host", "127.0.0.1", "--tp", "1", "--mem-fraction-static", "0.8"]
    first = settings.read("serve", [*common, "--port", "30001"], {})
    second = settings.read("serve", [*common, "--port", "30002", "--decode-only"], {})
    assert isinstance(first, settings.ServeSettings)
    assert isinstance(second, settings.ServeSettings)
    assert (first.endpoint.role, first.gateway.server.port, first.engine.model.model_path) == (Role.UNIFIED, 30001, "M")
    assert (second.endpoint.role, second.engine.runner.mem_fraction_static, second.engine.runner.tp) == (
        Role.DECODE,
        0.8,
        1,
    )


def test_a_server_that_cannot_be_reached_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "single", "--base-url", "http://127.0.0.1:1"]) == 1
    assert "http://127.0.0.1:1 cannot be measured" in capsys.readouterr().err


def test_a_router_takes_several_urls_after_one_flag() -> None:
    read = settings.read("router", ["--prefill", "http://a:1", "http://b:1", "--decode", "http://c:1"], {})
    assert isinstance(read, settings.RouterSettings)
    assert read.router.urls.prefill == ("http://a:1", "http://b:1")
    assert read.router.urls.decode == ("http://c:1",)


def test_an_unknown_environment_variable_is_reported_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    settings.read("serve", [], {"KVIST_PAGE_SISE": "16"})
    shown = capsys.readouterr().err
    assert "KVIST_PAGE_SISE" in shown
    assert "KVIST_PAGE_SIZE" in shown


def test_an_environment_variable_of_another_command_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    settings.read("router", ["--worker-urls", "http://a:1"], {"KVIST_PAGE_SIZE": "16"})
    assert capsys.readouterr().err == ""


def test_up_passes_each_child_its_options_and_secrets_by_environment() -> None:
    argv = [
        "--page-size",
        "32",
        "--policy",
        "round_robin",
        "--api-key",
        "hush",
        "--cluster-key",
        "hist",
        "--port",
        "8000",
    ]
    read = settings.read("up", [*argv, "--host", "0.0.0.0", "--num-threads", "3"], {})
    assert isinstance(read, settings.UpSettings)
    shape = verbs.cluster_shape(read)
    assert shape.worker_argv == ("--page-size=32",)
    assert shape.router_argv == ("--policy=round_robin",)
    assert shape.worker_environ == {"KVIST_CLUSTER_KEY": "hist", "KVIST_API_KEY": "hush"}
    assert shape.router_environ == {"KVIST_CLUSTER_KEY": "hist", "KVIST_API_KEY": "hush"}
    assert (shape.router_host, shape.router_port, shape.threads_per_worker) == ("0.0.0.0", 8000, 3)


def test_the_demo_uses_small_tiers_by_default() -> None:
    read = settings.read("demo", [], {})
    assert isinstance(read, settings.DemoSettings)
    assert verbs.cluster_shape(verbs.with_tiers(read, "/here")).worker_argv == (
        *("--enable-hierarchical-cache", f"--hicache-size={verbs.DEMO_HOST_TIER_GB:g}"),
        *("--hicache-storage-backend=file", "--hicache-storage-path=/here", "--hicache-storage-prefetch-threshold=16"),
    )
    read = settings.read("demo", ["--storage=mooncake"], {})
    assert isinstance(read, settings.DemoSettings)
    assert verbs.with_tiers(read, "/here").engine.host_tier.hicache_size == verbs.DEMO_HOST_TIER_GB
    read = settings.read("demo", ["--enable-hierarchical-cache", "--hicache-storage-backend=file"], {})
    assert isinstance(read, settings.DemoSettings)
    own = verbs.with_tiers(read, "/here").engine
    assert (own.host_tier.hicache_size, own.storage.hicache_storage_backend) == (None, "file")
    assert own.storage.hicache_storage_options == {}


def test_up_gives_workers_separate_persistence_folders_and_one_shared_store() -> None:
    argv = ["--enable-hierarchical-cache", "--hicache-persist", "/kept", "--hicache-storage-backend", "file"]

    def folders(*more: str) -> list[str]:
        read = settings.read("up", [*argv, "--hicache-storage-path", "/pages", *more], {})
        assert isinstance(read, settings.UpSettings)
        *workers, router = plan_cluster(verbs.cluster_shape(read), range(read.cluster_config().num_workers))
        assert not [argument for argument in router.argv if "hicache" in argument]
        for worker in workers:
            assert {"--hicache-storage-backend=file", "--hicache-storage-path=/pages"} <= set(worker.argv)
        given = [argument for worker in workers for argument in worker.argv if "--hicache-persist" in argument]
        return [argument.removeprefix("--hicache-persist=") for argument in given]

    assert folders("--decode", "2") == ["/kept/prefill-0", "/kept/decode-0", "/kept/decode-1"]
    assert folders("--prefill", "0", "--decode", "0", "--unified", "1") == ["/kept"]


def test_the_limits_of_a_step_are_shown_as_auto_unless_set() -> None:
    read = settings.read("serve", ["--max-running-requests", "auto", "--chunked-prefill-size", "64"], {})
    assert isinstance(read, settings.ServeSettings)
    limits = read.engine.scheduler
    assert (limits.max_running_requests, limits.chunked_prefill_size, limits.max_prefill_tokens) == (None, 64, None)
    page = settings.help_for("serve", cli.VERBS["serve"])
    for flag in ("--max-running-requests", "--chunked-prefill-size", "--max-prefill-tokens", "--overlap"):
        paragraph = page.split(f"  {flag}")[1].split("\n  --")[0]
        assert "default: auto" in paragraph


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (3, 0, 1, 0.8)),
        (["--base-gpu-id", "1"], (3, 1, 1, 0.8)),
        (["--mem-fraction-static", "0.3", "--tp", "2"], (3, 0, 2, None)),
        (["--device", "cpu"], (0, 0, 1, 0.8)),
    ],
)
def test_up_counts_the_gpus_and_divides_their_memory_by_default(flags: list[str], expected: tuple[object, ...]) -> None:
    read = settings.read("up", flags, {})
    assert isinstance(read, settings.UpSettings)
    shape = verbs.cluster_shape(read, {"CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert (shape.num_gpus, shape.base_gpu_id, shape.gpus_per_worker, shape.memory_share) == expected
    assert not [argument for argument in shape.worker_argv if "base-gpu-id" in argument]


def test_options_that_the_engine_reads_from_the_model_are_not_flags() -> None:
    with pytest.raises(ConfigError, match="unknown flag --eos-token-ids"):
        settings.read("serve", ["--eos-token-ids", "2"], {})


def test_a_page_pool_of_up_is_the_storage_tier_of_its_workers() -> None:
    read = settings.read("up", ["--storage", "mooncake", "--stores", "2", "--hot-page-replicas", "2"], {})
    assert isinstance(read, settings.UpSettings)
    shape = verbs.cluster_shape(read)
    assert shape.pool is not None
    assert shape.pool.num_stores == 2
    assert shape.pool.master_argv == ("--hot-page-replicas=2",)
    assert {"--enable-hierarchical-cache", "--hicache-storage-backend=mooncake"} <= {*shape.worker_argv}


def test_options_of_the_tiers_need_no_other_flag_beside_a_page_pool() -> None:
    chosen = ["--hicache-size=1.5", "--hicache-storage-prefetch-threshold=32", "--hicache-mooncake-replica-num=2"]
    read = settings.read("up", ["--storage=mooncake", *chosen], {})
    assert isinstance(read, settings.UpSettings)
    assert {"--enable-hierarchical-cache", "--hicache-storage-backend=mooncake", *chosen} <= {
        *verbs.cluster_shape(read).worker_argv
    }
    with pytest.raises(ConfigError, match="add --enable-hierarchical-cache"):
        settings.read("up", ["--storage=mooncake", "--no-enable-hierarchical-cache"], {})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stores", "2"], ["--stores 2", "--storage mooncake"]),
        (["--segment-size", "2"], ["--storage mooncake"]),
        (
            ["--storage", "mooncake", "--enable-hierarchical-cache", "--hicache-storage-backend", "file"],
            ["two storage tiers", "--hicache-storage-backend file"],
        ),
    ],
)
def test_options_of_a_page_pool_that_contradict_others_are_refused(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.read("up", argv, {})
    assert all(word in caught.value.message for word in words)
