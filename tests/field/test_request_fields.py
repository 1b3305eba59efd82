"""Fields that clients of OpenAI, vLLM and SGLang send: honoured, accepted without effect, or refused with an error."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.testing.gateway_bench import GatewayBench, events_of
from tests.server.conftest import MakeBench

USER = {"role": "user", "content": "hi"}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2}},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [65]},
}


def ignored(response: Any) -> set[str]:
    named: str = response.headers.get("x-kvist-ignored", "")
    return set(named.split(", ")) - {""}


@pytest.mark.case("neutral-fields")
async def test_neutral_fields_are_accepted_and_fields_without_effect_are_named(
    bench: GatewayBench,
) -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    assistant = {"role": "assistant", "content": "ho", "reasoning_content": None}
    body = {
        "messages": [{"role": "user", "content": [part]}, assistant, USER],
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "metadata": {"a": "b"},
        "prompt_cache_key": "x",
        "safety_identifier": "y",
        "verbosity": "low",
        "store": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "user": None,
    }
    response = await bench.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    expected = {"metadata", "safety_identifier", "verbosity", "store"}
    assert ignored(response) == expected | {"messages[].content[].cache_control"}
    whole = await bench.post("/v1/chat/completions", {**body, "stream": False, "stream_options": None})
    assert ignored(whole) == ignored(response)
    assert "x-kvist-ignored" not in (await bench.chat()).headers


@pytest.mark.case("assistant-null-content")
async def test_an_assistant_message_whose_content_is_null_is_an_empty_text(bench: GatewayBench) -> None:
    messages = [USER, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}]
    response = await bench.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert response.status_code == 200, response.text
    prompt = bench.dispatcher.tokenizer.decode(bench.dispatcher.requests[0].prompt_token_ids)
    assert prompt == "<user>hi<assistant><user>b<assistant>"


@pytest.mark.case("template-kwargs-hint")
async def test_variables_for_the_chat_template_may_have_any_json_value(bench: GatewayBench) -> None:
    given = {"a": [1], "b": {"c": [None, 1.5]}, "mood": ["x", 1]}
    body = {"messages": [USER], "chat_template_kwargs": given, "max_tokens": 2}
    response = await bench.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert bench.dispatcher.tokenizer.decode(bench.dispatcher.requests[0].prompt_token_ids).endswith("['x', 1]")
    assert (await bench.post("/tokenize", {"messages": [USER], "chat_template_kwargs": given})).status_code == 200


@pytest.mark.case("continuous-usage")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_continuous_usage_is_in_every_event_of_a_stream(bench: GatewayBench, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**ENDPOINTS[path], "max_tokens": 4, "stream": True, "stream_options": options}
    *events, last, done = events_of(await bench.post(path, body))
    assert done == "[DONE]"
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == ([1, 2, 3, 4] if path == "/v1/completions" else [0, 1, 2, 3, 4])
    assert last["usage"]["completion_tokens"] == 4
    for event in events:
        usage = event["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_continuous_usage_counts_each_choice_separately(bench: GatewayBench) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "a", "n": 2, "max_tokens": 3, "stream": True, "stream_options": options}
    *events, last, _ = events_of(await bench.post("/v1/completions", body))
    for index in (0, 1):
        own = [event["usage"] for event in events if event["choices"][0]["index"] == index]
        assert [usage["completion_tokens"] for usage in own] == [1, 2, 3]
        assert {usage["prompt_tokens"] for usage in own} == {1}
    assert last["usage"]["completion_tokens"] == 6


async def test_an_unknown_field_is_refused_and_the_nearest_field_is_named(bench: GatewayBench) -> None:
    async def message_of(path: str, **fields: object) -> str:
        response = await bench.post(path, {**ENDPOINTS[path], **fields})
        assert response.status_code == 400
        message: str = response.json()["error"]["message"]
        return message

    assert "did you mean `response_format`?" in await message_of("/v1/chat/completions", respnse_format={})
    assert "did you mean `stream_options.include_usage`?" in await message_of("/v1/completions", include_usage=True)
    assert "`sampling_params`" in await message_of("/generate", temperature=0.5)
    assert "`sampling_params.max_new_tokens`" in await message_of("/generate", max_tokens=5)


async def test_a_seed_of_minus_one_is_drawn_by_the_server(bench: GatewayBench) -> None:
    await bench.chat(seed=-1)
    await bench.post("/generate", {"text": "a", "sampling_params": {"sampling_seed": -1}})
    assert [request.sampling.seed for request in bench.dispatcher.requests] == [1000, 1000]


@pytest.mark.parametrize("fields", [{"top_p": 0}, {"temperature": 1e-6}, {"temperature": 1e-300}])
async def test_top_p_of_zero_and_tiny_temperatures_are_greedy(bench: GatewayBench, fields: dict[str, float]) -> None:
    assert (await bench.chat(**fields)).status_code == 200
    sampling = bench.dispatcher.requests[0].sampling
    assert sampling.greedy
    assert sampling.top_p == 1.0


@pytest.mark.parametrize(("temperature", "status"), [(2.5, 200), (100, 200), (1e6, 200), (1e7, 400), (1e308, 400)])
async def test_a_temperature_above_two_is_accepted_up_to_the_range_of_float32(
    bench: GatewayBench, temperature: float, status: int
) -> None:
    assert (await bench.chat(temperature=temperature)).status_code == status


async def test_an_answer_has_its_stop_reason_under_both_names(bench: GatewayBench) -> None:
    async def ended_by(**fields: object) -> tuple[object, object, object]:
        choice = (await bench.post("/v1/completions", {"prompt": "x", **fields})).json()["choices"][0]
        streamed = events_of(await bench.post("/v1/completions", {"prompt": "x", "stream": True, **fields}))[-2]
        names = ("finish_reason", "stop_reason", "matched_stop")
        assert [choice[name] for name in names] == [streamed["choices"][0][name] for name in names]
        return choice["finish_reason"], choice["stop_reason"], choice["matched_stop"]

    assert await ended_by() == ("stop", None, 256)
    assert await ended_by(stop_token_ids=[256]) == ("stop", 256, 256)
    assert await ended_by(stop="ll") == ("stop", "ll", "ll")
    assert await ended_by(max_tokens=2) == ("length", None, None)


async def test_openais_endpoints_show_special_tokens_on_request(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "a<|end|>b"
    shown = await bench.post("/v1/completions", {"prompt": "x", "skip_special_tokens": False})
    assert shown.json()["choices"][0]["text"] == "a<|end|>b"
    message = (await bench.chat(skip_special_tokens=False)).json()["choices"][0]["message"]
    assert message["content"] == "a<|end|>b"
    assert (await bench.chat()).json()["choices"][0]["message"]["content"] == "ab"


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
async def test_the_text_includes_the_stop_string_on_request(bench: GatewayBench, name: str) -> None:
    native = {"text": "x", "sampling_params": {"stop": "ll", name: True}}
    assert (await bench.post("/generate", native)).json()["text"] == "hell"
    whole = await bench.post("/v1/completions", {"prompt": "x", "stop": "ll", name: True})
    assert whole.json()["choices"][0]["text"] == "hell"


async def test_a_chat_returns_token_ids_on_request(bench: GatewayBench) -> None:
    whole = (await bench.chat(return_token_ids=True, max_tokens=3)).json()["choices"][0]
    assert tuple(whole["prompt_token_ids"]) == bench.dispatcher.requests[0].prompt_token_ids
    *events, _ = events_of(await bench.chat(return_token_ids=True, max_tokens=3, stream=True))
    choices = [event["choices"][0] for event in events]
    assert [one for choice in choices for one in choice.get("token_ids", [])] == whole["token_ids"]
    assert sum("prompt_token_ids" in choice for choice in choices) == 1


async def test_reasoning_and_effort_reach_the_chat_template(make_bench: MakeBench, letters: Any) -> None:
    seen: dict[str, Any] = {}

    class Spy:
        formats = letters.chat_template.formats

        def render(self, messages: list[Any], *, options: dict[str, Any], **more: Any) -> str:
            seen.update(messages=messages, options=options, **more)
            return "x"

    bench = make_bench()
    template, letters.chat_template = letters.chat_template, Spy()
    try:
        thought = {"role": "assistant", "content": "ho", "reasoning_content": "hm"}
        await bench.post("/v1/chat/completions", {"messages": [USER, thought, USER], "reasoning_effort": "none"})
    finally:
        letters.chat_template = template
    reasoning = dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "hm")  # each template has its own name
    assert seen["messages"][1] == {"role": "assistant", "content": "ho", **reasoning}
    assert seen["options"] == {"reasoning_effort": "none", "enable_thinking": False}


async def test_tokenize_accepts_several_prompts_and_detokenize_several_lists(bench: GatewayBench) -> None:
    found = (await bench.post("/tokenize", {"prompt": ["ab", "c"], "return_token_strs": True})).json()
    assert (found["count"], found["token_strs"]) == ([2, 1], [["a", "b"], ["c"]])
    texts = (await bench.post("/detokenize", {"tokens": found["tokens"]})).json()
    assert texts == {"prompt": ["ab", "c"], "text": ["ab", "c"]}
    shown = (await bench.post("/detokenize", {"tokens": [256, *found["tokens"][1]]})).json()["text"]
    hidden = {"tokens": [256, *found["tokens"][1]], "skip_special_tokens": True}
    assert (shown, (await bench.post("/detokenize", hidden)).json()["text"]) == ("<|end|>c", "c")
    for path, body in (("/v1/tokenize", {"prompt": ["a"] * 129}), ("/v1/detokenize", {"tokens": [[1]] * 129})):
        assert (await bench.post(path, body)).status_code == 400
