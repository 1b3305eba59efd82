"""Settings of the text side of a gateway."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option

AUTO_CONFIG, NO_CONFIG = "auto", "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    generation_config: str = option(
        AUTO_CONFIG,
        "source of temperature, top_p, top_k and min_p for requests that do not set them: 'auto' for the model's "
        "generation_config.json, 'vllm' for OpenAI's defaults, or a folder that has another generation_config.json",
    )
    chat_template: str | None = option(
        None,
        "chat template (jinja) that replaces the model's own: a file, or the template itself",
    )
    special_tokens_in_content: str = option(
        "special",
        "treatment of control tokens such as <|im_start|> in the content of chat messages: 'special' keeps their "
        "effect, as other servers do; 'text' makes them plain text, so that a message cannot forge another role",
        choices=("special", "text"),
    )
