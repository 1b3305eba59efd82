"""`kvist up`: a router, prefill and decode workers on this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType

from kvist.cluster.announce import curl_example, shown_key
from kvist.cluster.lifeline import signals_to, stop_at_end_of_stdin
from kvist.cluster.plan import ClusterShape, plan_on_free_ports
from kvist.cluster.probe import StartReport, is_ready
from kvist.cluster.processes import Processes, Sink


def stop_signals() -> contextlib.AbstractContextManager[None]:
    """SIGINT, SIGTERM and SIGHUP (the terminal closed) end the body by `KeyboardInterrupt`.

    SIGINT too: a script's background process inherits it ignored, and `kill -INT` would do nothing."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return signals_to(interrupt, numbers)


def run_up(shape: ClusterShape, *, stop_with_stdin: bool = False) -> int:
    """Returns when told to stop: 0. Raises `KvistError` when the cluster does not come up."""
    width = max(len("decode-00"), len("prefill-00"))

    def show(name: str, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # our own reader left; the cluster runs on
            print(f"{name:<{width}} | {line}", flush=True)

    processes = Processes(plan_on_free_ports(shape), probe=is_ready, sink=show)
    with stop_signals():
        try:
            _start_and_wait(processes, shape, show, stop_with_stdin)
        except KeyboardInterrupt:
            show("kvist", "stopping")
        finally:
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C: the children see our end of the pipe close
                processes.stop()
    show("kvist", "stopped")
    return 0


def _start_and_wait(processes: Processes, shape: ClusterShape, show: Sink, stop_with_stdin: bool) -> None:
    if stop_with_stdin:
        stop_at_end_of_stdin()
    workers = f"{shape.config.prefill} prefill, {shape.config.decode} decode, {shape.config.unified} unified"
    show("kvist", f"starting a router and workers ({workers}), {shape.threads_per_worker} thread(s) each")
    processes.start()
    for name, child in processes.children.items():
        show("kvist", f"{name} is process {child.pid} at {child.plan.url}")
    processes.wait_ready(
        shape.config.start_timeout_s, each_second=StartReport(processes, lambda text: show("kvist", text))
    )
    url = processes.children["router"].plan.url
    show("kvist", f"ready at {url}    (Ctrl-C stops everything). Try:")
    show("kvist", curl_example(url, api_key=shown_key(shape.api_keys)))
    threading.Event().wait()
