"""The application over a scripted dispatcher whose answer has reasoning, text and two calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from kvist.server.config import ServerConfig
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from kvist.testing.scripted_dispatcher import BYTE_MODEL
from kvist.testing.tokenizers import byte_tokenizer
from tests.server.test_tools import ANSWER, FailingOver
from tests.server.test_tools import TEMPLATE as TOOL_TEMPLATE

# `enable_thinking` and the effort are shown, so that tests see them in the prompt
TEMPLATE = TOOL_TEMPLATE + "{% if enable_thinking is defined %}({{ enable_thinking }}{{ reasoning_effort }}){% endif %}"


def tool_bench(**settings: Any) -> GatewayBench:
    """After 40 tokens another worker continues each answer."""
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    spec = msgspec.structs.replace(BYTE_MODEL, max_model_len=1000)
    config = ServerConfig(**settings)
    return gateway_bench(dispatcher=FailingOver(tokenizer, answer=ANSWER, spec=spec), config=config)


@pytest.fixture
async def bench() -> AsyncIterator[GatewayBench]:
    made = tool_bench()
    async with made.client:
        yield made


def prompt_of(bench: GatewayBench) -> str:
    return bench.dispatcher.tokenizer.decode(bench.dispatcher.requests[-1].prompt_token_ids, skip_special_tokens=False)
