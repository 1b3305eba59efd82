"""Reads the facts about this machine. Every read is bounded and none raises: what cannot be read is a fact, too."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from kvist.checkpoint import Checkpoint, CheckpointKind, find_checkpoint, read_json
from kvist.cores import num_usable_cores
from kvist.doctor.facts import Facts, Gpu, Model, Place, Torch, Wants
from kvist.errors import ConfigError, KvistError, StoreUnreachable
from kvist.hub.name import hub_name, is_local
from kvist.memory.host_memory import available_host_bytes
from kvist.memory.runtime_dir import runtime_dir
from kvist.mooncake.client import check_master
from kvist.mooncake.requirements import library_obstacle

TORCH_TIMEOUT_S = 120.0
GPU_TIMEOUT_S = 15.0
_MIB = 1 << 20
_GPU_FIELDS = "name,driver_version,memory.total,memory.used"
_GET_HUB = "pip install 'kvist[hub]'"
_NEEDED = re.compile(r"([A-Za-z0-9._-]+)([^;]*)(;.*)?")
_ASK_TORCH = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "num_gpus": torch.cuda.device_count()}))
"""


def collect(wants: Wants) -> Facts:
    """Return the facts. Takes seconds if torch is asked."""
    gpus, gpu_error = ((), "") if wants.device == "cpu" else gpus_of(_output_of)
    return Facts(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        is_linux=sys.platform == "linux",
        python=sys.version_info[:3],
        num_cores=num_usable_cores(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        free_memory_bytes=available_host_bytes(),
        gpus=gpus,
        gpu_error=gpu_error,
        torch=_torch() if wants.checks_torch else None,
        missing_packages=tuple(_missing_packages()),
        runtime=_runtime(wants.runtime_dir),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        model=model_of(wants.model_path),
        port_errors={flag: _port_error(host, port) for flag, (host, port) in wants.ports.items()},
        store=None if wants.store_folder is None else place_of(wants.store_folder),
        mooncake_error=library_obstacle() if wants.mooncake else "",
        master_error="" if wants.mooncake_master is None else _master_error(wants.mooncake_master),
    )


def _output_of(*command: str) -> str:
    """Return the output of a command. Raises `OSError` or `SubprocessError`."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=GPU_TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    return done.stdout


def gpus_of(output_of: Callable[..., str]) -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs that NVIDIA's driver reports, and why there are none."""
    try:
        output = output_of("nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits")
        rows = [[field.strip() for field in line.split(",")] for line in output.splitlines() if line.strip()]
        gpus = tuple(
            Gpu(name=name, driver=driver, total_bytes=int(total) * _MIB, used_bytes=int(used) * _MIB)
            for name, driver, total, used in rows
        )
    except FileNotFoundError:
        return (), "no NVIDIA driver is installed"
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return (), f"NVIDIA's driver does not answer ({error})"
    return gpus, "" if gpus else "NVIDIA's driver has no GPU"


def _torch() -> Torch:
    """Ask torch in a process of its own: it may crash, hang, or take seconds."""
    try:
        done = subprocess.run(
            (sys.executable, "-c", _ASK_TORCH),
            capture_output=True,
            text=True,
            check=False,
            timeout=TORCH_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Torch(error=f"torch was not imported within {TORCH_TIMEOUT_S:g} s")
    except OSError as error:
        return Torch(error=f"torch cannot be asked: {error}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Torch(error=f"torch cannot be imported: {last}")
    try:
        return Torch(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError) as error:
        return Torch(error=f"torch answered something else: {error}")


def _missing_packages() -> Iterable[str]:
    """Yield the requirements of Kvist's own package, without those of extras, that are not met."""
    try:
        requirements = importlib.metadata.requires("kvist") or ()
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        return
    for requirement in requirements:
        found = _NEEDED.fullmatch(requirement)
        if found is None or "extra ==" in (found[3] or "") or ("win32" in (found[3] or "") and sys.platform == "win32"):
            continue
        try:
            installed = importlib.metadata.version(found[1])
        except importlib.metadata.PackageNotFoundError:
            yield f"{found[1]}{found[2]}".strip()
            continue
        lowest = re.search(r">=\s*([0-9.]+)", found[2])
        if lowest is not None and _numbers(installed) < _numbers(lowest[1]):
            yield f"{found[1]}{found[2]}".strip()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _runtime(named: str | None) -> Place:
    try:
        return place_of(runtime_dir(named))
    except ConfigError as error:
        return Place(path=Path(named or "/dev/shm"), error=error.message)


def place_of(folder: Path) -> Place:
    """Return the room at a folder that may not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Place(path=folder, error=f"{existing} cannot be written by this user")
    usage = shutil.disk_usage(existing)
    return Place(path=folder, total_bytes=usage.total, free_bytes=usage.free)


def _port_error(host: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _master_error(address: str) -> str:
    try:
        check_master(address)
    except StoreUnreachable as error:
        return str(error.__cause__ or error.message)
    return ""


def model_of(model_path: str | None) -> Model:
    """Return the model's files, without reading its weights. A model of the Hub is not downloaded."""
    if model_path is not None and not is_local(model_path) and (name := hub_name(model_path)) is not None:
        if importlib.util.find_spec("huggingface_hub") is None:
            return Model(error=f"{name} is a model of the Hugging Face Hub, whose client is missing: {_GET_HUB}")
        return Model(name=str(name), path="the Hugging Face Hub; it is downloaded at the start")
    try:
        checkpoint = find_checkpoint(model_path)
        files, missing = _weight_files(checkpoint)
        num_bytes = sum(file.stat().st_size for file in files)
    except KvistError as error:
        return Model(error=error.message)
    except OSError as error:
        return Model(error=f"{model_path} cannot be read: {error}")
    return Model(name=checkpoint.name, path=str(checkpoint.path), num_bytes=num_bytes, missing_files=tuple(missing))


def _weight_files(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """Return the files with weights, and the names of files that are missing. Raises `ModelLoadError`."""
    if checkpoint.kind is CheckpointKind.GGUF:
        return [checkpoint.path], []
    folder = checkpoint.path
    missing = [name for name in ("tokenizer.json",) if not (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        return files, missing + ([] if files else ["model.safetensors"])
    named = read_json(index).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    missing += [name for name in names if not (folder / name).is_file()]
    return [folder / name for name in names if (folder / name).is_file()], missing
