"""Chat templates: messages → the prompt text the model was trained on.

Templates come with the model and are foreign code: they run in jinja2's immutable sandbox, with the names that
Hugging Face promises them (`raise_exception`, `strftime_now`, `tojson`, loop controls).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.sandbox

from kvist.errors import ModelLoadError, RequestError

Message = Mapping[str, object]  # role, content, and whatever else the template reads


def _to_json(value: object, indent: int | None = None) -> str:
    # not jinja's own filter, which escapes <, > and & for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _local_now() -> datetime:
    return datetime.now().astimezone()


class ChatTemplate:
    """Compiled once, rendered for each chat. `special_tokens` are the names templates use: bos_token, eos_token..."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str], now: Callable[[], datetime] = _local_now
    ) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the model's chat template is not valid jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text. `options` are extra names for the template (`enable_thinking`...). Raises `RequestError`."""
        names = {**self._special_tokens, **(options or {})}
        names |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(names)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
