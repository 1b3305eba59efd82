"""The checks of `kvist doctor`: each is a pure function from wants and facts to findings.

An error keeps the server from starting, or from serving as its settings want; a warning costs speed or memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvist.doctor.facts import UNLIMITED, Facts, Finding, Wants

OK, WARNING, ERROR = "ok", "warning", "error"
MIN_PYTHON = (3, 11)
POOL_BYTES, LEAST_POOL_BYTES = 10**9, 10**8  # of one worker on a CPU: the default page pool of a small model; any pool
OTHER_FILES = 512  # beside connections: sockets of engines, logs, files of the model
BUSY_GPU = 0.1  # of a GPU's memory in use by others
_GB = 1e9


def check(wants: Wants, facts: Facts) -> list[Finding]:
    """Return the findings, in the order in which they are best removed."""
    return [finding for each in _CHECKS for finding in each(wants, facts)]


def _machine(_wants: Wants, facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    text = (
        f"{facts.system}, Python {version}, {facts.num_cores} cores, {facts.memory_bytes / _GB:.1f} GB of memory, "
        f"{facts.free_memory_bytes / _GB:.1f} GB free"
    )
    if facts.python < MIN_PYTHON:
        needs = ".".join(map(str, MIN_PYTHON))
        yield Finding(level=ERROR, subject="machine", text=text, remedy=f"use Python {needs} or newer")
    elif not facts.is_linux:
        remedy = "use Linux: shared memory, loopback addresses and CUDA are tested there only"
        yield Finding(level=WARNING, subject="machine", text=text, remedy=remedy)
    else:
        yield Finding(level=OK, subject="machine", text=text)


def _packages(_wants: Wants, facts: Facts) -> Iterator[Finding]:
    if missing := facts.missing_packages:
        remedy = f"pip install {' '.join(repr(name) if '>' in name or '<' in name else name for name in missing)}"
        text = f"missing or too old: {', '.join(missing)}"
        yield Finding(level=ERROR, subject="packages", text=text, remedy=remedy)
    else:
        yield Finding(level=OK, subject="packages", text="all that Kvist needs are installed")


def _gpu(wants: Wants, facts: Facts) -> Iterator[Finding]:
    if wants.device == "cpu":
        yield Finding(level=OK, subject="GPU", text="not needed: --device cpu")
        return
    if not facts.gpus:
        if wants.device == "cuda":
            remedy = "install NVIDIA's driver, until `nvidia-smi` shows a GPU; or add --device cpu"
            yield Finding(level=ERROR, subject="GPU", text=f"--device cuda: {facts.gpu_error}", remedy=remedy)
        else:
            yield Finding(level=OK, subject="GPU", text=f"{facts.gpu_error}: the model runs on the CPU")
        return
    first = facts.gpus[0]
    text = f"{len(facts.gpus)} × {first.name}, {first.total_bytes / _GB:.0f} GB, driver {first.driver}"
    if wants.tp > len(facts.gpus):
        text = f"--tp {wants.tp}, but this machine has {text}"
        yield Finding(level=ERROR, subject="GPU", text=text, remedy=f"use --tp {len(facts.gpus)}")
    else:
        yield Finding(level=OK, subject="GPU", text=text)
    for number, gpu in enumerate(facts.gpus):
        if gpu.used_bytes > BUSY_GPU * gpu.total_bytes:
            text = f"other processes use {gpu.used_bytes / _GB:.1f} of {gpu.total_bytes / _GB:.0f} GB of GPU {number}"
            remedy = "stop them (`nvidia-smi` lists them), or choose another GPU with --base-gpu-id"
            yield Finding(level=WARNING, subject="GPU", text=text, remedy=remedy)


def _torch(wants: Wants, facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    if torch is None:
        return
    if torch.error:
        remedy = "pip install --force-reinstall torch"
        yield Finding(level=ERROR, subject="torch", text=torch.error, remedy=remedy)
        return
    if wants.device != "cpu" and facts.gpus and torch.num_gpus < len(facts.gpus):
        if torch.cuda is None:
            text, remedy = f"{torch.version} is built without CUDA", "pip install --force-reinstall torch"
        else:
            text = f"{torch.version} for CUDA {torch.cuda} sees {torch.num_gpus} of {len(facts.gpus)} GPUs"
            remedy = "update NVIDIA's driver to one for that CUDA, and `unset CUDA_VISIBLE_DEVICES`"
        level = ERROR if torch.num_gpus < wants.tp else WARNING
        yield Finding(level=level, subject="torch", text=text, remedy=remedy)
        return
    built = "no CUDA" if torch.cuda is None else f"CUDA {torch.cuda}"
    yield Finding(level=OK, subject="torch", text=f"{torch.version}, {built}")


def _on_cpu(wants: Wants, facts: Facts) -> bool:
    return wants.device == "cpu" or not facts.gpus


def _runtime(wants: Wants, facts: Facts) -> Iterator[Finding]:
    """On a CPU the page pools of all workers are files of the runtime directory."""
    place, subject = facts.runtime, "shared memory"
    if place.error:
        remedy = "name a folder of your own with --runtime-dir"
        yield Finding(level=ERROR, subject=subject, text=f"{place.path}: {place.error}", remedy=remedy)
        return
    needed = wants.num_workers * POOL_BYTES if _on_cpu(wants, facts) else 0
    text = f"{place.path} has {place.free_bytes / _GB:.1f} of {place.total_bytes / _GB:.1f} GB free"
    if place.free_bytes < needed:
        size = -(-needed // 10**9) + 1
        remedy = (
            f"mount -o remount,size={size}G /dev/shm (docker run --shm-size={size}g), or --runtime-dir on a larger disk"
        )
        text = f"{text}; the page pools of {wants.num_workers} workers need about {needed / _GB:.1f} GB"
        level = ERROR if place.free_bytes < wants.num_workers * LEAST_POOL_BYTES else WARNING
        yield Finding(level=level, subject=subject, text=text, remedy=remedy)
    else:
        yield Finding(level=OK, subject=subject, text=text)


def _memory(wants: Wants, facts: Facts) -> Iterator[Finding]:
    weights = 0 if wants.has_dummy_weights or not _on_cpu(wants, facts) else facts.model.num_bytes
    needed = wants.num_workers * (weights + wants.host_tier_bytes)
    if needed > facts.free_memory_bytes:
        yield Finding(
            level=ERROR,
            subject="memory",
            text=f"{wants.num_workers} workers need {needed / _GB:.1f} GB for weights and host tiers, and "
            f"{facts.free_memory_bytes / _GB:.1f} GB are free",
            remedy="start fewer workers, lower --hicache-size, or choose a smaller model",
        )


def _limits(wants: Wants, facts: Facts) -> Iterator[Finding]:
    _, hard = facts.open_files
    needed = wants.max_connections + OTHER_FILES
    if hard != UNLIMITED and hard < needed:
        yield Finding(
            level=WARNING,
            subject="ulimits",
            text=f"at most {hard} open files, fewer than --max-connections needs ({needed}): connections are refused "
            "earlier",
            remedy=f"ulimit -Hn {needed} as root (LimitNOFILE={needed} in systemd), or lower --max-connections",
        )
    if wants.uses_rdma and facts.locked_bytes != UNLIMITED:
        yield Finding(
            level=ERROR,
            subject="ulimits",
            text=f"{facts.locked_bytes / _GB:.3f} GB of memory may be locked, and RDMA locks every page pool",
            remedy="ulimit -l unlimited (LimitMEMLOCK=infinity in systemd, --ulimit memlock=-1 for docker run)",
        )
    if hard == UNLIMITED or hard >= needed:
        shown = "unlimited" if hard == UNLIMITED else str(hard)
        yield Finding(level=OK, subject="ulimits", text=f"open files: {shown}")


def _ports(wants: Wants, facts: Facts) -> Iterator[Finding]:
    seen: dict[tuple[str, int], str] = {}
    for flag, (host, port) in wants.ports.items():
        error = facts.port_errors.get(flag, "")
        if other := seen.get((host, port)):
            text, remedy = f"{flag} {port} is the port of {other}, too", f"choose another {flag}"
            yield Finding(level=ERROR, subject="ports", text=text, remedy=remedy)
        elif error:
            remedy = f"ss -ltnp 'sport = :{port}' shows the process that has it: stop it, or choose another {flag}"
            yield Finding(level=ERROR, subject="ports", text=f"{flag} {port} on {host}: {error}", remedy=remedy)
        else:
            yield Finding(level=OK, subject="ports", text=f"{flag} {port} on {host} is free")
        seen.setdefault((host, port), flag)


def _model(wants: Wants, facts: Facts) -> Iterator[Finding]:
    model = facts.model
    if model.error:
        text, remedy = _parts(model.error)
        yield Finding(level=ERROR, subject="model", text=text, remedy=remedy)
    elif model.missing_files and not wants.has_dummy_weights:
        shown = ", ".join(model.missing_files[:4])
        text = f"{model.path} is not complete: {len(model.missing_files)} files are missing ({shown})"
        yield Finding(level=ERROR, subject="model", text=text, remedy="download these files again")
    else:
        yield Finding(level=OK, subject="model", text=f"{model.name}, {model.num_bytes / _GB:.2f} GB in {model.path}")


def _store(wants: Wants, facts: Facts) -> Iterator[Finding]:
    if (place := facts.store) is not None:
        if place.error:
            remedy = "name a folder that you may write to: --hicache-storage-path FOLDER"
            yield Finding(level=ERROR, subject="store", text=f"{place.path}: {place.error}", remedy=remedy)
        elif place.free_bytes < wants.store_bytes:
            text = f"{place.path} has {place.free_bytes / _GB:.1f} GB free, and the store may grow to "
            remedy = f"--hicache-storage-size {max(1, int(0.9 * place.free_bytes / _GB))}, or another folder"
            text += f"{wants.store_bytes / _GB:.1f} GB"
            yield Finding(level=WARNING, subject="store", text=text, remedy=remedy)
        else:
            yield Finding(level=OK, subject="store", text=f"{place.path} has {place.free_bytes / _GB:.1f} GB free")
    if wants.mooncake:
        if facts.mooncake_error:
            text, remedy = _parts(facts.mooncake_error)
            yield Finding(level=ERROR, subject="Mooncake", text=f"{wants.mooncake}: {text}", remedy=remedy)
        else:
            yield Finding(level=OK, subject="Mooncake", text="its library can be used")
    if wants.mooncake_master is not None:
        if facts.master_error:
            text = f"{wants.mooncake_master} does not answer: {facts.master_error}"
            remedy = "start a master with `kvist master`, or correct --hicache-mooncake-master-addr"
            yield Finding(level=ERROR, subject="Mooncake", text=text, remedy=remedy)
        else:
            yield Finding(level=OK, subject="Mooncake", text=f"the master answers at {wants.mooncake_master}")


def _parts(message: str) -> tuple[str, str]:
    """Return the text and the remedy of an error's message, which ends with its remedy."""
    text, colon, remedy = message.rpartition(": ")
    return (text, remedy) if colon else (message, "read the message")


_CHECKS = (_machine, _packages, _gpu, _torch, _runtime, _memory, _limits, _ports, _model, _store)
