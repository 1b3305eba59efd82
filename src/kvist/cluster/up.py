"""`kvist up`: a router, prefill and decode workers on this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import FrameType

from kvist.cluster.announce import curl_example, shown_key
from kvist.cluster.leftovers import stop_and_clear
from kvist.cluster.lifeline import STOP_SIGNALS, obey_stdin, signal_ourselves, signals_to
from kvist.cluster.listener import bound_socket
from kvist.cluster.plan import ClusterShape, plan_on_free_ports
from kvist.cluster.probe import StartReport, ask
from kvist.cluster.processes import Patience, Processes, Sink
from kvist.output import output_to


def stop_signals(processes: Processes) -> contextlib.AbstractContextManager[None]:
    """Signals that ask for a stop end the body by `KeyboardInterrupt`; when the processes are stopping already, they
    shorten that."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if not processes.stopping:
            raise KeyboardInterrupt
        processes.hurry()

    return signals_to(interrupt, STOP_SIGNALS)


def run_up(shape: ClusterShape, *, stop_with_stdin: bool = False) -> int:
    """Returns when told to stop: 0. Raises `KvistError` when the cluster does not come up."""
    with bound_socket(shape.router_host, shape.router_port):
        pass  # a port that another server holds is said once, before anything starts
    width = max(len("decode-00"), len("prefill-00"))
    output = output_to(sys.stdout.fileno())

    def show(name: str, line: str) -> None:
        output.write(f"{name:<{width}} | {line}")

    patience = Patience(drain_s=shape.drain_s, stall_restart_s=shape.stall_restart_s)
    processes = Processes(plan_on_free_ports(shape), probe=ask, sink=show, patience=patience, lines_are_shown=True)
    with stop_signals(processes):
        try:
            _start_and_wait(processes, shape, show, stop_with_stdin)
        except KeyboardInterrupt:
            show("kvist", f"stopping: open requests have {shape.drain_s:g} s (a second signal cuts them)")
        finally:
            stop_and_clear(processes, shape.runtime_dir)
    show("kvist", "stopped")
    output.flush()
    return 0


def _stop(processes: Processes) -> None:
    if not processes.stopping:
        signal_ourselves()


def _start_and_wait(processes: Processes, shape: ClusterShape, show: Sink, stop_with_stdin: bool) -> None:
    if stop_with_stdin:
        # the router's requests, then those that workers have of other routers
        obey_stdin(stop=lambda: _stop(processes), hurry=processes.hurry, drain_s=2 * shape.drain_s)
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
