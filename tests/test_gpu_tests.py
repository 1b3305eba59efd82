"""scripts/gpu_tests.py never reports success when no test ran."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_tests

ROOT = Path(__file__).parents[1]


def results(path: Path, *, tests: int, skipped: int = 0, failures: int = 0, errors: int = 0) -> Path:
    path.write_text(
        f'<testsuites><testsuite tests="{tests}" skipped="{skipped}" failures="{failures}" errors="{errors}"/>'
        "</testsuites>"
    )
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_test_script_fails_without_a_gpu() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "gpu_tests.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "sees no CUDA device" in done.stderr


def test_the_gpu_test_script_succeeds_only_if_tests_ran_and_none_failed(tmp_path: Path) -> None:
    file = tmp_path / "results.xml"
    assert gpu_tests.verdict(0, results(file, tests=5, skipped=2)) == (
        0,
        "passed: 3 GPU tests ran, 0 failed, 2 skipped",
    )
    assert gpu_tests.verdict(0, results(file, tests=2, skipped=2))[0] == 1
    assert gpu_tests.verdict(1, results(file, tests=2, failures=1))[0] == 1
    assert gpu_tests.verdict(2, results(file, tests=1, errors=1))[0] == 2
    assert gpu_tests.verdict(5, results(file, tests=0))[0] == 5
    assert gpu_tests.verdict(0, tmp_path / "none.xml")[0] == 1
    file.write_text("<testsuites")
    assert gpu_tests.verdict(0, file)[0] == 1


def test_the_gpu_test_script_collects_exactly_the_files_with_a_gpu_mark() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in gpu_tests.marked_files(ROOT / "tests")}
    assert {"tests/runner/test_cuda_runner.py", "tests/conformance/test_attention.py"} <= found
    assert "tests/scheduler/test_batching.py" not in found


def test_the_gpu_test_script_keeps_the_output_and_status_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_bad.py").write_text("def test_bad(): assert False, 'seen'\n")
    file = tmp_path / "results.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={file}", str(tmp_path)]
    status = gpu_tests.run(command, tmp_path / "kept.txt", "about\n")
    assert status == 1
    kept = (tmp_path / "kept.txt").read_text()
    assert kept.startswith("about\n")
    assert "AssertionError: seen" in kept
    assert gpu_tests.counts_of(file) == gpu_tests.Counts(num_run=1, num_bad=1, num_skipped=0)
