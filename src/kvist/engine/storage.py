"""The engine's storage tier: opens, attaches and detaches stores while the engine serves.

    DETACHED ──attach──► ATTACHING ──opened──► ATTACHED ──detach──► DETACHING ──its calls returned──► DETACHED
                             └──cannot be opened, or detached meanwhile──► DETACHED

Opening a store may scan a disk, so a separate thread does it; the store named by the flags is opened before the engine
is ready. The scheduler receives a `StorageAttached` event when a store is attached and when it is detached. A detached
store whose calls hang is abandoned after `DETACH_TIMEOUT_S`: its host pages stay in flight until the calls return. The
pages themselves are moved by store/mover.py.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist import wire
from kvist.clock import Clock
from kvist.engine.config import STORAGE_BACKENDS, StorageConfig
from kvist.errors import ConfigError, Conflict, KvistError, RequestError, StoreError
from kvist.own_files import cache_folder
from kvist.plan.tiers import StorageAttached, StoreJob
from kvist.store import open_store
from kvist.store.backend import PageStore, StoreSpec, StoreStats
from kvist.store.mover import Report, StoreMover

DETACH_TIMEOUT_S = 5.0
MAX_HUNG_STORES = 2  # stores detached while a call, or their opening, hung; each keeps threads and host pages
_GB, _MAX_GB = 10**9, 10**9

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChoice:
    """A store to attach: its backend, folder and size."""

    backend: str
    path: Path | None
    size_gb: float


_Caller = tuple[bytes, str]  # (gateway, id of its call)


class _Opening:
    """A store that is being opened. Mutable; its thread sets `outcome`, the loop sets `abandoned`, under `lock`."""

    def __init__(self, choice: StoreChoice, caller: _Caller) -> None:
        self.choice = choice
        self.caller = caller
        self.outcome: tuple[PageStore, StoreStats] | KvistError | None = None
        self.abandoned = False
        self.lock = threading.Lock()


class EngineStorage:
    """Mutable; owned by the engine loop. `wakeup` may be called by any thread."""

    def __init__(
        self,
        mover: StoreMover,
        config: StorageConfig,
        *,
        namespace: str,
        page_bytes: int,
        wakeup: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._mover = mover
        self._config = config
        self._namespace = namespace
        self._page_bytes = page_bytes
        self._wakeup = wakeup
        self._clock = clock
        self._attached: StoreChoice | None = None
        self._opening: _Opening | None = None
        self._abandoned: list[_Opening] = []
        self._detaching: tuple[list[_Caller], float, threading.Event] | None = (
            None  # (callers that wait, deadline, whether done)
        )
        self._events: list[StorageAttached] = []
        self._answers: list[tuple[bytes, wire.StorageAnswer]] = []

    def open_configured(self) -> None:
        """Open the store named by the flags, before the engine is ready. Raises `ConfigError` if this fails."""
        if self._config.hicache_storage_backend is None:
            return
        try:
            choice = self._resolve_choice(wire.AttachStoreRequest())  # only the flags
            self._attach(choice, *self._open(choice))
        except KvistError as error:
            param = _param(error)
            raise ConfigError(f"--{param.replace('_', '-')}: {error.message}", param=param) from error

    def start(self, job: StoreJob) -> None:
        self._mover.start(job)

    def poll(self) -> list[Report | StorageAttached]:
        """Return the events since the last call."""
        reports = self._mover.poll()
        opening = self._opening
        if opening is not None and opening.outcome is not None:
            self._opening = None
            if isinstance(opening.outcome, KvistError):
                error = RequestError(opening.outcome.message, param=_param(opening.outcome))
                self._refuse(opening.caller, error)
            else:
                self._attach(opening.choice, *opening.outcome)
                self._answer(opening.caller)
        if self._detaching is not None:
            callers, deadline_s, over = self._detaching
            is_over = over.is_set()
            if is_over or self._clock.now_s() >= deadline_s:
                self._detaching = None
                for caller in callers:
                    self._answer(caller, note="" if is_over else "detached, but a call of the store hangs")
        events, self._events = self._events, []
        return [*reports, *events]

    def ask(self, identity: bytes, call: wire.StorageCommand) -> None:
        """Carry out a command. The answer appears in `answers`, possibly later."""
        caller = identity, call.call_id
        try:
            match call.action:
                case "status":
                    self._answer(caller)
                case "attach":
                    self._begin_attach(caller, call.wish)
                case "detach":
                    self._begin_detach(caller)
        except KvistError as error:
            self._refuse(caller, error)

    def answers(self) -> list[tuple[bytes, wire.StorageAnswer]]:
        """Return the answers since the last call, each as (gateway, message)."""
        answers, self._answers = self._answers, []
        return answers

    def status(self, note: str = "") -> wire.StorageStatus:
        chosen = self._attached or (None if self._opening is None else self._opening.choice)
        stats = self._mover.stats()
        return wire.StorageStatus(
            hicache_storage_backend=None if chosen is None else chosen.backend,
            hicache_storage_path=None if chosen is None or chosen.path is None else str(chosen.path),
            hicache_storage_size=self._config.hicache_storage_size if chosen is None else chosen.size_gb,
            hicache_storage_prefetch_policy=self._config.hicache_storage_prefetch_policy,
            state=self._state(),
            breaker=self._mover.breaker().value,
            num_quarantined_pages=self._mover.num_quarantined_pages(),
            stored_bytes=0 if stats is None else stats.stored_bytes,
            errors=self._mover.errors(),
            note=note,
        )

    def totals(self) -> dict[str, float]:
        return self._mover.totals()

    def close(self) -> bool:
        """Close the store; return False if a call of the store hangs and may still write into the host pool."""
        if self._opening is not None:
            self._abandon(self._opening)
        return self._mover.close()

    # ------------------------------------------------------------ attach and detach

    def _begin_attach(self, caller: _Caller, request: wire.AttachStoreRequest) -> None:
        choice = self._resolve_choice(request)
        if self._attached == choice:
            self._answer(caller)
        elif self._attached is not None:
            raise Conflict(
                f"{_describe(self._attached)} is attached already: detach it first (DELETE)",
                param="hicache_storage_backend",
            )
        elif self._opening is not None or self._detaching is not None:
            raise Conflict("a store is being attached or detached: try again later", param="hicache_storage_backend")
        elif self._mover.num_detached() + self._num_hung_opens() >= MAX_HUNG_STORES:
            raise Conflict(
                f"{MAX_HUNG_STORES} detached stores still have hung calls: fix the stores, or restart the worker",
                param="hicache_storage_backend",
            )
        else:
            opening = self._opening = _Opening(choice, caller)
            threading.Thread(target=self._open_in_thread, args=(opening,), name="kvist-store-open", daemon=True).start()

    def _begin_detach(self, caller: _Caller) -> None:
        if self._opening is not None:
            self._abandon(self._opening)
            self._refuse(self._opening.caller, Conflict("the store was detached while it was being opened"))
            self._opening = None
        if self._attached is not None:
            logger.info("storage tier: %s is detached", _describe(self._attached))
            over = self._mover.detach()
            self._attached = None
            self._events.append(StorageAttached(attached=False))
            self._detaching = [], self._clock.now_s() + DETACH_TIMEOUT_S, over
        if self._detaching is None:
            self._answer(caller)
        else:
            self._detaching[0].append(caller)

    def _attach(self, choice: StoreChoice, store: PageStore, stats: StoreStats) -> None:
        logger.info("storage tier: %s, %.2f GB in use", _describe(choice), stats.stored_bytes / _GB)
        self._mover.attach(store, stats)
        self._attached = choice
        self._events.append(StorageAttached(attached=True))

    def _resolve_choice(self, request: wire.AttachStoreRequest) -> StoreChoice:
        """Return the store to attach, by the request and the flags. Raises `RequestError` naming the field."""
        policy = self._config.hicache_storage_prefetch_policy
        if request.hicache_storage_prefetch_policy not in (None, policy):
            raise RequestError(
                f"the prefetch policy of this worker is {policy}: omit the field, or start the worker with "
                f"--hicache-storage-prefetch-policy {request.hicache_storage_prefetch_policy!r}",
                param="hicache_storage_prefetch_policy",
            )
        backend = request.hicache_storage_backend or self._config.hicache_storage_backend
        if backend not in STORAGE_BACKENDS:
            named = "no store is named" if backend is None else f"{backend!r} is not a store"
            known = ", ".join(STORAGE_BACKENDS)
            raise RequestError(f"{named}: known are {known}", param="hicache_storage_backend")
        if backend == "memory" and request.hicache_storage_path is not None:
            raise RequestError("a store in memory has no folder: omit the path", param="hicache_storage_path")
        path = None
        if backend == "file":
            path = self._default_folder()
            if request.hicache_storage_path is not None:
                path = requested_folder(
                    request.hicache_storage_path, self._config.hicache_storage_roots or (str(path),)
                )
        size_gb = (
            self._config.hicache_storage_size if request.hicache_storage_size is None else request.hicache_storage_size
        )
        if not 0 < size_gb < _MAX_GB:
            raise RequestError(
                f"a store of {size_gb:g} GB is not possible: the size must be at least one page of {self._page_bytes} "
                f"bytes, and less than {_MAX_GB} GB",
                param="hicache_storage_size",
            )
        return StoreChoice(backend=backend, path=path, size_gb=size_gb)

    def _default_folder(self) -> Path:
        """Return the folder named by the flags. Raises `RequestError` naming the field."""
        path = self._config.hicache_storage_path
        if path is None:
            return cache_folder() / "pages"
        if not path or not path.isprintable():
            raise RequestError(f"{path!r} is not the path of a folder", param="hicache_storage_path")
        return Path(os.path.realpath(os.path.expanduser(path)))

    def _open(self, choice: StoreChoice) -> tuple[PageStore, StoreStats]:
        secret_file = self._config.hicache_storage_secret_file
        spec = StoreSpec(
            namespace=self._namespace,
            page_bytes=self._page_bytes,
            capacity_bytes=int(choice.size_gb * _GB),
            path=choice.path,
            secret_path=None if secret_file is None else Path(os.path.expanduser(secret_file)),
        )
        store = open_store(choice.backend, spec)
        return store, store.stats()

    def _open_in_thread(self, opening: _Opening) -> None:
        outcome: tuple[PageStore, StoreStats] | KvistError
        try:
            outcome = self._open(opening.choice)
        except KvistError as error:
            outcome = error
        except Exception as error:  # a bug of the store or its library: the caller needs an answer
            logger.exception("cannot open %s", _describe(opening.choice))
            outcome = StoreError(f"the store cannot be opened: {type(error).__name__}: {error}")
        with opening.lock:
            opening.outcome = outcome
            if opening.abandoned and not isinstance(outcome, KvistError):
                outcome[0].close()
        self._wakeup()

    def _abandon(self, opening: _Opening) -> None:
        self._abandoned.append(opening)
        with opening.lock:
            opening.abandoned = True
            if opening.outcome is not None and not isinstance(opening.outcome, KvistError):
                opening.outcome[0].close()

    def _num_hung_opens(self) -> int:
        self._abandoned = [each for each in self._abandoned if each.outcome is None]
        return len(self._abandoned)

    def _state(self) -> str:
        if self._opening is not None:
            return "attaching"
        if self._detaching is not None:
            return "detaching"
        return "detached" if self._attached is None else "attached"

    def _answer(self, caller: _Caller, note: str = "") -> None:
        identity, call_id = caller
        self._answers.append((identity, wire.StorageAnswer(call_id=call_id, status=self.status(note))))

    def _refuse(self, caller: _Caller, error: KvistError) -> None:
        identity, call_id = caller
        refused = wire.StorageAnswer(call_id=call_id, error_code=error.code, message=error.message, param=error.param)
        self._answers.append((identity, refused))


def requested_folder(requested: str, roots: Sequence[str]) -> Path:
    """Return the folder named by an HTTP client, with links resolved; opens no file. Raises `RequestError` unless the
    folder is below one of the allowed folders, both as written and after links are resolved."""
    param = "hicache_storage_path"
    if not requested or not requested.isprintable() or not os.path.isabs(requested):
        raise RequestError(f"{requested!r} is not an absolute path: start the path with /", param=param)
    full_roots = [os.path.abspath(os.path.expanduser(root)) for root in roots]
    real_roots = [os.path.realpath(root) for root in full_roots]
    written = Path(os.path.normpath(requested))
    if any(map(written.is_relative_to, full_roots + real_roots)):
        folder = Path(os.path.realpath(requested))
        if any(map(folder.is_relative_to, real_roots)):
            return folder
    raise RequestError(
        f"{requested!r} is not below {' or '.join(full_roots)}: start the worker with a folder above it as "
        "--hicache-storage-roots",
        param=param,
    )


def _param(error: KvistError) -> str:
    """Return the field to blame: that of the error, else the folder for a store error and the size for any other."""
    return error.param or ("hicache_storage_path" if isinstance(error, StoreError) else "hicache_storage_size")


def _describe(choice: StoreChoice) -> str:
    place = "" if choice.path is None else f" in {choice.path}"
    return f"a {choice.backend} store{place} of at most {choice.size_gb:g} GB"
