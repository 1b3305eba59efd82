"""Settings of the text side of a gateway."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    chat_template: str | None = option(
        None,
        "chat template (jinja) to use instead of the model's own: a file, or the template itself",
    )
    special_tokens_in_content: str = option(
        "special",
        "control tokens such as <|im_start|>, spelled in the content of chat messages: 'special' lets them work as "
        "such, as other servers do; 'text' makes them plain text, so that a message cannot forge another role",
        choices=("special", "text"),
    )
