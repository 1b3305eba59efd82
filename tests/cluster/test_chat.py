"""A chat at the terminal, with a server that answers from a script."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import httpx
import pytest

from kvist import settings
from kvist.cluster import chat as chat_module
from kvist.cluster.chat import COMMANDS, Conversation, Terminal
from kvist.cluster.chat_turn import TurnOptions
from kvist.cluster.config import ChatConfig
from kvist.errors import ConfigError

Answer = Callable[[httpx.Request], httpx.Response]


def events(*pieces: str, finish_reason: str = "stop") -> str:
    usage = {"prompt_tokens": 20, "completion_tokens": len(pieces), "prompt_tokens_details": {"cached_tokens": 16}}
    events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]}
    return "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, last, {"choices": [], "usage": usage}])


class Chat:
    def __init__(self, answer: Answer, config: ChatConfig) -> None:
        self.asked: list[dict[str, object]] = []
        self.shown = ""

        def handle(request: httpx.Request) -> httpx.Response:
            self.asked.append(json.loads(request.content))
            return answer(request)

        client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(handle))
        options = TurnOptions(model="m", with_report=False)
        terminal = Terminal(read=lambda _prompt: "", write=self._show)
        self.conversation = Conversation(client, config, options, terminal)

    def _show(self, text: str) -> None:
        self.shown += text

    def say(self, *lines: str) -> list[bool]:
        return [self.conversation.handle(line) for line in lines]

    def roles(self) -> list[str]:
        return [message["role"] for message in self.conversation.messages]


def chat(answer: Answer | None = None, **config: object) -> Chat:
    return Chat(answer or (lambda _request: httpx.Response(200, text=events("Bon", "jour"))), ChatConfig(**config))  # type: ignore[arg-type]


def test_each_chat_turn_sends_the_whole_history_and_shows_its_figures() -> None:
    here = chat(system="Be brief.")
    assert here.say("Hello", "", "And now?") == [True, True, True]
    assert [len(asked["messages"]) for asked in here.asked] == [2, 4]  # type: ignore[arg-type]
    assert here.roles() == ["system", "user", "assistant", "user", "assistant"]
    assert here.conversation.messages[2]["content"] == "Bonjour"
    assert "20 in the prompt, 16 cached" in here.shown
    assert "kvist" not in here.asked[0]
    assert "temperature" not in here.asked[0]


def test_chat_commands_change_the_history_and_send_no_request() -> None:
    here = chat(system="Be brief.")
    here.say("Hello", "/undo")
    assert here.roles() == ["system"]
    here.say("Hello", "/reset")
    assert here.roles() == ["system"]
    here.say("/system Be kind.")
    assert here.conversation.messages == [{"role": "system", "content": "Be kind."}]
    here.say("/system", "/undo")
    assert here.roles() == []
    here.shown = ""
    here.say("/nonsense")
    assert all(command in here.shown for command in COMMANDS)
    here.say("Hello")
    here.shown = ""
    here.say("/history")
    assert here.shown == "user: Hello\nassistant: Bonjour\n"
    assert here.say("/quit") == [False]
    assert len(here.asked) == 3


def test_figures_can_be_turned_off() -> None:
    here = chat()
    here.say("/stats", "Hello")
    assert "first token" not in here.shown


@pytest.mark.parametrize(
    "answer",
    [
        lambda _request: httpx.Response(429, text='{"error": {"message": "full"}}'),
        lambda _request: (_ for _ in ()).throw(httpx.ConnectError("refused")),
    ],
)
def test_a_question_without_an_answer_is_removed_from_the_history(answer: Answer) -> None:
    here = chat(answer)
    assert here.say("Hello") == [True]
    assert here.roles() == []
    assert "no answer" in here.shown


def test_the_received_part_of_a_broken_answer_stays_in_the_history() -> None:
    text = events("Bon").partition("\n\n")[0] + '\n\ndata: {"error": {"message": "lost"}}\n\n'
    here = chat(lambda _request: httpx.Response(200, text=text))
    here.say("Hello")
    assert here.conversation.messages[-1] == {"role": "assistant", "content": "Bon"}
    assert "lost" in here.shown


def test_the_figures_name_an_answer_cut_at_its_limit() -> None:
    here = chat(lambda _request: httpx.Response(200, text=events("Bon", finish_reason="length")))
    here.say("Hello")
    assert "cut at the token limit" in here.shown


@pytest.mark.parametrize(
    ("argv", "url", "serve_argv"),
    [
        (["http://h:1/v1/"], "http://h:1", []),
        (["/models/m", "--dtype", "bfloat16"], None, ["--model-path=/models/m", "--dtype=bfloat16"]),
        (["--model-path", "m", "--system", "x"], None, ["--model-path=m"]),
        ([], None, []),
    ],
)
def test_a_chat_uses_a_url_or_starts_its_own_server(argv: list[str], url: str | None, serve_argv: list[str]) -> None:
    read = settings.read("chat", argv, {})
    assert isinstance(read, settings.ChatSettings)
    assert (read.chat.url, read.serve_argv() if url is None else []) == (url, serve_argv)


def test_two_servers_for_one_chat_are_an_error() -> None:
    with pytest.raises(ConfigError, match="are two targets of the chat"):
        settings.read("chat", ["http://h:1", "--model-path", "m"], {})


@pytest.mark.parametrize(
    ("number", "ended"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)]
)
def test_ctrl_c_ends_an_answer_and_other_stop_signals_the_chat_and_its_server(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, ended: type[BaseException]
) -> None:
    processes = mock.Mock(stopping=False, children={})
    monkeypatch.setattr(chat_module, "Processes", lambda *_args, **_kwargs: processes)
    monkeypatch.setattr(chat_module, "start_display", lambda *_: nullcontext())
    with pytest.raises(ended), chat_module._own_server([], 1.0):
        signal.raise_signal(number)
    processes.stop.assert_called_once_with()
