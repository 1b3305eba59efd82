"""Selects the chat template: the operator's (`--chat-template`), else the model's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from kvist.errors import ConfigError, ModelLoadError
from kvist.text.chat import ChatTemplate
from kvist.text.config import TextConfig
from kvist.tools import AUTO, NONE, AnswerFormats, NotReadError, find_formats, read_response_template

logger = logging.getLogger(__name__)


def find_chat_template(
    config: TextConfig, own_source: object, special_tokens: Mapping[str, str], response_template: object = None
) -> tuple[ChatTemplate | None, str]:
    """Return the template and "", or None and the reason why chats are refused. `own_source` is the model's template,
    and `response_template` its description of the parts of answers; None: it has none.

    A model whose own template is broken still serves completions. Raises `ConfigError` for an invalid
    --chat-template, --tool-call-parser or --reasoning-parser, and `ModelLoadError` for a faulty `response_template`."""
    find_formats("", tool_parser=config.tool_call_parser, reasoning_parser=config.reasoning_parser)  # checks the names
    described = _described(config, response_template)
    if config.chat_template is not None:
        try:
            return _template(_read(config.chat_template), config, special_tokens, described), ""
        except ModelLoadError as error:
            raise ConfigError(f"--chat-template: {error.message}", param="chat_template") from error
    if not isinstance(own_source, str):
        return None, "this model has no chat template; use /v1/completions, or start with --chat-template"
    try:
        return _template(own_source, config, special_tokens, described), ""
    except ModelLoadError as error:
        logger.warning("%s. Chats are refused; set another template with --chat-template", error.message)
        return None, f"{error.message}; use /v1/completions, or start with --chat-template"


def _described(config: TextConfig, response_template: object) -> AnswerFormats:
    if response_template is None or AUTO not in (config.tool_call_parser, config.reasoning_parser):
        return AnswerFormats()
    try:
        return AnswerFormats(*read_response_template(response_template))
    except NotReadError as place:
        logger.warning(
            "tokenizer_config.json has response_template.%s, which is not supported: the chat template decides how "
            "tool calls and reasoning are read; --tool-call-parser and --reasoning-parser choose by name",
            place,
        )
        return AnswerFormats()


def _template(
    source: str, config: TextConfig, special_tokens: Mapping[str, str], described: AnswerFormats
) -> ChatTemplate:
    tool_parser = config.tool_call_parser if config.enable_auto_tool_choice else NONE
    formats = find_formats(
        source, tool_parser=tool_parser, reasoning_parser=config.reasoning_parser, described=described
    )
    return ChatTemplate(source, special_tokens=special_tokens, formats=formats)


def _read(path_or_text: str) -> str:
    if "{" in path_or_text:  # every template contains a brace; file names are assumed not to
        return path_or_text
    path = Path(path_or_text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        message = f"--chat-template {path_or_text}: {reason}; use a jinja file or the template itself"
        raise ConfigError(message, param="chat_template") from error
