"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from hypothesis import HealthCheck, settings

from kvist.checkpoint import find_checkpoint
from kvist.mooncake.requirements import library_obstacle
from kvist.testing.mooncake_pool import MooncakePool
from tests.budget import budget

# No deadline: the time of one example depends on the machine and on its load.
settings.register_profile(
    "kvist", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=budget(40, long=1000)
)
settings.load_profile("kvist")

# Images of Python often set PYTHONDONTWRITEBYTECODE. Then, each of pytest-xdist's workers would rewrite the asserts of
# all files (11 s), and each engine process would compile Kvist (0.6 s of its 2.4 s).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The imports and items of a collection stay; to look at them again and again takes a third of its time.
gc.disable()


SHARED_CLUSTER, OWN_PROCESSES = "tests/e2e/ of the shared cluster", "tests/e2e/ of processes of their own"
FILES_WITH_OWN_PROCESSES = tuple(  # about half of the time; none uses `cluster`, which tests/e2e/conftest.py checks
    f"tests/e2e/test_{name}.py" for name in ("chaos", "deploy_run", "faults", "membership", "overload")
)
WITH_TRANSFORMERS = "tests that compare with transformers"  # they share its import and its model of a session
FILES_WITH_TRANSFORMERS = (
    "tests/models/test_equals_transformers.py",
    "tests/models/test_smollm2.py",
    "tests/runner/test_smollm2.py",
    "tests/text/test_loading.py",
)
SLOWEST = (  # of what pytest-xdist's workers get, the slowest first: at the end, no worker waits long for the other
    SHARED_CLUSTER,
    OWN_PROCESSES,
    "tests/engine/test_processes.py",
    "tests/engine/test_engines.py",
    WITH_TRANSFORMERS,
    "tests/nodes/test_pool.py",
    "tests/adding/test_walks.py",
    "tests/engine/test_two_hosts.py",
    "tests/engine/test_tp_handoff.py",
    "tests/runner/test_tensor_parallel.py",
    "tests/store/test_mooncake_faults.py",
    "tests/bench/test_scaling.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to pytest-xdist's workers; all end-to-end tests of the shared cluster go to one, those with
    processes of their own to one: more clusters of real engines at once need more memory than a small machine has."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # has no types
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(FILES_WITH_OWN_PROCESSES):
                return OWN_PROCESSES
            if nodeid.startswith(FILES_WITH_TRANSFORMERS):
                return WITH_TRANSFORMERS
            return SHARED_CLUSTER if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            if slowest := next((each for each in SLOWEST if each in self.workqueue), None):
                self.workqueue.move_to_end(slowest, last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on machines without a GPU; `pytest -m gpu` selects them."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: (
        None
    )  # `kvist bench` would thaw these objects too, and every collection after it would be slow
    gc.enable()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo `setup_logging` after a test that calls it: pytest keeps every record of a level that is on, and the handler
    writes to a stream that is closed."""
    root, kvist = logging.getLogger(), logging.getLogger("kvist")
    handlers, levels = root.handlers[:], (root.level, kvist.level)
    yield
    added = [each for each in root.handlers if each not in handlers and not type(each).__module__.startswith("_pytest")]
    for handler in added:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    kvist.setLevel(levels[1])


@pytest.fixture(scope="session", autouse=True)
def configuration_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set a temporary configuration folder: processes of tests must not use the developer's cluster key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_tls_context() -> Iterator[None]:
    """Read the certificates once: each call of `httpx.get`, to http:// too, takes 23 ms of CPU for them otherwise, and
    a test that waits for a server makes many."""
    once = functools.cache(httpx.create_ssl_context)
    with mock.patch("httpx._transports.default.create_ssl_context", once):
        yield


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, for the pages of engines: on a disk, a process that writes to them may wait for seconds."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def mooncake_library() -> None:
    """Skip where Mooncake cannot run, with its reason."""
    if reason := library_obstacle():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def mooncake_pool(mooncake_library: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakePool]:  # noqa: ARG001
    """A pool with one store that all tests share: each has names of its own, and lets the processes run."""
    with MooncakePool(tmp_path_factory.mktemp("mooncake")) as pool:
        yield pool


@pytest.fixture(scope="module")
def started_stores(mooncake_library: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakePool]:  # noqa: ARG001
    with MooncakePool(tmp_path_factory.mktemp("stores"), num_stores=3) as pool:
        yield pool


@pytest.fixture
def breakable_pool(started_stores: MooncakePool) -> MooncakePool:
    """A master and three stores that run, which the test may kill and stop, and no dead store that the master knows."""
    started_stores.restore()
    return started_stores


@pytest.fixture(scope="session")
def transformers_smollm2() -> Any:
    """The embedded SmolLM2 GGUF as loaded by transformers, in fp32. Takes about ten seconds, once per session."""
    import gguf
    import torch
    import transformers

    path = find_checkpoint(None).path
    # transformers parses the file twice and rebuilds the map of names for each tensor, which takes half of the time.
    with (
        mock.patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch("gguf.get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.fixture
def as_unprivileged_user() -> Iterator[None]:
    """Run the test as an unprivileged user, because root may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    if user == 0:
        os.seteuid(0)
