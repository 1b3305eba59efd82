"""One cluster of real processes with the real model for the tests that use it: prefill, decode, unified, router.

The tests that start processes of their own run before it starts, and it ends with the last test of this folder.
The same code as in `kvist up` starts, supervises and restarts it.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvist.cluster.config import ClusterConfig
from kvist.cluster.plan import ClusterShape, plan_on_free_ports
from kvist.cluster.ports import free_ports
from kvist.cluster.probe import probe_child
from kvist.cluster.processes import ChildTimeouts, Processes
from kvist.supervisor.child import ChildPlan
from kvist.testing.tiny_model import write_tiny_model
from kvist.testing.tokenizers import write_byte_tokenizer
from kvist.testing.waits import wait_until
from tests.conftest import FILES_WITH_OWN_PROCESSES

START_TIMEOUT_S = 240.0  # on a busy machine
STALL_RESTART_S = 8.0  # short enough for a test, long enough for a busy machine
WORKER_ARGV = ("--max-total-tokens=16384", f"--stall-restart-s={STALL_RESTART_S}")


# The template of the embedded model, which shows no tools, with a place for them.
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\nReply with <tool_call></tool_call>.\n{% endfor %}"
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _is_ready(url: str) -> bool:
    """Return whether `GET /ready` answers 200. Never raises; takes about one second at most."""
    try:
        return httpx.get(f"{url}/ready", timeout=1.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


@pytest.fixture
def is_ready() -> Callable[[str], bool]:
    return _is_ready


def metric_of(url: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    total = 0.0
    for line in httpx.get(f"{url}/metrics", timeout=60).text.splitlines():
        match = re.fullmatch(r"([^{ ]+)(\{.*\})? (\S+)", line)
        if match and match[1] == name and all(f'{key}="{value}"' in (match[2] or "") for key, value in labels.items()):
            total += float(match[3])
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Access to the running cluster for tests, with functions that wait for a state."""

    processes: Processes
    router: str  # URL
    prefill: str
    decode: str
    unified: str
    lines: list[str]

    def metric(self, name: str, *, url: str | None = None, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        return metric_of(url or self.router, name, **labels)

    def num_running(self) -> float:
        """Return the number of requests open at the gateway, running or waiting at an engine."""
        names = ("kvist:gateway_requests_in_flight", "kvist:num_requests_running", "kvist:num_requests_waiting")
        return sum(self.metric(name) for name in names)

    def num_pages(self, state: str) -> float:
        return self.metric("kvist:kv_pages", state=state)

    def wait_idle(self) -> None:
        self.wait_until(
            lambda: self.num_running() == 0 and self.num_pages("in_flight") == 0 and self.num_pages("owned") == 0,
            within_s=60,
        )

    def wait_until(self, condition: Callable[[], bool], *, within_s: float) -> float:
        """Wait until the condition holds and return the seconds; fail the test after a timeout."""
        return wait_until(condition, lambda: "the last lines:\n" + "\n".join(self.lines[-60:]), within_s=within_s)

    def wait_ready(self) -> None:
        """Wait until the router can serve with both of its workers: with decode alone it is ready, too. Unlike
        `Processes.wait_ready`, notices that the router lost a worker."""
        self.wait_until(
            lambda: _is_ready(self.router) and self.metric("kvist:workers", state="ready") == 2,
            within_s=START_TIMEOUT_S,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.nodeid.startswith("tests/e2e/")]
    for item in ours:
        item.add_marker(pytest.mark.e2e)
        item.add_marker(pytest.mark.timeout(480))
        if item.nodeid.startswith(FILES_WITH_OWN_PROCESSES) and "cluster" in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(f"{item.nodeid} uses `cluster`: take its file out of FILES_WITH_OWN_PROCESSES")
    shared = {item for item in ours if "cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item in shared)


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two layers and a tokenizer, for tests whose claims do not depend on the model: a token
    takes a few milliseconds, and a worker starts in half of the time. Its workers need `--load-format=dummy`."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_model(folder, vocab_size=write_byte_tokenizer(folder), max_model_len=32_768)


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    lines: list[str] = []
    plans = plan_on_free_ports(
        ClusterShape(
            config=ClusterConfig(prefill=1, decode=1),
            router_port=0,
            worker_argv=WORKER_ARGV,
            router_argv=(f"--chat-template={TOOL_TEMPLATE}",),
        )
    )
    port = free_ports(1)[0]
    serve = (sys.executable, "-m", "kvist", "serve", "--stop-with-stdin", "--num-threads=1", f"--port={port}")
    plans.append(
        ChildPlan(
            name="unified",
            argv=(*serve, f"--chat-template={TOOL_TEMPLATE}", *WORKER_ARGV),
            url=f"http://127.0.0.1:{port}",
        )
    )
    urls = {plan.name.removesuffix("-0"): plan.url for plan in plans}
    timeouts = ChildTimeouts(stall_restart_s=STALL_RESTART_S)
    with Processes(
        plans, probe=probe_child, sink=lambda name, line: lines.append(f"[{name}] {line}"), timeouts=timeouts
    ) as processes:
        processes.wait_ready(START_TIMEOUT_S)
        running = Cluster(processes=processes, lines=lines, **urls)
        running.wait_ready()
        yield running


@pytest.fixture
def settled(cluster: Cluster) -> Iterator[Cluster]:
    """Yield the cluster: ready before the test; idle and without pages in flight after the test."""
    cluster.wait_ready()
    yield cluster
    cluster.wait_idle()
