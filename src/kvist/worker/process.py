"""`python -m kvist.worker`: one engine process, from its settings to its last message.

    settings ─► load (progress lines) ─► Ready on standard output ─► serve ─► SIGTERM ─► requests failed, all closed

Settings come as JSON: as the only argument (start it by hand), or as the first line of standard input (a parent
starts it: messages.py). In the second case the process ends when standard input does: its parent is gone.
Exit status: 0 after a clean end, 1 when the start failed or the device broke.
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
from kvist.errors import ConfigError, EngineError, KvistError
from kvist.log import LogConfig, setup_logging
from kvist.worker.config import EngineConfig
from kvist.worker.messages import Announcement, Progress, Ready, StartFailed, encode_line

if TYPE_CHECKING:
    from kvist.worker.engine import Engine

LAST_WORDS_S = 8.0  # from a request to stop, or from the loop's end, until the process ends whatever it is doing
_MAX_SETTINGS_BYTES = 1 << 20
# The interpreter's own 5 ms are half a step: so long would each thread that reads a page wait, several times a page,
# whenever the loop plans or launches.
_SWITCH_S = 0.0001

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    setup_logging(LogConfig())
    # Read when torch is imported. Threads that spin while they wait would take the cores of the other workers of this
    # host: a step of 48 ms was seen to take 630 (models/linear.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.setswitchinterval(_SWITCH_S)
    announce = _announcer()
    ending = _Ending()
    try:
        if len(arguments) > 1:
            raise ConfigError("python -m kvist.worker takes one argument: the engine's settings as JSON")
        config = parse_config(arguments[0].encode() if arguments else _read_first_line())
        setup_logging(config.log)
        if not arguments:
            threading.Thread(target=ending.with_stdin, name="kvist-parent-watch", daemon=True).start()
        engine = _build(config, announce)
    except KvistError as error:
        log.error("the engine cannot start: %s", error.message)
        announce(StartFailed(code=error.code, message=error.message))
        return 1
    except Exception as error:  # our bug or a broken device: the parent must hear of it all the same
        log.exception("the engine cannot start")
        announce(StartFailed(code=EngineError.code, message=f"{type(error).__name__}: {error}"))
        return 1
    try:
        ending.ask = engine.loop.request_stop
        signal.signal(signal.SIGTERM, ending.with_signal)
        # Ctrl-C reaches the whole terminal group; a parent will tell us itself when to stop.
        signal.signal(signal.SIGINT, ending.with_signal if arguments else signal.SIG_IGN)
        announce(Ready(spec=engine.spec, gateway_cores=tuple(sorted(engine.gateway_cores))))
        engine.loop.run()
    except EngineError as error:
        log.error("the engine ends: %s", error.message)
        return 1
    finally:
        ending.set_limit()
        engine.close()
    return 0


def parse_config(settings: bytes) -> EngineConfig:
    """Raises `ConfigError` for what is no JSON object of `EngineConfig`'s fields."""
    try:
        return msgspec.json.decode(settings, type=EngineConfig)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"the engine's settings cannot be read: {error}") from error


def _build(config: EngineConfig, announce: Callable[[Announcement], None]) -> Engine:
    find_checkpoint(config.model_path)  # a wrong path is told before torch is imported, which takes seconds
    from kvist.worker.engine import build_engine

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        announce(Progress(text=text))

    progress("starting the engine")
    return build_engine(config, progress=progress)


class _Ending:
    """How the process is asked to end. `ask` is set once there is a loop to ask; before that it ends at once."""

    def __init__(self) -> None:
        self.ask: Callable[[], None] | None = None

    def with_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self._begin()

    def with_stdin(self) -> None:
        """Waits for the parent's end, which closes our standard input. Not through `sys.stdin`: its lock would be held
        by this thread when the interpreter ends."""
        while os.read(0, 1 << 16):
            pass
        log.warning("standard input is closed: whoever started this engine is gone, so it ends")
        self._begin()

    def _begin(self) -> None:
        if self.ask is None:
            os._exit(1)
        self.set_limit()
        self.ask()

    def set_limit(self) -> None:
        """The process ends soon, whatever hangs on a broken device."""
        last_words = threading.Timer(LAST_WORDS_S, os._exit, args=(1,))
        last_words.daemon = True
        last_words.start()


def _read_first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # one at a time: what follows is not ours to read yet
        if not byte or len(line) > _MAX_SETTINGS_BYTES:
            raise ConfigError("the engine's settings did not come on standard input: one line of JSON")
        line += byte
    return line


def _announcer() -> Callable[[Announcement], None]:
    """Keeps the real standard output for announcements, and sends what libraries print to standard error."""
    sys.stdout.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)

    def announce(announcement: Announcement) -> None:
        line = encode_line(announcement)
        try:
            os.write(descriptor, line)  # a pipe takes a line of this size at once
        except BrokenPipeError:
            log.warning("nobody reads our announcements: %s", line)

    return announce
