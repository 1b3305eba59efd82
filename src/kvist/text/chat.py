"""Chat templates: render messages as the prompt text that the model was trained on.

Templates come with the model and are untrusted code: they run in jinja2's immutable sandbox, with the names and tags
that Hugging Face provides (`raise_exception`, `strftime_now`, `tojson`, loop controls, `generation`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from kvist.errors import ModelLoadError, PromptTooLong, RequestError
from kvist.tools import AnswerFormats, find_formats

_MAX_PIECES = 1 << 19  # pieces that a template may write, usually a few for each message: bounds its loops

Message = Mapping[str, object]  # role, content, and any other key that the template reads

_END_OF_FINAL = "\udfff"  # marks the end of the final message; a lone surrogate, which no text can contain
# Everything outside ASCII, except the marks that replace special tokens (plain_content.py).
_ESCAPED = re.compile("[^\x00-\x7f\ud800-\udfff]")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # replaces jinja's own filter, which escapes <, > and & for HTML
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPED.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


class CallArguments(dict[str, object]):
    """The arguments of a call in the history. Some templates read them as an object; others join them to a text, and
    get the JSON."""

    def __str__(self) -> str:
        return _to_json(self)

    def __add__(self, text: str) -> str:
        return f"{self}{text}"

    def __radd__(self, text: str) -> str:
        return f"{text}{self}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _local_now() -> datetime:
    return datetime.now().astimezone()


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for training. For inference its body is rendered unchanged, in a
    scope of its own as in transformers."""

    tags = {"generation"}  # noqa: RUF012  jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A chat template, compiled once and rendered for each chat. `special_tokens` are bos_token, eos_token..."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        formats: AnswerFormats | None = None,
        now: Callable[[], datetime] = _local_now,
    ) -> None:
        """`formats`: how the model writes tool calls and reasoning; None: as `source` shows. Raises `ModelLoadError`
        when `source` is not a valid template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self.source = source
        self.formats = find_formats(source) if formats is None else formats
        self.special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ModelLoadError(f"the chat template is not valid jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, object] | None = None,
        max_chars: int = sys.maxsize,
    ) -> str:
        """Return the prompt text.

        With `continue_final_message` the text ends with the content of the final message, for the model to continue.
        `options` are extra variables for the template (`enable_thinking`...). Raises `RequestError`, and
        `PromptTooLong` as soon as the text has more than `max_chars`."""
        if continue_final_message:
            messages = [*messages[:-1], _open_ended(messages[-1])]
        names = {"tools": None, "documents": None, **self.special_tokens, **(options or {})}
        names |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            text = self._render(names, max_chars)
        except PromptTooLong:
            raise
        except Exception as error:  # a template may raise anything
            raise RequestError(
                f"the model's chat template rejects these messages: {error}", param="messages"
            ) from error
        return _up_to_final(text) if continue_final_message else text

    def _render(self, names: Mapping[str, object], max_chars: int) -> str:
        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate(names):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > max_chars or len(pieces) > _MAX_PIECES:
                raise PromptTooLong(
                    "the model's chat template renders these messages as a prompt that is far too long",
                    param="messages",
                )
        return "".join(pieces)


def _open_ended(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        problem = "`continue_final_message` needs a final message with text to continue"
        raise RequestError(problem, param="continue_final_message")
    return {**message, "content": f"{content}{_END_OF_FINAL} "}  # the space shows whether the template trims


def _up_to_final(text: str) -> str:
    before, mark, after = text.rpartition(_END_OF_FINAL)
    if not mark:
        problem = "the model's chat template omits the final message, so `continue_final_message` cannot be honoured"
        raise RequestError(problem, param="continue_final_message")
    before = before.replace(_END_OF_FINAL, "")  # a template may write the message twice
    return before if after.startswith(" ") else before.rstrip()
