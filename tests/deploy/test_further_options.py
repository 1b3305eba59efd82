"""`kvist deploy render` refuses options of containers that would not start, or not work together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvist.deploy.render import check_deployment, run_render
from kvist.errors import ConfigError
from kvist.verbs import option_values
from tests.deploy.test_render import SHAPES, deployment


def of(**container: Any) -> dict[str, Any]:
    return {**SHAPES["pair"], "container": container}


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"worker_args": ("--page-sze=32",)}, "--worker-args: unknown flag --page-sze; did you mean --page-size?"),
        ({"worker_args": ("--page-size=x",)}, "--worker-args: --page-size: 'x' is not allowed; it must be a whole"),
        ({"worker_args": ("--page-size",)}, "--worker-args: --page-size needs a value"),
        ({"worker_args": ("--hicache-size=5",)}, "--worker-args: the --hicache options need the host tier"),
        ({"worker_args": ("--policy=cost",)}, "--worker-args: unknown flag --policy"),
        ({"worker_args": ("fast",)}, "--worker-args: fast is not an option: give each value after a flag of its own"),
        ({"worker_args": ("--role=decode",)}, "--worker-args sets --role, which the manifest sets to prefill: omit it"),
        ({"worker_args": ("--port=9001",)}, "--worker-args sets --port, which the manifest sets to 30000: omit it"),
        ({"worker_args": ("--model-path=/x",)}, "--worker-args sets --model-path, which the manifest sets itself"),
        ({"worker_args": ("--api-key=secret",)}, "--worker-args sets --api-key, which the manifest sets itself"),
        ({"router_args": ("--policy=best",)}, "--router-args: --policy: 'best' is not allowed; it must be one of"),
        ({"router_args": ("--page-size=32",)}, "--router-args: unknown flag --page-size"),
        ({"router_args": ("--port=80",)}, "--router-args sets --port, which the manifest sets to 30000"),
    ],
)
@pytest.mark.parametrize("kind", ["rbg", "compose"])
def test_an_option_that_is_passed_on_is_checked_as_its_command_checks_it(
    kind: str, container: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_deployment(deployment(format=kind, **of(**container)), option_values)
    assert caught.value.message.startswith(words)
    assert "secret" not in caught.value.message
    assert caught.value.param == next(iter(container))


@pytest.mark.parametrize(
    "container",
    [
        {"worker_args": ("--page-size=32", "--max-running-requests", "64")},
        {"worker_args": ("--log-format=text", "--drain-grace-s=10")},
        {"router_args": ("--policy=cost", "--discovery=dns:others:30000")},
    ],
)
@pytest.mark.parametrize("kind", ["rbg", "kubernetes", "compose"])
def test_options_that_fit_are_passed_on(kind: str, container: dict[str, Any]) -> None:
    check_deployment(deployment(format=kind, **of(**container)), option_values)


def test_a_manifest_whose_containers_would_be_killed_is_not_written(tmp_path: Path) -> None:
    described = deployment(**of(worker_args=("--drain-grace-s=600",)))
    with pytest.raises(ConfigError) as caught:
        run_render(described, tmp_path / "cluster.yaml", option_values)
    assert "terminationGracePeriodSeconds: the container is killed after 90 s, during the drain" in caught.value.message
    assert list(tmp_path.iterdir()) == []
