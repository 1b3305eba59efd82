"""Settings of the text side of a gateway."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option
from kvist.tools import AUTO

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
    tool_call_parser: str = option(
        AUTO,
        "format in which the model writes tool calls: 'auto' finds it in the chat template, 'none' recognises no "
        "calls; others have vLLM's names, such as hermes, qwen3_coder, llama3_json, mistral (docs/tools.md)",
    )
    reasoning_parser: str = option(
        AUTO,
        "format in which the model writes its reasoning: 'auto' finds it in the chat template, 'none' leaves reasoning "
        "in the content; others have vLLM's names, such as deepseek_r1, qwen3 (docs/tools.md)",
    )
    enable_auto_tool_choice: bool = option(
        True,
        "let the model decide whether to call one of the request's tools; without, requests with tools are refused",
    )
