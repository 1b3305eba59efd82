"""`python -m kvist.engine`: one engine process, from its settings to its end.

    settings ─► load (progress lines) ─► Ready on standard output ─► serve ─► stop request ─► close all parts

The settings are JSON: the only argument if the engine is started by hand, else the first line of standard input
(messages.py). An engine started by hand ends on a signal. An engine with a parent ignores signals, because a signal may
reach the whole process group at once, and the parent decides how long open requests may continue. The parent sends stop
requests on standard input; end of file means that the parent has ended. Exit status: 0 after a clean end, 1 if the
start failed or the device is broken.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from kvist.checkpoint import find_checkpoint
from kvist.engine.config import EngineConfig
from kvist.engine.messages import DRAIN, STOP, Announcement, Beat, Progress, Ready, StartFailed, encode_line
from kvist.errors import UNDECODABLE, ConfigError, EngineError, KvistError
from kvist.flags import nearest
from kvist.log import LogConfig, setup_logging
from kvist.parent import continue_when_parent_dies

if TYPE_CHECKING:
    from kvist.engine.assembly import Engine
    from kvist.engine.loop import EngineLoop

SHUTDOWN_DEADLINE_S = 8.0  # from a stop request, or the end of the loop, to a forced exit
_MAX_SETTINGS_BYTES = 1 << 20
# The interpreter's default switch interval (5 ms) is half a step. A thread that copies pages would wait that long while
# the loop plans or launches, several times per page.
_SWITCH_INTERVAL_S = 0.0001

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    setup_logging(LogConfig())
    # Read by torch when it is imported. Threads that spin while they wait would use the cores of other workers on this
    # host: a step of 48 ms then took up to 630 ms (models/linear.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    continue_when_parent_dies()
    announce = _announcer()
    shutdown = _Shutdown()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, shutdown.on_signal if arguments else signal.SIG_IGN)
    try:
        if len(arguments) > 1:
            raise ConfigError("python -m kvist.engine takes one argument: the engine's settings as JSON")
        config = parse_config(arguments[0].encode() if arguments else _read_first_line())
        setup_logging(config.log)
        if not arguments:
            threading.Thread(target=shutdown.follow_stdin, name="kvist-parent-watch", daemon=True).start()
        engine = _build(config, announce)
    except KvistError as error:
        if arguments:  # else the parent reports the error
            logger.error("the engine cannot start: %s", error.message)
        announce(StartFailed(code=error.code, message=error.message))
        return 1
    except Exception as error:  # our bug or a broken device: the parent must get the error
        logger.exception("the engine cannot start")
        announce(StartFailed(code=EngineError.code, message=f"{type(error).__name__}: {error}"))
        return 1
    try:
        shutdown.loop = engine.loop
        announce(Ready(spec=engine.spec))

        def beat(turn_s: float, stalled_s: float, place: str) -> None:
            announce(Beat(turn_s=turn_s, stalled_s=stalled_s, place=place, role=engine.loop.role))

        engine.watchdog.start(beat)
        engine.loop.run()
    except EngineError as error:
        logger.error("the engine ends: %s", error.message)
        return 1
    finally:
        shutdown.set_deadline()
        engine.close()
    return 0


def parse_config(settings: bytes) -> EngineConfig:
    """Parse the engine's settings. Raises `ConfigError` unless they are a JSON object with `EngineConfig`'s fields and
    no others."""
    try:
        given = msgspec.json.decode(settings)
        config = msgspec.convert(given, type=EngineConfig)
    except UNDECODABLE as error:
        raise ConfigError(f"the engine's settings cannot be read: {error}") from error
    _check_keys("the engine's settings", given, msgspec.to_builtins(config))
    return config


def _check_keys(where: str, given: object, known: object) -> None:
    """Raise `ConfigError` for a key that the decoder has ignored."""
    if not isinstance(given, dict) or not isinstance(known, dict):
        return
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{where} have no {key}{nearest(key, list(known))}")
        _check_keys(key, value, known[key])


def _build(config: EngineConfig, announce: Callable[[Announcement], None]) -> Engine:
    # a wrong path is reported before torch is imported, which takes seconds
    find_checkpoint(config.options.model.model_path)
    from kvist.engine.assembly import build_engine

    def progress(text: str) -> None:
        announce(Progress(text=text))

    progress("starting the engine")
    return build_engine(config, progress=progress)


class _Shutdown:
    """Handles stop requests. `loop` is set once the loop exists; before that, a stop request exits at once."""

    def __init__(self) -> None:
        self.loop: EngineLoop | None = None
        self._begun = False

    def on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self._begin()

    def follow_stdin(self) -> None:
        """Carry out the requests of the parent on standard input. Reads the file descriptor, because this thread would
        hold the lock of `sys.stdin` when the interpreter ends."""
        pending = b""
        while piece := os.read(0, 1 << 16):
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                if line == STOP:
                    self._begin()
                elif line == DRAIN and self.loop is not None:
                    self.loop.request_drain()
        if not self._begun:
            logger.warning(
                "standard input is closed: the process that started this engine has ended, so the engine ends"
            )
            self._begin()

    def _begin(self) -> None:
        if self.loop is None:
            os._exit(1)
        self._begun = True
        self.set_deadline()
        self.loop.request_stop()

    def set_deadline(self) -> None:
        """Exit the process within `SHUTDOWN_DEADLINE_S`, even if a thread hangs on a broken device."""
        timer = threading.Timer(SHUTDOWN_DEADLINE_S, os._exit, args=(1,))
        timer.daemon = True
        timer.start()


def _read_first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # one byte at a time: the lines after the first are read by another thread
        if not byte or len(line) > _MAX_SETTINGS_BYTES:
            raise ConfigError("the engine's settings are missing on standard input: one line of JSON is expected")
        line += byte
    return line


def _announcer() -> Callable[[Announcement], None]:
    """Reserve standard output for announcements, and redirect the output of libraries to standard error."""
    sys.stdout.flush()
    descriptor = os.dup(1)
    os.set_blocking(descriptor, False)
    os.dup2(2, 1)

    def announce(announcement: Announcement) -> None:
        line = encode_line(announcement)
        try:
            os.write(descriptor, line)  # a pipe takes a line of this size in one write
        except BlockingIOError:  # the parent is suspended; it does not need more heartbeats than fit into the pipe
            pass
        except BrokenPipeError:
            if not isinstance(announcement, Beat):  # the parent has ended, as standard input will also show
                logger.warning("the process that started this engine does not read its announcements: %s", line)

    return announce
