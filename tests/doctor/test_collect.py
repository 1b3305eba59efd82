"""The facts that `kvist doctor` reads, and its exit status on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from kvist.cli import main
from kvist.doctor import collect
from kvist.doctor.collect import gpus_of, model_of, place_of

QUIET = ["doctor", "--no-torch", "--json", "--device=cpu"]


def findings(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Return the exit status, and the text of each subject's finding that is not ok."""
    status = main([*QUIET, *argv])
    read = json.loads(capsys.readouterr().out)
    return status, {one["subject"]: one["text"] for one in read["findings"] if one["level"] != "ok"}


def test_gpus_are_read_from_the_driver() -> None:
    gpus, error = gpus_of(lambda *_: "NVIDIA H200, 575.57, 143771, 512\nNVIDIA H200, 575.57, 143771, 0\n")
    assert [(gpu.name, gpu.used_bytes) for gpu in gpus] == [("NVIDIA H200", 512 << 20), ("NVIDIA H200", 0)]
    assert error == ""


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (FileNotFoundError(), "no NVIDIA driver is installed"),
        (subprocess.CalledProcessError(9, "nvidia-smi"), "does not answer"),
        (subprocess.TimeoutExpired("nvidia-smi", 15), "does not answer"),
        ("[N/A], x\n", "does not answer"),
        ("", "has no GPU"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_fact(failure: Exception | str, words: str) -> None:
    def output_of(*_: str) -> str:
        if isinstance(failure, str):
            return failure
        raise failure

    gpus, error = gpus_of(output_of)
    assert gpus == ()
    assert words in error


def test_a_model_without_some_of_its_files_is_seen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_of(str(tmp_path)).missing_files == ("tokenizer.json", "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "one.safetensors").write_bytes(bytes(1000))
    model = model_of(str(tmp_path))
    assert (model.num_bytes, model.missing_files, model.error) == (1000, ("two.safetensors",), "")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json" in model_of(str(tmp_path)).error


def test_a_model_of_the_hub_needs_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert model_of("org/no-such-model").error.endswith("pip install 'kvist[hub]'")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    found = model_of("org/no-such-model")
    assert (found.error, found.name, found.num_bytes) == ("", "org/no-such-model", 0)


def test_a_folder_that_does_not_exist_has_the_room_of_the_one_above_it(tmp_path: Path) -> None:
    place = place_of(tmp_path / "a" / "b")
    assert not place.error
    assert 0 < place.free_bytes <= place.total_bytes
    (tmp_path / "file").write_text("")
    assert "cannot be written" in place_of(tmp_path / "file" / "b").error


def test_torch_is_asked_in_a_process_of_its_own_that_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_ASK_TORCH", "raise ImportError('no such library')")
    assert collect._torch().error == "torch cannot be imported: ImportError: no such library"
    monkeypatch.setattr(collect, "_ASK_TORCH", "import time; time.sleep(60)")
    monkeypatch.setattr(collect, "TORCH_TIMEOUT_S", 0.2)
    assert "within 0.2 s" in collect._torch().error
    monkeypatch.setattr(collect, "_ASK_TORCH", "print(1)")
    monkeypatch.setattr(collect, "TORCH_TIMEOUT_S", 60.0)
    assert "answered something else" in collect._torch().error


def test_the_exit_status_is_1_if_a_server_cannot_start(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, found = findings([f"--port={port}", "--model-path=/no/such/model"], capsys)
        assert status == 1
        assert f"--port {port} on 127.0.0.1: Address already in use" in found["ports"]
        assert "/no/such/model" in found["model"]
    status, found = findings([f"--port={port}"], capsys)
    assert "ports" not in found
    assert status == (1 if found else 0), found


def test_a_master_of_mooncake_that_does_not_answer_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    status, found = findings(
        [
            *("--enable-hierarchical-cache", "--hicache-storage-backend=mooncake"),
            f"--hicache-mooncake-master-addr=127.0.0.1:{port}",
        ],
        capsys,
    )
    assert status == 1
    assert f"127.0.0.1:{port} does not answer" in found["Mooncake"]
