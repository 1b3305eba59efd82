"""`kvist deploy run` refuses what could never become ready, before it starts anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvist.deploy.render import documents_of
from kvist.deploy_run.config import LocalRunOptions
from kvist.deploy_run.run import LocalRun, run_local
from kvist.errors import ConfigError
from kvist.verbs import option_values
from tests.deploy.test_render import SHAPES, deployment


def test_a_manifest_that_would_not_work_is_refused(tmp_path: Path) -> None:
    documents: list[dict[str, Any]] = documents_of(deployment(**SHAPES["pair"]))
    (group,) = [one for one in documents if one["kind"] == "RoleBasedGroup"]
    group["spec"]["roles"][0]["dependencies"] = ["router"]
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    run = LocalRun(manifest=path, api_key=None, claims={}, images={}, start_timeout_s=5.0, read_options=option_values)
    with pytest.raises(ConfigError) as caught:
        run_local(run)
    assert caught.value.message == (
        "the manifest would not work: RoleBasedGroup kvist: spec.roles.0.dependencies.0: prefill waits for router, "
        "and router for prefill: neither would start: remove one of the dependencies (and 3 further errors)"
    )


def test_an_image_stands_for_a_program() -> None:
    assert LocalRunOptions(images=(f"kvist:next={sys.executable}",)).python_of_image == {"kvist:next": sys.executable}
    with pytest.raises(ConfigError) as caught:
        LocalRunOptions(images=("kvist:next=/no/such/python",))
    assert caught.value.message == "--images kvist:next=/no/such/python: /no/such/python is not a program"
