"""Unsuitable settings are refused early, and the error names the flag to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvist.checkpoint import Checkpoint
from kvist.errors import ConfigError
from kvist.models import load_model_config
from kvist.runner import build
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerOptions


def build_tiny(checkpoint: Checkpoint, runtime_dir: Path, **options: object) -> None:
    settings = {"load_format": "dummy", "device": "cpu", "max_total_tokens": 64, **options}
    made = RunnerOptions(**settings)  # type: ignore[arg-type]
    build_runner(checkpoint, load_model_config(checkpoint), made, runtime_dir=runtime_dir).close()


def test_base_gpu_id_with_device_cpu_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--base-gpu-id 1 needs a GPU, but --device is cpu") as refusal:
        build_tiny(tiny_checkpoint, tmp_path, base_gpu_id=1)
    assert refusal.value.param == "base_gpu_id"


def test_base_gpu_id_without_a_visible_gpu_is_logged_as_unused(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build_tiny(tiny_checkpoint, tmp_path, device="auto", base_gpu_id=1)
    assert "--base-gpu-id 1 is ignored" in caplog.text


def test_an_unusable_attention_backend_is_refused_before_the_weights_are_loaded(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_model", lambda *_args, **_options: pytest.fail("minutes of loading"))
    with pytest.raises(ConfigError, match="--attention-backend fa3"):
        build_tiny(tiny_checkpoint, tmp_path, attention_backend="fa3")
    assert not list(tmp_path.glob("pool-*")), "the pool file is removed with the engine"


def test_running_out_of_memory_after_the_pool_names_the_flag_to_lower(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(build, "load_model", run_out)
    with pytest.raises(ConfigError, match=r"CUDA out of memory.*--mem-fraction-static") as refusal:
        build_tiny(tiny_checkpoint, tmp_path)
    assert refusal.value.param == "mem_fraction_static"
    assert not list(tmp_path.glob("pool-*"))
