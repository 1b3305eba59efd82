"""`kvist chat`: a conversation at the terminal, with a running server or with one that is started for the chat.

Each line is a turn and is sent with the whole history, as the API requires; the figures show how much of the history
was cached. Lines that begin with / are commands. Ctrl-C ends an answer, the end of the input ends the chat.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx

from kvist.clock import Clock, MonotonicClock
from kvist.cluster.chat_turn import TurnOptions, TurnReport, stream_turn
from kvist.cluster.config import ChatConfig
from kvist.cluster.ports import LOOPBACK, free_ports
from kvist.cluster.processes import Processes
from kvist.cluster.start_display import start_display
from kvist.cluster.stop_requests import STOP_SIGNALS, handle_signals
from kvist.cluster.up import interrupt_on_stop_signals
from kvist.errors import EngineError, Unavailable
from kvist.supervisor.child import ChildPlan
from kvist.supervisor.probe import probe_child

TURN_TIMEOUT_S = 600.0  # between two pieces of an answer
MAX_HISTORY_LINES = 1000
COMMANDS = {
    "/help": "show these commands",
    "/reset": "forget the conversation, keep the system prompt",
    "/system TEXT": "set the system prompt and forget the conversation; without TEXT, remove the system prompt",
    "/undo": "forget the last question and its answer",
    "/history": "show the conversation so far",
    "/stats": "switch the figures after each answer on or off",
    "/quit": "end the chat, as Ctrl-D does",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """The input and output of a chat; tests pass their own."""

    read: Callable[[str], str]  # a prompt -> a line; raises EOFError at the end
    write: Callable[[str], None]


class Conversation:
    """One chat. Mutable; owned by `run_chat`."""

    def __init__(self, client: httpx.Client, config: ChatConfig, options: TurnOptions, terminal: Terminal) -> None:
        self._client = client
        self._options = options
        self._write = terminal.write
        self._system = config.system
        self._stats = config.stats
        self._clock: Clock = MonotonicClock()
        self.messages: list[dict[str, str]] = []
        self._reset()

    def handle(self, line: str) -> bool:
        """Handle one line of input; return False if the line ends the chat. Server errors are shown, not raised."""
        line = line.strip()
        if line.startswith("/"):
            return self._command(*line.partition(" ")[::2])
        if line:
            self._ask(line)
        return True

    def _command(self, name: str, text: str) -> bool:
        if name == "/reset":
            self._reset()
        elif name == "/system":
            self._system = text.strip() or None
            self._reset()
        elif name == "/undo":
            self._undo()
        elif name == "/history":
            for message in self.messages:
                self._write(f"{message['role']}: {message['content']}\n")
        elif name == "/stats":
            self._stats = not self._stats
            self._write(f"figures after each answer: {'on' if self._stats else 'off'}\n")
        elif name not in ("/quit", "/exit", "/bye"):
            if name not in ("/help", "/?"):
                self._write(f"unknown command {name}\n")
            width = max(map(len, COMMANDS))
            self._write("".join(f"  {command:<{width}}  {help_text}\n" for command, help_text in COMMANDS.items()))
        return name not in ("/quit", "/exit", "/bye")

    def _reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _undo(self) -> None:
        while self.messages and self.messages[-1]["role"] != "system":
            if self.messages.pop()["role"] == "user":
                return

    def _ask(self, text: str) -> None:
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            self._write(piece)

        self.messages.append({"role": "user", "content": text})
        try:
            report = stream_turn(self._client, self.messages, self._options, clock=self._clock, show=show)
        except KeyboardInterrupt:
            self._write("\n(stopped)\n")
        except (EngineError, httpx.HTTPError) as error:
            self._write(f"\nno answer: {error or type(error).__name__}\n")
            if not pieces:
                self._undo()
                return
        else:
            self._write("\n" + (f"{figures(report)}\n" if self._stats else ""))
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


def figures(report: TurnReport) -> str:
    """Return the line of figures under an answer."""
    parts = [f"first token {report.ttft_s * 1e3:.0f} ms"]
    if report.tpot_s:
        parts.append(f"{1 / report.tpot_s:.1f} tokens/s")
    parts.append(f"{report.num_output_tokens} tokens generated")
    parts.append(f"{report.num_prompt_tokens} in the prompt, {report.num_cached_tokens} cached")
    if report.finish_reason == "length":
        parts.append("cut at the token limit")
    return "[" + "; ".join(parts) + "]"


def run_chat(config: ChatConfig, serve_argv: list[str]) -> int:
    """Run the chat until the input ends. Raises `KvistError` when no server can be reached or started."""
    with contextlib.ExitStack() as stack:
        url = config.url
        if url is None:
            url = stack.enter_context(_own_server(serve_argv, config.start_timeout_s))
        headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        timeout = httpx.Timeout(TURN_TIMEOUT_S, connect=10.0)
        client = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False))
        model, is_kvist = _find_model(client, url, config.served_model_name)
        options = TurnOptions(
            max_tokens=config.max_tokens, temperature=config.temperature, model=model, with_report=is_kvist
        )
        _talk(config, client, options, url)
    return 0


def _talk(config: ChatConfig, client: httpx.Client, options: TurnOptions, url: str) -> None:
    at_terminal = sys.stdin.isatty()
    terminal = Terminal(read=input if at_terminal else _read_plain, write=_write)
    conversation = Conversation(client, config, options, terminal)
    if at_terminal:
        _write(f"{options.model} at {url}. /help shows the commands, Ctrl-D ends the chat.\n")
    with _line_history() if at_terminal else contextlib.nullcontext():
        while True:
            try:
                line = terminal.read("> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                _write("\n")
                continue
            if not conversation.handle(line):
                return


def _read_plain(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Let arrow keys reach earlier lines, also of earlier chats."""
    try:
        import readline
    except ImportError:  # not on every system
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "kvist"
    file = folder / "chat-history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(MAX_HISTORY_LINES)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.touch(mode=0o600)
            readline.write_history_file(file)


def _find_model(client: httpx.Client, url: str, named: str | None) -> tuple[str, bool]:
    """Return the model to use, and whether the server is Kvist. Raises `Unavailable`."""
    try:
        response = client.get("/v1/models")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise Unavailable(f"{url} requires an API key: use --api-key")
        models = response.raise_for_status().json()["data"]
        return named or str(models[0]["id"]), models[0].get("owned_by") == "kvist"
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unavailable(f"{url}/v1/models does not answer as an OpenAI-compatible server does: {error}") from error


@contextlib.contextmanager
def _own_server(serve_argv: list[str], timeout_s: float) -> Iterator[str]:
    """Yield the URL of a server that runs as long as the body. Raises `KvistError` when the server does not start."""
    url = f"http://{LOOPBACK}:{free_ports(1)[0]}"
    argv = (*(sys.executable, "-m", "kvist", "serve", *serve_argv), f"--port={url.rpartition(':')[2]}")
    plan = ChildPlan(name="serve", argv=(*argv, "--stop-with-stdin"), url=url)
    processes = Processes([plan], probe=probe_child, sink=lambda _name, _line: None)

    def end(number: int, _frame: FrameType | None) -> None:
        """End the chat: Ctrl-C ends an answer."""
        if processes.stopping:
            processes.hurry()
        else:
            raise SystemExit(128 + number)

    ends = tuple(number for number in STOP_SIGNALS if number is not signal.SIGINT)
    with interrupt_on_stop_signals(processes), handle_signals(end, ends):
        try:
            processes.start()
            with start_display(processes.children, lambda text: _write(f"{text}\n")) as display:
                processes.wait_ready(timeout_s, each_second=display)
            yield url
        finally:
            processes.stop()
