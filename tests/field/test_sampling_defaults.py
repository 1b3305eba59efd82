"""Sampling of requests that set no sampling fields: the model's recommended values, or OpenAI's defaults."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist import settings
from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.errors import ConfigError
from kvist.options import given_values
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.testing.gateway_bench import GatewayBench
from kvist.text import SamplingDefaults, load_sampling_defaults


def with_defaults(bench: GatewayBench, **defaults: Any) -> GatewayBench:
    """Return the same bench, served with the model's defaults."""
    app = build_app(
        dispatcher=bench.dispatcher,
        tokenizer=bench.dispatcher.tokenizer,
        config=ServerConfig(),
        model_name="tiny",
        sampling_defaults=SamplingDefaults(**defaults),
    )
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=bench.client.base_url)
    return replace(bench, client=client, app=app)


async def test_chats_and_completions_use_the_models_recommended_sampling_by_default(bench: GatewayBench) -> None:
    served = with_defaults(
        bench, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1, max_new_tokens=7
    )
    await served.chat()
    await served.post("/v1/completions", {"prompt": "x"})
    await served.chat(temperature=1, top_p=1, top_k=-1, min_p=0, repetition_penalty=1, max_tokens=9)
    await served.post("/generate", {"text": "x"})
    chat, completion, explicit, native = [request.sampling for request in bench.dispatcher.requests]
    assert (chat.temperature, chat.top_p, chat.top_k, chat.min_p, chat.max_tokens) == (0.6, 0.95, 20, 0.1, 7)
    assert (completion.temperature, completion.max_tokens) == (0.6, 16)
    assert (explicit.temperature, explicit.top_p, explicit.top_k, explicit.min_p, explicit.max_tokens) == (
        1.0,
        1.0,
        0,
        0.0,
        9,
    )
    penalties = [each.repetition_penalty for each in (chat, completion, explicit, native)]
    assert penalties == [1.1, 1.1, 1.0, 1.0]
    assert (native.temperature, native.top_p, native.top_k) == (1.0, 1.0, 0), "SGLang's own API has its own defaults"
    assert (await served.client.get("/model_info")).json()["preferred_sampling_params"]["top_k"] == 20


def test_the_operator_chooses_the_source_of_sampling_defaults(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for folder, temperature in ((model, 0.6), (other, 0.3)):
        folder.mkdir()
        (folder / "generation_config.json").write_text(json.dumps({"temperature": temperature}))
    checkpoint = Checkpoint(path=model, kind=CheckpointKind.HF, name="m")
    assert load_sampling_defaults(checkpoint).temperature == 0.6
    assert load_sampling_defaults(checkpoint, "vllm") == SamplingDefaults()
    assert load_sampling_defaults(checkpoint, str(other)).temperature == 0.3
    with pytest.raises(ConfigError, match="--generation-config") as wrong:
        load_sampling_defaults(checkpoint, str(tmp_path / "no"))
    assert "'auto'" in wrong.value.message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "auto"),
        (["--generation-config", "vllm"], "vllm"),
        (["--sampling-defaults", "openai"], "vllm"),
        (["--sampling-defaults", "model"], "auto"),
    ],
)
@pytest.mark.parametrize("verb", ["serve", "up"])
def test_sglangs_name_of_the_option_is_an_alias(verb: str, argv: list[str], expected: str) -> None:
    read = settings.read(verb, argv, {})
    assert given_values(read)["generation_config"] == expected


async def test_a_chat_continues_its_final_message(bench: GatewayBench) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "once up"}]
    await bench.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True})
    await bench.post("/v1/chat/completions", {"messages": messages, "add_generation_prompt": False})
    await bench.post("/v1/chat/completions", {"messages": messages})
    prompts = [bench.dispatcher.tokenizer.decode(request.prompt_token_ids) for request in bench.dispatcher.requests]
    assert prompts == [
        "<user>hi<assistant>once up",
        "<user>hi<assistant>once up",
        "<user>hi<assistant>once up<assistant>",
    ]
    both = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    refused = await bench.post("/v1/chat/completions", both)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "continue_final_message")
    counted = await bench.post("/tokenize", {"messages": messages, "continue_final_message": True})
    assert counted.json()["count"] == len(prompts[0])
