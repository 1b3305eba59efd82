"""`kvist up`: a router, prefill and decode workers on this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

from kvist.cluster.announce import curl_example, shown_key
from kvist.cluster.leftovers import stop_and_clear
from kvist.cluster.listener import bound_socket
from kvist.cluster.plan import ROUTER, ClusterShape, plan_on_free_ports
from kvist.cluster.processes import ChildTimeouts, Processes
from kvist.cluster.start_display import StartBlock, start_display
from kvist.cluster.stop_requests import STOP_SIGNALS, handle_signals, signal_self, stop_with_parent
from kvist.output import output_to
from kvist.service_manager import notify_ready
from kvist.supervisor.probe import probe_child

Beside = Callable[[ClusterShape, Processes, Callable[[str], None]], contextlib.AbstractContextManager[None]]


def interrupt_on_stop_signals(processes: Processes) -> contextlib.AbstractContextManager[None]:
    """End the body by `KeyboardInterrupt` on a stop signal; if the processes are already stopping, hurry them."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if not processes.stopping:
            raise KeyboardInterrupt
        processes.hurry()

    return handle_signals(interrupt, STOP_SIGNALS)


class Screen:
    """Prints the lines of a cluster: in order, and during a start on a terminal above the changing lines."""

    def __init__(self) -> None:
        self._width = max(len("decode-00"), len("prefill-00"))
        self._output = output_to(sys.stdout.fileno())
        self._block: StartBlock | None = None

    def show(self, name: str, line: str) -> None:
        text = f"{name:<{self._width}} | {line}"
        block = self._block
        if block is None:
            self._output.write(text)
        else:
            block.pass_on(text)

    def wait_ready(self, processes: Processes, shape: ClusterShape) -> None:
        """Wait until the cluster is ready. Raises `KvistError` if the start fails."""
        with start_display(
            processes.children, lambda text: self.show("kvist", text), show_all=shape.shows_all_lines
        ) as display:
            self._block = display if isinstance(display, StartBlock) else None
            try:
                processes.wait_ready(shape.config.start_timeout_s, each_second=display)
            finally:
                self._block = None

    def flush(self) -> None:
        self._output.flush()


def run_up(shape: ClusterShape, *, beside: Beside, stop_with_stdin: bool = False) -> int:
    """Run the cluster until a stop is requested, then return 0. `beside` runs while the cluster is ready. Raises
    `KvistError` if the start fails."""
    with bound_socket(shape.router_host, shape.router_port) as front:  # in use: one error, before any process starts
        shape = replace(shape, router_port=front.getsockname()[1], front_fd=front.fileno())
        return _run_behind(front, shape, beside, stop_with_stdin)


def _run_behind(front: socket.socket, shape: ClusterShape, beside: Beside, stop_with_stdin: bool) -> int:
    if shape.pool is not None:
        shape.pool.make_folders()
    screen = Screen()
    processes = Processes(
        plan_on_free_ports(shape),
        probe=probe_child,
        sink=screen.show,
        timeouts=ChildTimeouts(drain_s=shape.drain_s, stall_restart_s=shape.stall_restart_s),
        lines_are_shown=shape.shows_all_lines or not sys.stdout.isatty(),
    )
    with interrupt_on_stop_signals(processes):
        try:
            _start(processes, shape, screen, stop_with_stdin)
            with beside(shape, processes, lambda text: screen.show("kvist", text)):
                threading.Event().wait()
        except KeyboardInterrupt:
            screen.show(
                "kvist", f"stopping: open requests may finish within {shape.drain_s:g} s (a second signal cuts them)"
            )
        finally:
            front.close()  # with the router, which has it too, the address is free
            stop_and_clear(processes, shape.runtime_dir)
    screen.show("kvist", "stopped")
    screen.flush()
    return 0


def request_stop(processes: Processes) -> None:
    """Ask this process to stop, for its parent. Safe on any thread."""
    if not processes.stopping:
        signal_self()


def _start(processes: Processes, shape: ClusterShape, screen: Screen, stop_with_stdin: bool) -> None:
    if stop_with_stdin:
        # the router's open requests, then the workers' open requests of other routers
        stop_with_parent(stop=lambda: request_stop(processes), hurry=processes.hurry, drain_s=shape.stop_s)
    config = shape.config
    workers = f"{config.prefill} prefill, {config.decode} decode, {config.unified} unified"
    pool = "" if shape.pool is None else f"a page pool (master, {shape.pool.num_stores} stores), "
    screen.show("kvist", f"starting {pool}a router and workers ({workers}), {shape.threads_per_worker} thread(s) each")
    processes.start()
    screen.wait_ready(processes, shape)
    for name, child in processes.children.items():
        if name != ROUTER:
            screen.show("kvist", f"{name} is process {child.pid} at {child.plan.url}")
    notify_ready(shape.url)
    screen.show("kvist", f"ready at {shape.url}    (Ctrl-C stops everything). Try:")
    screen.show("kvist", curl_example(shape.url, api_key=shown_key(shape.api_keys)))
