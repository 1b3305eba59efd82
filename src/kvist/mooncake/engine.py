"""The TransferEngine of this process, its users, and the memory that they have registered.

A process has one engine for all its users: each engine has ports, threads and connections of its own, and the library
refuses to register memory twice.

    open_engine(network, user) ─► MooncakeEngine     a user's share of the engine; the first user starts it
        .register(address, num_bytes)                counted: memory that another user has registered stays so
        .begin_write(...).wait() .read(...) .for_store()
        .close()                                     after the user's last call; the engine waits for another user

A failed call may leave bytes under way (memory/page_window.py). A write is complete only when the bytes are in the
peer's memory: this rests on the status frames of the library, which `requirements.load` keeps on. A receiver refuses
addresses outside its registered memory. After a failure the library asks the peer again where it is (`PeerNames`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from kvist.errors import ConfigError, EngineError
from kvist.mooncake.requirements import Network, User, load, obstacle

TRANSFER_TIMEOUT_S = 30.0  # the library fails a transfer without progress after two seconds
_SHORTEST_NAP_S, _LONGEST_NAP_S = 50e-6, 1e-3
_REFUSED = (0, -1, 2**64 - 1)
_AT_ONCE_S = 0.5  # a copy that fails sooner has not waited for a silent peer
_NUM_NAMES = 64  # of one peer
PIECES_AT_ONCE = 4  # reads from one peer; a larger number is not faster, and takes longer if the peer has stopped


@dataclass(slots=True)
class _Range:
    """Registered memory [start, end). Mutable, under the lock of its `_Running`."""

    start: int
    end: int
    num_users: int = 1


class PeerNames:
    """The names by which the library knows peers. Thread-safe.

    The library remembers for as long as it runs where the peer of a name was, and would never reach a peer that has
    started again at the port of a dead one. Leading zeros of the port are another name of the same address, for which
    the library asks the peer again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_zeros: dict[str, int] = {}  # by session

    def of(self, session: str) -> str:
        with self._lock:
            num_zeros = self._num_zeros.get(session, 0)
        host, _, port = session.rpartition(":")
        return f"{host}:{'0' * num_zeros}{port}"

    def forget(self, name: str) -> None:
        """Use this name no longer: a copy has failed with it."""
        host, _, port = name.rpartition(":")
        session = f"{host}:{port.lstrip('0')}"
        num_zeros = len(name) - len(session)
        with self._lock:
            if self._num_zeros.get(session, 0) == num_zeros:  # and no other copy has failed with it
                self._num_zeros[session] = (num_zeros + 1) % _NUM_NAMES


class _Running:
    """The library's engine. Its calls release Python's lock. Thread-safe."""

    def __init__(self, network: Network, user: User) -> None:
        """Raises `ConfigError` if Mooncake cannot run here."""
        if reason := obstacle(network, user):
            raise ConfigError(reason)
        library = load("mooncake.engine").TransferEngine()
        if library.initialize(network.host, "P2PHANDSHAKE", network.protocol, ",".join(network.devices)):
            raise ConfigError(f"Mooncake cannot start at {network}: see its lines in the log")
        self.library = library
        self.network = network
        host = f"[{network.host}]" if ":" in network.host else network.host
        self.session = f"{host}:{library.get_rpc_port()}"
        self.users: list[User] = []
        self._lock = threading.Lock()
        self._ranges: list[_Range] = []
        self._abandoned: list[int] = []
        self.peers = PeerNames()

    def share(self, user: User) -> MooncakeEngine:
        with self._lock:
            self.users.append(user)
        return MooncakeEngine(self, user)

    def leave(self, user: User) -> None:
        with self._lock:
            self.users.remove(user)

    def abandon(self, pieces: Iterable[int]) -> None:
        """Release the library's records of pieces for which no caller waits, as soon as they have ended."""
        with self._lock:
            self._abandoned += pieces
            self._abandoned = [each for each in self._abandoned if self.library.transfer_check_status(each) == 0]

    def register(self, start: int, end: int) -> _Range:
        with self._lock:  # held while the library pins memory for RDMA
            for held in self._ranges:
                if held.start <= start and end <= held.end:
                    held.num_users += 1
                    return held
                if start < held.end and held.start < end:
                    raise EngineError("memory is registered in part already: register the whole of it first")
            if self.library.register_memory(start, end - start):
                raise EngineError(f"Mooncake cannot register {end - start} bytes; with RDMA, raise `ulimit -l`")
            self._ranges.append(_Range(start, end))
            return self._ranges[-1]

    def unregister(self, held: _Range) -> None:
        with self._lock:
            held.num_users -= 1
            if not held.num_users:
                self._ranges.remove(held)
                self.library.unregister_memory(held.start)


class Pieces(Protocol):
    """The library's records of pieces under way."""

    library: Any
    peers: PeerNames

    def abandon(self, pieces: Iterable[int]) -> None: ...


class Transfer:
    """Pieces that are being copied from or to one peer. Used by one thread.

    The library's own blocking calls poll without a pause: on two cores, copies are 1.7 times as fast if their caller
    sleeps instead, and use half the time of the CPU (docs/benchmarks.md)."""

    def __init__(self, running: Pieces, peer: str, pieces: Sequence[int]) -> None:
        """`peer`: its name. `pieces`: the library's numbers for them; `_REFUSED` for those that did not begin."""
        self._running = running
        self._peer = peer
        self._under_way = deque(piece for piece in pieces if piece not in _REFUSED)
        self._is_whole = len(self._under_way) == len(pieces)

    def wait(self) -> bool:
        """Return when all pieces have ended, or when one has failed. True: all bytes are in place. False: part of them
        may be there, and others may still arrive, or still be read from our memory. Takes `TRANSFER_TIMEOUT_S` at most.
        """
        start_s = time.monotonic()
        while self._is_whole and self._under_way:
            status = self._running.library.transfer_check_status(self._under_way[0])
            if status > 0:
                self._under_way.popleft()
                continue
            waited_s = time.monotonic() - start_s
            if status < 0 or waited_s > TRANSFER_TIMEOUT_S:
                self._is_whole = False
                if status < 0:
                    self._under_way.popleft()
                break
            time.sleep(min(max(waited_s / 16, _SHORTEST_NAP_S), _LONGEST_NAP_S))
        self.abandon()
        if not self._is_whole:
            self._running.peers.forget(self._peer)
        return self._is_whole

    def abandon(self) -> None:
        """Wait for no further piece."""
        self._running.abandon(self._under_way)
        self._under_way.clear()


class Reads:
    """Reads of many pieces from one peer, few at a time, each of which ends before `advance` returns False.

    After a failure no further piece begins. Pieces under way are waited for, because bytes may still arrive in their
    memory; with few pieces, a peer that has stopped takes no more than the limit of one copy (requirements.py)."""

    def __init__(self, running: Pieces, peer: str, pieces: Sequence[Callable[[], int]]) -> None:
        """`peer`: its name. `pieces`: each begins a read, and returns the library's number for it."""
        self._running = running
        self._peer = peer
        self._left = deque(pieces)
        self._under_way: list[int] = []
        self.is_whole = True  # no piece has failed so far
        self.num_ended = 0

    def advance(self) -> bool:
        """Begin and end what can begin and end now. Return whether a piece is under way."""
        under_way = []
        for piece in self._under_way:
            status = self._running.library.transfer_check_status(piece)
            if status == 0:
                under_way.append(piece)
                continue
            self.num_ended += 1
            self.is_whole = self.is_whole and status > 0
        while self.is_whole and self._left and len(under_way) < PIECES_AT_ONCE:
            piece = self._left.popleft()()
            if piece in _REFUSED:
                self.is_whole = False
            else:
                under_way.append(piece)
        if not self.is_whole:
            self._running.peers.forget(self._peer)
        self._under_way = under_way
        return bool(under_way)


def end_all(reads: Iterable[Reads], on_ended: Callable[[Reads], None]) -> None:
    """Carry out reads from several peers at once; call `on_ended` for each when it has ended. The wait has no limit
    other than the library's: the memory must not be reused before, and is in quarantine meanwhile
    (store/quarantine.py)."""
    left, num_ended, changed_s = list(reads), 0, time.monotonic()
    while left:
        is_over = [not each.advance() for each in left]
        for each, over in zip(left, is_over, strict=True):
            if over:
                on_ended(each)
        before, num_ended = num_ended, sum(each.num_ended for each in left)
        left = [each for each, over in zip(left, is_over, strict=True) if not over]
        now_s = time.monotonic()
        if num_ended != before:
            changed_s = now_s
        if left:
            time.sleep(min(max((now_s - changed_s) / 16, _SHORTEST_NAP_S), _LONGEST_NAP_S))


class MooncakeEngine:
    """One user's share of an engine. Thread-safe, except for `close`."""

    def __init__(self, running: _Running, user: User) -> None:
        self._running: _Running | None = running
        self._user = user
        self._registered: dict[int, _Range] = {}  # by the address that was given
        self.network, self.session = running.network, running.session

    def register(self, address: int, num_bytes: int) -> None:
        """Let peers read and write the memory, until `unregister` or `close`. Raises `EngineError`."""
        assert address not in self._registered, "a user registers memory once"
        self._registered[address] = self._open().register(address, address + num_bytes)

    def unregister(self, address: int) -> None:
        """When this returns, no network card writes into the memory, unless another user has registered it, too."""
        self._open().unregister(self._registered.pop(address))

    def begin_write(
        self, session: str, ours: Sequence[int], theirs: Sequence[int], num_bytes: Sequence[int]
    ) -> Transfer:
        """Begin to copy pieces of our memory to a peer. The memory must not change until the transfer has ended."""
        running = self._open()
        peer = running.peers.of(session)
        pieces = zip(ours, theirs, num_bytes, strict=True)
        return Transfer(running, peer, [running.library.transfer_submit_write(peer, *piece) for piece in pieces])

    def write(self, session: str, ours: Sequence[int], theirs: Sequence[int], num_bytes: Sequence[int]) -> bool:
        """Copy pieces of our memory to a peer; the result is that of `Transfer.wait`."""
        return self.begin_write(session, ours, theirs, num_bytes).wait()

    def read(self, session: str, ours: int, theirs: int, num_bytes: int) -> bool:
        """Copy from a peer to our memory; the result is that of `Transfer.wait`. A read that fails at once is repeated:
        the first one after a peer has started again may use a connection to its predecessor."""
        start_s = time.monotonic()
        if self._read_once(session, ours, theirs, num_bytes):
            return True
        return time.monotonic() - start_s < _AT_ONCE_S and self._read_once(session, ours, theirs, num_bytes)

    def _read_once(self, session: str, ours: int, theirs: int, num_bytes: int) -> bool:
        running = self._open()
        peer = running.peers.of(session)
        piece = running.library.batch_transfer_async_read(peer, [ours], [theirs], [num_bytes])
        return Transfer(running, peer, [piece]).wait()

    def reads(self, session: str, ours: Sequence[int], theirs: Sequence[int], num_bytes: Sequence[int]) -> Reads:
        """Return reads from a peer to our memory, which have not begun."""
        running = self._open()
        peer = running.peers.of(session)
        begin = running.library.batch_transfer_async_read
        pieces = zip(ours, theirs, num_bytes, strict=True)
        return Reads(running, peer, [partial(begin, peer, [here], [there], [size]) for here, there, size in pieces])

    def for_store(self) -> Any:
        """Return the argument `engine` of `MooncakeDistributedStore.setup`. The store must be closed before this."""
        return self._open().library.get_engine()

    def share(self) -> MooncakeEngine:
        """Return another share of the same engine, for the same user."""
        return self._open().share(self._user)

    def close(self) -> None:
        """Unregister the memory that this user has registered still. No call is under way. May be called again."""
        if self._running is not None:
            for address in list(self._registered):
                self.unregister(address)
            _leave(self._running, self._user)
            self._running = None

    def _open(self) -> _Running:
        if self._running is None:
            raise EngineError("Mooncake is used after its end in this process")
        return self._running


_process: dict[None, _Running] = {}  # at most one
_starting = threading.Lock()


def open_engine(network: Network, user: User) -> MooncakeEngine:
    """Return a share of this process's engine; the first user starts it. Raises `ConfigError` if Mooncake cannot run
    here, or runs in another network already."""
    with _starting:
        running = _process.get(None)
        if running is not None and running.network != network and not running.users:
            running = None  # the library's engine ends with its last reference
        if running is None:
            running = _process[None] = _Running(network, user)
        elif running.network != network:
            other = running.users[0]
            raise ConfigError(
                f"{user.title} would use Mooncake at {network}, but it runs at {running.network} for {other.title}, "
                f"and a process has one engine: set {user.host_flag}, {user.protocol_flag} and {user.devices_flag} as "
                f"{other.host_flag}, {other.protocol_flag} and {other.devices_flag}"
            )
        return running.share(user)


def separate_engine(network: Network, user: User) -> MooncakeEngine:
    """Return an engine beside that of the process: tests have both ends of a connection in one process."""
    return _Running(network, user).share(user)


def _leave(running: _Running, user: User) -> None:
    """An engine without users waits for the next one: its end would keep Python's lock for a second."""
    with _starting:
        running.leave(user)
