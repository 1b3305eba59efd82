"""API keys: which keys are accepted at the start, and which processes require them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist import settings, verbs
from kvist.cluster.plan import plan_cluster
from kvist.errors import ConfigError
from kvist.options import to_argv


@pytest.mark.case("empty-key")
@pytest.mark.parametrize("verb", ["serve", "up", "router", "bench single"])
@pytest.mark.parametrize("key", ["", " ", "\t", "schlüssel", "a\x7fb"])
def test_an_api_key_that_no_client_can_send_is_refused_at_start(verb: str, key: str) -> None:
    argv = ["--worker-urls", "http://127.0.0.1:1"] if verb == "router" else []
    with pytest.raises(ConfigError, match=r"empty") as by_flag:
        settings.read(verb, [*argv, "--api-key", key], {})
    assert "--api-key" in by_flag.value.message
    with pytest.raises(ConfigError, match=r"empty"):
        settings.read(verb, argv, {"KVIST_API_KEY": key})


@pytest.mark.case("empty-key")
def test_empty_api_keys_and_cluster_keys_are_refused_at_start(tmp_path: Path) -> None:
    file = tmp_path / "kvist.toml"
    file.write_text('api_key = ""\n')
    with pytest.raises(ConfigError, match=r"api_key in .* is empty"):
        settings.read("serve", ["--config", str(file)], {})
    with pytest.raises(ConfigError, match="--cluster-key is empty"):
        settings.read("serve", ["--cluster-key", ""], {})


@pytest.mark.case("up-workers-without-key")
@pytest.mark.parametrize("given", ["flag", "environment"])
def test_children_of_kvist_up_get_the_api_keys_by_environment(given: str) -> None:
    argv, environ = (["--api-key", "k1", "k2"], {}) if given == "flag" else ([], {"KVIST_API_KEY": "k1,k2"})
    up = settings.read("up", argv, environ)
    assert isinstance(up, settings.UpSettings)
    plans = plan_cluster(verbs.cluster_shape(up, {}), [1, 2])
    assert {plan.name for plan in plans} == {"prefill-0", "decode-0", "router"}
    for plan in plans:
        assert not {"k1", "k2"} & set(plan.argv)
        verb = "router" if plan.name == "router" else "serve"
        child = settings.read(verb, plan.argv[4:], plan.environ)
        assert isinstance(child, settings.ServeSettings | settings.RouterSettings)
        assert child.gateway.server.api_key == ("k1", "k2")


def test_several_api_keys_reach_a_child_process() -> None:
    serve = settings.read("serve", ["--api-key=k1", "--api-key=k2 k3"], {})
    _argv, environ = to_argv((serve,), settings.ServeSettings)
    assert environ["KVIST_API_KEY"].split() == ["k1", "k2", "k3"]
