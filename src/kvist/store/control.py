"""Opens, attaches and detaches stores while the engine serves.

    DETACHED ──attach──► ATTACHING ──opened──► ATTACHED ──detach──► DETACHING ──its calls have returned──► DETACHED
                             └──cannot be opened, or detached meanwhile──► DETACHED

Opening a store may scan a disk, so it is done in a separate thread; the store named by the flags is opened before the
engine is ready. If that store cannot be reached, the engine serves without it, and opening is tried again every
`RETRY_S` until it succeeds, or a client detaches the store or attaches another. The scheduler receives a
`StorageAttached` event when a store is attached, and when it is detached. After `DETACH_TIMEOUT_S` the control stops
waiting for the calls of a detached store; their host pages stay in flight until the calls return. mover.py copies the
pages. This file does not know the kinds of stores.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import msgspec

from kvist import wire
from kvist.clock import Clock
from kvist.door import Given
from kvist.errors import ConfigError, Conflict, KvistError, RequestError, StoreError, StoreUnreachable
from kvist.plan.tiers import StorageAttached, StoreJob, StoreReport
from kvist.store import STORES
from kvist.store.backend import PageStore, StoreContext, StoreOptions, StoreStats
from kvist.store.config import PREFIX, StorageConfig
from kvist.store.mover import StoreMover

DETACH_TIMEOUT_S = 5.0
RETRY_S = 5.0  # between two tries to open the store of the flags
MAX_HUNG_STORES = 2  # detached stores with a hung call, or that hang while being opened; each keeps threads and pages
_GB = 10**9

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChoice:
    """A store to attach."""

    backend: str  # a row of STORES
    options: StoreOptions  # resolved

    def given(self) -> Given:
        return cast(Given, dataclasses.asdict(self.options))  # type: ignore[call-overload]


_Caller = tuple[bytes, str]  # (gateway, id of its call)


class _Opening:
    """A store that is being opened. Mutable; its thread sets `outcome`, the loop sets `abandoned`, under `lock`."""

    def __init__(self, choice: StoreChoice, caller: _Caller | None) -> None:
        self.choice = choice
        self.caller = caller  # None: the store of the flags
        self.outcome: tuple[PageStore, StoreStats] | KvistError | None = None
        self.abandoned = False
        self.lock = threading.Lock()


@dataclass(slots=True)
class _Awaited:
    """The store of the flags, which could not be opened yet. Mutable; owned by the control."""

    choice: StoreChoice
    problem: str
    next_try_s: float


@dataclass(slots=True)
class _Detaching:
    """A detached store with calls under way. Mutable; owned by the control."""

    callers: list[_Caller]
    deadline_s: float
    is_over: threading.Event


class StorageControl:
    """Mutable; owned by the engine loop. `wakeup` may be called by any thread."""

    def __init__(
        self,
        mover: StoreMover,
        config: StorageConfig,
        context: StoreContext,
        wrap: Callable[[PageStore, str, Given, StoreContext], PageStore],
        *,
        wakeup: Callable[[], None],
        clock: Clock,
    ) -> None:
        """`wrap`: puts another store around an opened one, which has this backend and these options."""
        self._mover = mover
        self._config = config
        self._context = context
        self._wrap = wrap
        self._wakeup = wakeup
        self._clock = clock
        self._attached: StoreChoice | None = None
        self._awaited: _Awaited | None = None
        self._opening: _Opening | None = None
        self._abandoned: list[_Opening] = []
        self._detaching: _Detaching | None = None
        self._events: list[StorageAttached] = []
        self._answers: list[tuple[bytes, wire.StorageAnswer]] = []

    def open_configured(self) -> None:
        """Open and attach the store named by the flags, if any; a store that cannot be reached now, later. Raises
        `ConfigError` if the store can never be opened."""
        if self._config.hicache_storage_backend is None:
            return
        try:
            choice = self._resolve_choice(wire.AttachStore())  # only the flags
            try:
                self._attach(choice, *self._open(choice))
            except StoreUnreachable as error:
                self._await(choice, error)
        except KvistError as error:
            param = PREFIX + (error.param or "backend")
            raise ConfigError(f"--{param.replace('_', '-')}: {error.message}", param=param) from error

    def start(self, job: StoreJob) -> None:
        self._mover.start(job)

    def poll(self) -> list[StoreReport | StorageAttached]:
        """Return the events since the last call."""
        reports = self._mover.poll()
        self._end_opening()
        self._try_awaited()
        self._end_detaching()
        events, self._events = self._events, []
        return [*reports, *events]

    def on_command(self, identity: bytes, call: wire.StorageCommand) -> None:
        """Carry out the command of a gateway. `answers` returns the answer, perhaps later."""
        caller = identity, call.call_id
        try:
            match call.action:
                case "status":
                    self._answer(caller)
                case "attach":
                    self._begin_attach(caller, call.store)
                case "detach":
                    self._begin_detach(caller)
        except KvistError as error:
            self._refuse(caller, error)

    def answers(self) -> list[tuple[bytes, wire.StorageAnswer]]:
        """Return the answers since the last call, each as (gateway, message)."""
        answers, self._answers = self._answers, []
        return answers

    def status(self, note: str = "") -> wire.StorageStatus:
        chosen = self._attached or next((each.choice for each in (self._opening, self._awaited) if each), None)
        stats = self._mover.stats()
        return wire.StorageStatus(
            backend=None if chosen is None else chosen.backend,
            options={} if chosen is None else cast(dict[str, wire.StoreOptionValue], chosen.given()),
            prefetch_policy=self._config.hicache_storage_prefetch_policy,
            state=self._state(),
            breaker=self._mover.breaker().value,
            num_quarantined_pages=self._mover.num_quarantined_pages(),
            stored_bytes=0 if stats is None else stats.stored_bytes,
            errors=self._mover.errors(),
            note=note or ("" if self._awaited is None else self._awaited.problem),
            pool=None if stats is None or stats.watched_pool is None else stats.watched_pool(),
            location="" if chosen is None else f"{chosen.backend}:{chosen.options.location}",
        )

    def totals(self) -> dict[str, float]:
        return self._mover.totals()

    def close(self) -> bool:
        """Close the store. Return False if a call of the store hangs: it may still write into the host pool."""
        if self._opening is not None:
            self._abandon(self._opening)
        return self._mover.close()

    # ------------------------------------------------------------ attach and detach

    def _begin_attach(self, caller: _Caller, request: wire.AttachStore) -> None:
        choice = self._resolve_choice(request)
        if self._attached == choice:
            self._answer(caller)
        elif self._attached is not None:
            raise Conflict(f"{self._attached.options} is attached already: detach it first (DELETE)", param="backend")
        elif self._is_opening_for_client() or self._detaching is not None:
            raise Conflict("a store is being attached or detached: try again later", param="backend")
        elif self._mover.num_detached() + self._num_hung_opens() >= MAX_HUNG_STORES:
            raise Conflict(
                f"{MAX_HUNG_STORES} detached stores still have hung calls: fix the stores, or restart the worker",
                param="backend",
            )
        else:
            if self._opening is not None:
                self._abandon(self._opening)
            self._begin_opening(choice, caller)

    def _begin_opening(self, choice: StoreChoice, caller: _Caller | None) -> None:
        opening = self._opening = _Opening(choice, caller)
        threading.Thread(target=self._open_in_thread, args=(opening,), name="kvist-store-open", daemon=True).start()

    def _await(self, choice: StoreChoice, error: KvistError) -> None:
        """Try again later to open the store of the flags."""
        if self._awaited is None or self._awaited.problem != error.message:
            logger.warning("storage tier: %s; serving without it, next try in %g s", error.message, RETRY_S)
        self._awaited = _Awaited(choice, error.message, self._clock.now_s() + RETRY_S)

    def _try_awaited(self) -> None:
        awaited = self._awaited
        if awaited is None or self._opening is not None or self._detaching is not None:
            return
        if self._clock.now_s() >= awaited.next_try_s:
            self._begin_opening(awaited.choice, None)

    def _begin_detach(self, caller: _Caller) -> None:
        self._awaited = None
        if self._opening is not None:
            self._abandon(self._opening)
            if self._opening.caller is not None:
                self._refuse(self._opening.caller, Conflict("the store was detached while it was being opened"))
            self._opening = None
        if self._attached is not None:
            logger.info("storage tier: %s is detached", self._attached.options)
            is_over = self._mover.detach()
            self._attached = None
            self._events.append(StorageAttached(attached=False))
            self._detaching = _Detaching([], self._clock.now_s() + DETACH_TIMEOUT_S, is_over)
        if self._detaching is None:
            self._answer(caller)
        else:
            self._detaching.callers.append(caller)

    def _end_opening(self) -> None:
        opening = self._opening
        if opening is None or opening.outcome is None:
            return
        self._opening, caller, outcome = None, opening.caller, opening.outcome
        if not isinstance(outcome, KvistError):
            self._attach(opening.choice, *outcome)
            if caller is not None:
                self._answer(caller)
        elif caller is None:
            self._await(opening.choice, outcome)
        else:
            self._refuse(caller, RequestError(outcome.message, param=outcome.param or "backend"))

    def _end_detaching(self) -> None:
        detaching = self._detaching
        if detaching is None:
            return
        is_over = detaching.is_over.is_set()
        if is_over or self._clock.now_s() >= detaching.deadline_s:
            self._detaching = None
            for caller in detaching.callers:
                self._answer(caller, note="" if is_over else "detached, but a call of the store hangs")

    def _attach(self, choice: StoreChoice, store: PageStore, stats: StoreStats) -> None:
        logger.info("storage tier: %s, %.2f GB in use", choice.options, stats.stored_bytes / _GB)
        self._mover.attach(store, stats)
        self._attached, self._awaited = choice, None
        self._events.append(StorageAttached(attached=True))

    def _resolve_choice(self, request: wire.AttachStore) -> StoreChoice:
        """Return the store that the request and the flags describe. Raises `RequestError` that names the option."""
        config = self._config
        policy = config.hicache_storage_prefetch_policy
        if request.prefetch_policy not in (None, policy):
            raise RequestError(
                f"the prefetch policy of this worker is {policy}: omit the field, or start the worker with "
                f"--hicache-storage-prefetch-policy {request.prefetch_policy!r}",
                param="prefetch_policy",
            )
        name = request.backend or config.hicache_storage_backend
        if name is None or name not in STORES:
            named = "no store is named" if name is None else f"{name!r} is not a store"
            raise RequestError(f"{named}: known are {', '.join(STORES)}", param="backend")
        row = STORES[name]
        flags = config.hicache_storage_options if name == config.hicache_storage_backend else {}
        try:
            configured: StoreOptions = row.options(**flags)
            if not request.options:
                return StoreChoice(backend=name, options=configured.resolved())
            requested = _checked(name, row.options, request.options)
            return StoreChoice(backend=name, options=configured.with_request(requested, config.hicache_storage_roots))
        except ConfigError as error:
            raise RequestError(error.message, param=error.param) from error

    def _open(self, choice: StoreChoice) -> tuple[PageStore, StoreStats]:
        store = STORES[choice.backend].make(choice.given(), self._context)
        store = self._wrap(store, choice.backend, choice.given(), self._context)
        return store, store.stats()

    def _open_in_thread(self, opening: _Opening) -> None:
        outcome: tuple[PageStore, StoreStats] | KvistError
        try:
            outcome = self._open(opening.choice)
        except KvistError as error:
            outcome = error
        except Exception as error:  # a bug of the store or its library: the caller needs an answer
            logger.exception("cannot open %s", opening.choice.options)
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

    def _is_opening_for_client(self) -> bool:
        return self._opening is not None and self._opening.caller is not None

    def _num_hung_opens(self) -> int:
        self._abandoned = [each for each in self._abandoned if each.outcome is None]
        return len(self._abandoned)

    def _state(self) -> str:
        if self._opening is not None or (self._awaited is not None and self._detaching is None):
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


def _checked(backend: str, options: type, requested: Mapping[str, wire.StoreOptionValue]) -> Given:
    """Return the requested options. Raises `RequestError` for a name or a type that the backend does not know."""
    hints = typing.get_type_hints(options)
    for name, value in requested.items():
        if name not in hints:
            raise RequestError(f"the {backend} store has no option {name!r}: known are {', '.join(hints)}", param=name)
        try:
            msgspec.convert(value, hints[name])
        except msgspec.ValidationError as error:
            raise RequestError(f"{name} of the {backend} store: {error}", param=name) from error
    return requested
