"""`kvist deploy run`: the pods of a manifest as processes of this machine, upgraded when the file changes.

Each pod has the folders, keys, grace periods and probes of its manifest. A change of images in the file is carried out
as RBG does it: a worker's process is replaced in place, with its address and its folders; where the manifest has a
surge, the new process is ready before the old one stops, and both have the same listening socket.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvist.cluster.announce import curl_example
from kvist.cluster.listener import bound_socket
from kvist.cluster.ports import LOOPBACK, free_ports
from kvist.cluster.processes import ChildTimeouts, Processes
from kvist.cluster.stop_requests import RETIRE, stop_with_parent
from kvist.cluster.up import Screen, interrupt_on_stop_signals, request_stop
from kvist.deploy.check import refuse_errors
from kvist.deploy.finding import ReadOptions
from kvist.deploy.manifest import Manifest, manifest_text_of, read_manifest
from kvist.deploy_run.plan import MAX_PODS, LocalCluster, LocalPod, Place, plan_local, updates
from kvist.errors import ConfigError, KvistError
from kvist.supervisor.child import ChildPlan, environment_of
from kvist.supervisor.probe import probe_child

_CHECK_S = 0.5  # between looks at the file
_LEAST_GRACE_S = 2.0  # from the end of preStop to the kill
_KEYS = ("api-key", "cluster-key", "pages-secret")
_SHARED_MEMORY = Path("/dev/shm")
_NUM_NETWORKS, _MARK_PORT = 256, 30000


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRun:
    """The inputs of a run. Raises `ConfigError`."""

    manifest: Path
    api_key: str | None  # of the clients; None: a random one
    claims: Mapping[str, Path]
    images: Mapping[str, str]  # image -> Python of its release
    start_timeout_s: float
    read_options: ReadOptions

    def python_of(self, image: str) -> str:
        return self.images.get(image, sys.executable)

    def read(self, text: str) -> Manifest:
        """Return the manifest. Raises `ConfigError` for one that would not work, on this machine as in a cluster."""
        manifest = read_manifest(text)
        refuse_errors(manifest, self.read_options)
        return manifest


def run_local(run: LocalRun, *, stop_with_stdin: bool = False) -> int:
    """Run the manifest until a stop is requested, then return 0. Raises `KvistError` if the start fails."""
    with contextlib.ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="kvist-deploy-")))
        in_memory = closing.enter_context(_memory_folder())
        values = {key: secrets.token_hex(32) for key in _KEYS}
        values["api-key"] = run.api_key or values["api-key"]
        network = closing.enter_context(_own_network())
        place = Place(folder=folder, memory_folder=in_memory, secret_values=values, claims=run.claims, network=network)
        cluster = plan_local(run.read(manifest_text_of(run.manifest)), place)
        _make_folders(cluster)
        fronts = {
            pod.name: closing.enter_context(bound_socket(pod.address, pod.port)) for pod in cluster.pods if pod.surges
        }
        return _Running(run, place, cluster, fronts).until_stopped(stop_with_stdin)


@contextlib.contextmanager
def _own_network() -> Iterator[str]:
    """Yield the beginning of loopback addresses that no other `kvist deploy run` of this machine uses meanwhile: of
    Linux, where all of 127.0.0.0/8 is loopback. Raises `ConfigError`."""
    for number in range(_NUM_NETWORKS):
        network = f"127.77.{number}."
        with socket.socket() as mark:
            try:
                mark.bind((f"{network}{MAX_PODS + 1}", _MARK_PORT))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise ConfigError(f"this machine has no loopback address {network}1: {error.strerror}") from error
            yield network
            return
    raise ConfigError(f"{_NUM_NETWORKS} manifests run on this machine already: stop one of them")


@contextlib.contextmanager
def _memory_folder() -> Iterator[Path]:
    parent = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="kvist-deploy-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_folders(cluster: LocalCluster) -> None:
    """Make the folders and files of the plan. Raises `ConfigError` for a folder of the user's that is missing."""
    for pod in cluster.pods:
        for folder in pod.folders:
            if not folder.exists_already:
                folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not folder.path.is_dir():
                raise ConfigError(f"{pod.name} needs the folder {folder.path}, which does not exist")
    for path, urls in cluster.discovery.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{url}\n" for url in urls), encoding="ascii")
    for path, value in cluster.secrets.items():
        path.touch(mode=0o600)
        path.write_text(value, encoding="ascii")


class _Running:
    """A manifest while it runs. Mutable: `cluster` is the last one that was applied."""

    def __init__(self, run: LocalRun, place: Place, cluster: LocalCluster, fronts: Mapping[str, socket.socket]) -> None:
        self._run, self._place, self._cluster, self._fronts = run, place, cluster, fronts
        self._screen = Screen()
        self._processes = Processes(
            [self._plan(pod) for pod in cluster.pods],
            probe=probe_child,
            sink=self._screen.show,
            timeouts=ChildTimeouts(
                drain_s=max(pod.grace_s for pod in cluster.pods),
                stall_restart_s=min(pod.liveness_s for pod in cluster.pods),
            ),
            lines_are_shown=True,
        )

    def until_stopped(self, stop_with_stdin: bool) -> int:
        if stop_with_stdin:
            longest_s = max(pod.grace_s for pod in self._cluster.pods)
            stop_with_parent(
                stop=lambda: request_stop(self._processes), hurry=self._processes.hurry, drain_s=3 * longest_s
            )  # router, workers, pool
        with interrupt_on_stop_signals(self._processes):
            try:
                self._start()
                self._follow()
            except KeyboardInterrupt:
                self._say("stopping: open requests may finish (a second signal cuts them)")
            finally:
                for front in self._fronts.values():
                    front.close()
                self._processes.stop()
        self._say("stopped")
        self._screen.flush()
        return 0

    def _say(self, text: str) -> None:
        self._screen.show("kvist", text)

    def _plan(self, pod: LocalPod) -> ChildPlan:
        """Return the process of the pod. A pod with a surge is probed at a port of its own, because the socket of its
        address belongs to two processes during an upgrade."""
        args, url, front = list(pod.args), pod.url, self._fronts.get(pod.name)
        if front is not None:
            (port,) = free_ports(1)
            url = f"http://{LOOPBACK}:{port}"
            args = [arg for arg in args if not arg.startswith(("--host=", "--port="))]
            args += [f"--host={LOOPBACK}", f"--port={port}", f"--listen-fd={front.fileno()}"]
        users = tuple(other.name for other in self._cluster.pods if pod.name in other.starts_after)
        return ChildPlan(
            name=pod.name,
            argv=(self._run.python_of(pod.image), "-m", "kvist", *args, "--stop-with-stdin"),
            url=url,
            starts_after=pod.starts_after,
            stops_before=() if users else pod.starts_after,
            stop_s=pod.grace_s,
            environ=dict(pod.environ),
            listen_fd=None if front is None else front.fileno(),
        )

    def _start(self) -> None:
        self._say(f"starting {len(self._cluster.pods)} pods of {self._run.manifest}")
        self._processes.start()
        self._processes.wait_ready(self._run.start_timeout_s)
        for pod in self._cluster.pods:
            self._say(f"{pod.name:<20} Ready  {pod.url:<26} {pod.image}")
        key = self._place.folder / "api-key"
        key.touch(mode=0o600)
        key.write_text(self._place.secret_values["api-key"], encoding="ascii")
        routers = [pod for pod in self._cluster.pods if pod.args[0] == "router"]
        if routers:
            self._say(f"ready at {routers[0].url}    (Ctrl-C stops everything; the API key is in {key}). Try:")
            self._say(curl_example(routers[0].url, key_file=key))
        self._say(f"a change of images in {self._run.manifest} is an upgrade")

    def _follow(self) -> None:
        """Carry out the changes of the file until a stop is requested."""
        applied = manifest_text_of(self._run.manifest)
        while True:
            time.sleep(_CHECK_S)
            try:
                text = manifest_text_of(self._run.manifest)
                if text == applied:
                    continue
                applied = text
                self._upgrade(plan_local(self._run.read(text), self._place))
            except KvistError as error:
                self._say(f"{self._run.manifest} is not applied: {error.message}")

    def _upgrade(self, wanted: LocalCluster) -> None:
        """Replace the pods whose image has changed, one by one. Raises `KvistError` at the first that does not come up:
        those after it keep their old image."""
        todo = updates(self._cluster, wanted)
        if not todo:
            self._say("no image has changed")
            return
        self._say(f"upgrading {len(todo)} pods")
        for pod in todo:
            began_s = time.monotonic()
            self._cluster = _with_pod(self._cluster, pod)  # also if it fails: the old image in the file is the way back
            (self._replace_by_surge if pod.name in self._fronts else self._replace_in_place)(pod)
            self._say(f"{pod.name} runs {pod.image}, after {time.monotonic() - began_s:.1f} s")
            time.sleep(pod.min_ready_s)
        self._say("upgraded")

    def _replace_in_place(self, pod: LocalPod) -> None:
        time.sleep(pod.update_grace_s)
        old = self._processes.children[pod.name]
        self._processes.end_one(old, within_s=pod.grace_s, before=lambda: self._run_pre_stop(pod, old.plan))
        child = self._processes.start_one(self._plan(pod))
        self._processes.wait_one(child, self._run.start_timeout_s)

    def _run_pre_stop(self, pod: LocalPod, plan: ChildPlan) -> None:
        """Run the command as a kubelet does: it may take the grace period, and its failure does not prevent the end."""
        if not pod.pre_stop:
            return
        argv = (plan.argv[0], "-m", *pod.pre_stop) if pod.pre_stop[0] == "kvist" else pod.pre_stop
        environ, what = environment_of(plan), f"{pod.name}: preStop ({' '.join(pod.pre_stop)})"
        limit_s = max(pod.grace_s - _LEAST_GRACE_S, 1.0)
        try:
            done = subprocess.run(argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s)
            problem = "" if not done.returncode else done.stderr.decode("utf-8", "replace").strip()[-500:]
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        self._say(f"{what} failed: {problem}" if problem else f"{what} has run")

    def _replace_by_surge(self, pod: LocalPod) -> None:
        child = self._processes.start_one(self._plan(pod))
        try:
            self._processes.wait_one(child, self._run.start_timeout_s)
        except KvistError:
            self._processes.end_one(child, within_s=pod.grace_s)
            raise
        old = self._processes.take_place(child)
        self._processes.end_one(old, word=RETIRE, within_s=pod.grace_s)


def _with_pod(cluster: LocalCluster, pod: LocalPod) -> LocalCluster:
    pods = tuple(pod if each.name == pod.name else each for each in cluster.pods)
    return LocalCluster(pods=pods, discovery=cluster.discovery, secrets=cluster.secrets)
