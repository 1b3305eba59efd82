"""The checks of `kvist doctor`: facts in, findings with a remedy out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvist.doctor.checks import check
from kvist.doctor.command import as_lines, as_object
from kvist.doctor.facts import UNLIMITED, Facts, Finding, Gpu, Model, Place, Torch, Wants

GB = 10**9
H200 = Gpu(name="NVIDIA H200", driver="575.1", total_bytes=140 * GB, used_bytes=0)
WANTS = Wants(num_workers=2, max_connections=4096, ports={"--port": ("127.0.0.1", 30000)})
HEALTHY = Facts(
    system="Linux 6.1 x86_64",
    is_linux=True,
    python=(3, 11, 2),
    num_cores=8,
    memory_bytes=64 * GB,
    free_memory_bytes=60 * GB,
    gpus=(H200,),
    torch=Torch(version="2.11", cuda="12.8", num_gpus=1),
    runtime=Place(path=Path("/dev/shm/kvist-0"), total_bytes=32 * GB, free_bytes=30 * GB),
    open_files=(1024, 65536),
    locked_bytes=8 << 20,
    model=Model(name="qwen", path="/models/qwen", num_bytes=15 * GB),
)


def bad(wants: Wants, facts: Facts) -> list[Finding]:
    return [finding for finding in check(wants, facts) if finding.level != "ok"]


@pytest.mark.parametrize(
    ("wants", "facts"),
    [
        ({}, {}),
        ({"device": "cpu"}, {"gpus": (), "torch": None}),
        ({"host_tier_bytes": 20 * GB}, {"runtime": replace(HEALTHY.runtime, free_bytes=64 << 20)}),
        ({"device": "auto"}, {"gpus": (), "gpu_error": "no NVIDIA driver is installed"}),
        ({"has_dummy_weights": True}, {"model": replace(HEALTHY.model, missing_files=("model.safetensors",))}),
        ({"uses_rdma": True}, {"locked_bytes": UNLIMITED, "open_files": (UNLIMITED, UNLIMITED)}),
    ],
)
def test_a_healthy_machine_has_no_findings(wants: dict[str, Any], facts: dict[str, Any]) -> None:
    assert bad(replace(WANTS, **wants), replace(HEALTHY, **facts)) == []


FAULTS: list[tuple[str, dict[str, Any], dict[str, Any], str, str, str]] = [
    ("an old Python", {}, {"python": (3, 10, 1)}, "error", "Python 3.10.1", "use Python 3.11"),
    ("another system", {}, {"is_linux": False, "system": "Darwin"}, "warning", "Darwin", "use Linux"),
    ("no package", {}, {"missing_packages": ("pyzmq>=26",)}, "error", "pyzmq", "pip install 'pyzmq>=26'"),
    ("no driver", {"device": "cuda"}, {"gpus": (), "gpu_error": "none"}, "error", "--device cuda: none", "nvidia-smi"),
    ("too few GPUs", {"tp": 4}, {}, "error", "--tp 4, but this machine has 1", "use --tp 1"),
    ("a busy GPU", {}, {"gpus": (replace(H200, used_bytes=90 * GB),)}, "warning", "90.0 of 140 GB", "--base-gpu-id"),
    ("no torch", {}, {"torch": Torch(error="torch cannot be imported")}, "error", "imported", "pip install"),
    ("torch of a CPU", {}, {"torch": Torch(version="2.11")}, "error", "without CUDA", "--force-reinstall torch"),
    ("an old driver", {}, {"torch": Torch(version="2.11", cuda="13.0")}, "error", "sees 0 of 1", "update NVIDIA's"),
    ("a runtime folder of others", {}, {"runtime": Place(path=Path("/x"), error="no")}, "error", "/x", "--runtime-dir"),
    (
        "the shared memory of Docker",
        {"device": "cpu"},
        {"runtime": replace(HEALTHY.runtime, total_bytes=64 << 20, free_bytes=64 << 20)},
        "error",
        "the page pools of 2 workers need about 2.0 GB",
        "mount -o remount,size=3G /dev/shm (docker run --shm-size=3g)",
    ),
    (
        "little shared memory",
        {"device": "cpu"},
        {"runtime": replace(HEALTHY.runtime, free_bytes=GB)},
        "warning",
        "has 1.0 of 32.0 GB free",
        "--runtime-dir",
    ),
    ("little memory", {"host_tier_bytes": 40 * GB}, {"runtime": replace(HEALTHY.runtime, free_bytes=99 * GB)},
     "error", "2 workers need 80.0 GB", "lower --hicache-size"),
    ("weights on a CPU", {"device": "cpu"}, {"free_memory_bytes": 20 * GB}, "error", "need 30.0 GB", "smaller model"),
    ("few files", {}, {"open_files": (256, 1024)}, "warning", "at most 1024 open files", "ulimit -Hn 4608"),
    ("no locked memory", {"uses_rdma": True}, {}, "error", "may be locked", "ulimit -l unlimited"),
    ("a port in use", {}, {"port_errors": {"--port": "Address already in use"}}, "error", "--port 30000 on 127.0.0.1",
     "ss -ltnp 'sport = :30000'"),
    ("one port twice", {"ports": {"--port": ("::", 9001), "--engine-port": ("::", 9001)}}, {}, "error",
     "is the port of --port, too", "choose another --engine-port"),
    ("no model", {}, {"model": Model(error="no such folder: download the model")}, "error", "no such folder",
     "download the model"),
    ("half a model", {}, {"model": replace(HEALTHY.model, missing_files=("a.safetensors",))}, "error",
     "1 files are missing (a.safetensors)", "download these files again"),
    ("a store of others", {}, {"store": Place(path=Path("/pages"), error="cannot be written")}, "error", "/pages",
     "--hicache-storage-path"),
    ("a full disk", {"store_bytes": 64 * GB}, {"store": Place(path=Path("/pages"), free_bytes=10 * GB)}, "warning",
     "10.0 GB free", "--hicache-storage-size 9"),
    ("no Mooncake", {"mooncake": "--storage mooncake"}, {"mooncake_error": "not installed: pip install x"}, "error",
     "--storage mooncake: not installed", "pip install x"),
    ("no master", {"mooncake_master": "10.0.0.1:50051"}, {"master_error": "refused"}, "error",
     "10.0.0.1:50051 does not answer: refused", "kvist master"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wants", "facts", "level", "words", "remedy"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS]
)
def test_a_fault_is_named_with_its_remedy(
    wants: dict[str, Any], facts: dict[str, Any], level: str, words: str, remedy: str
) -> None:
    (finding,) = bad(replace(WANTS, **wants), replace(HEALTHY, **facts))
    assert finding.level == level
    assert words in finding.text
    assert remedy in finding.remedy


def test_findings_are_printed_as_lines_and_as_one_object() -> None:
    findings = check(WANTS, replace(HEALTHY, python=(3, 9, 0), open_files=(256, 1024)))
    lines = as_lines(findings).splitlines()
    assert lines[0].startswith("error")
    assert "→ use Python 3.11" in lines[1]
    assert lines[-1] == "1 error, 1 warning"
    read = json.loads(as_object(findings))
    assert (read["errors"], read["warnings"]) == (1, 1)
    assert read["findings"][0]["remedy"].startswith("use Python 3.11")
