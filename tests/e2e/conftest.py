"""One cluster of real processes for the tests that use it: prefill, decode, unified, router.

Its model has two layers with random weights, and the tokenizer of the embedded model: what these tests claim depends on
tokens, their order and their logprobs (`logprobs_of` computes them by itself), and not on what a text says. The tests
that start processes of their own run before it starts, and it ends with the last test of this folder.
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
from torch import Tensor

from kvist.checkpoint import find_checkpoint
from kvist.cluster.config import ClusterConfig
from kvist.cluster.plan import ClusterShape, plan_on_free_ports
from kvist.cluster.ports import free_ports
from kvist.cluster.processes import ChildTimeouts, Processes
from kvist.supervisor.child import ChildPlan
from kvist.supervisor.probe import probe_child
from kvist.testing.tiny_model import write_tiny_model
from kvist.testing.tokenizers import write_byte_tokenizer
from kvist.testing.waits import wait_until
from kvist.text import load_tokenizer
from tests.conftest import FILES_WITH_OWN_PROCESSES
from tests.models.tiny_models import hf_checkpoint, load_tiny, logits_of

START_TIMEOUT_S = 240.0  # on a busy machine
STALL_RESTART_S = 8.0  # short enough for a test, long enough for a busy machine
MODEL = "tiny"
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


def metrics_of(url: str) -> list[str]:
    return httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text.splitlines()


def sum_of(lines: list[str], name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    total = 0.0
    for line in lines:
        match = re.fullmatch(r"([^{ ]+)(\{.*\})? (\S+)", line) if line.startswith(name) else None
        if match and match[1] == name and all(f'{key}="{value}"' in (match[2] or "") for key, value in labels.items()):
            total += float(match[3])
    return total


def metric_of(url: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    return sum_of(metrics_of(url), name, **labels)


def _num_running(lines: list[str]) -> float:
    names = ("kvist:gateway_requests_in_flight", "kvist:num_requests_running", "kvist:num_requests_waiting")
    return sum(sum_of(lines, name) for name in names)


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
        return _num_running(metrics_of(self.router))

    def num_pages(self, state: str) -> float:
        return self.metric("kvist:kv_pages", state=state)

    def wait_idle(self) -> None:
        def is_idle() -> bool:
            lines = metrics_of(self.router)
            num_held = sum(sum_of(lines, "kvist:kv_pages", state=state) for state in ("in_flight", "owned"))
            return _num_running(lines) + num_held == 0

        self.wait_until(is_idle, within_s=60)

    def wait_until(self, condition: Callable[[], bool], *, within_s: float) -> float:
        """Wait until the condition holds and return the seconds; fail the test after a timeout. A process that does not
        answer, because it is about to be restarted, does not fulfil a condition yet."""

        def holds() -> bool:
            try:
                return condition()
            except httpx.TransportError:
                return False

        return wait_until(holds, lambda: "the last lines:\n" + "\n".join(self.lines[-60:]), within_s=within_s)

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
def worded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model of `cluster`: its tokens are words and parts of words."""
    folder = tmp_path_factory.mktemp("worded")
    backend = load_tokenizer(find_checkpoint(None))._backend
    backend.save(str(folder / "tokenizer.json"))
    return write_tiny_model(folder, vocab_size=backend.get_vocab_size(), max_model_len=16_384)


@pytest.fixture(scope="package")
def logprobs_of(worded_model: Path) -> Callable[[list[int]], Tensor]:
    """A function that returns the logprobs [num_tokens, vocab_size] after each token, computed without a cache."""
    model = load_tiny(hf_checkpoint(worded_model), load_format="dummy")
    return lambda token_ids: logits_of(model, token_ids).float().log_softmax(dim=-1)


@pytest.fixture(scope="package")
def cluster(worded_model: Path) -> Iterator[Cluster]:
    lines: list[str] = []
    model = (f"--model-path={worded_model}", f"--served-model-name={MODEL}", f"--chat-template={TOOL_TEMPLATE}")
    worker_argv = (*model, "--load-format=dummy", *WORKER_ARGV)
    plans = plan_on_free_ports(
        ClusterShape(
            config=ClusterConfig(prefill=1, decode=1),
            router_port=0,
            worker_argv=worker_argv,
            router_argv=model,
        )
    )
    port = free_ports(1)[0]
    serve = (sys.executable, "-m", "kvist", "serve", "--stop-with-stdin", "--num-threads=1", f"--port={port}")
    plans.append(
        ChildPlan(
            name="unified",
            argv=(*serve, *worker_argv),
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
    """Yield the cluster: ready before the test; ready, idle and without pages in flight after the test."""
    cluster.wait_ready()
    yield cluster
    cluster.wait_ready()  # also after a test that failed with its processes suspended
    cluster.wait_idle()
