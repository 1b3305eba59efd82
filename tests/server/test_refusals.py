from __future__ import annotations

from typing import Any

import pytest

from kvist.request import Role
from kvist.testing.gateway_bench import GatewayBench
from tests.server.conftest import MakeBench

TEXT = {"type": "text", "text": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
USER = [{"role": "user", "content": "hi"}]


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"temprature": 1}, "temprature", "did you mean `temperature`?"),
        ({"xyzzy": 1}, "xyzzy", "unknown field `xyzzy`"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages", "include_usage`?"),
        ({"temperature": "warm"}, "temperature", "Expected `float"),
        ({"temperature": -0.1}, "temperature", "between 0 and 1000000"),
        ({"top_p": -0.1}, "top_p", "between 0 and 1"),
        ({"min_p": 1.5}, "min_p", "between 0 and 1"),
        ({"top_k": -2}, "top_k", "positive"),
        ({"top_k": 2**31}, "top_k", "below 2147483648"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 1000}, "n", "limit of 128"),
        ({"seed": -2}, "seed", "between 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "max_tokens (3)"),
        ({"stop": [""]}, "stop", "1 to 256"),
        ({"stop": ["a"] * 17}, "stop", "16 strings"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "0 to 299"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs `stream`"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "user first"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "'critic'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown field"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].image_url", "only text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "Expected"),
        ({"messages": [{"role": "user", "content": [TEXT | {"mood": 1}]}]}, "messages[0].content[0].mood", "unknown"),
        ({"messages": [{"role": "user", "content": [TEXT | {"file": {}}]}]}, "messages[0].content[0].file", "not supp"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages", "cannot be set"),
    ],
)  # fmt: skip
async def test_an_invalid_field_is_a_400_that_names_the_field(
    bench: GatewayBench, fields: dict[str, object], param: str, expected: str
) -> None:
    response = await bench.post("/v1/chat/completions", {"messages": USER, **fields})
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert expected in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not bench.dispatcher.requests


@pytest.mark.parametrize(
    ("name", "value", "neutral", "code"),
    [
        (
            "tools",
            [{"type": "function", "function": {"name": "f"}}],
            [],
            "unsupported_field",
        ),  # the model has no format
        ("tool_choice", "required", "auto", "invalid_request"),  # without tools
    ],
)
async def test_a_refused_field_is_accepted_with_a_neutral_value_only(
    bench: GatewayBench, name: str, value: object, neutral: object, code: str
) -> None:
    refused = await bench.chat(**{name: value})
    assert refused.status_code == 400
    assert error_of(refused)["code"] == code
    assert error_of(refused)["param"] == name
    assert (await bench.chat(**{name: neutral})).status_code == 200
    assert (await bench.chat(**{name: None})).status_code == 200


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"best_of": 2}, {"use_beam_search": True}])
async def test_completions_refuse_unsupported_fields(bench: GatewayBench, fields: dict[str, object]) -> None:
    response = await bench.post("/v1/completions", {"prompt": "x", **fields})
    assert error_of(response)["code"] == "unsupported_field"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"messages": [{"role": "user", "content": "\xff"}]}'])
async def test_a_body_that_is_not_a_json_object_in_utf8_is_a_400(bench: GatewayBench, body: bytes) -> None:
    response = await bench.client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", b'{"prompt": "\\ud800"}', "prompt"),
        ("chat/completions", b'{"messages": [{"role": "user", "content": "a\xff"}]}', "messages[0].content"),
        ("chat/completions", b'{"messages": [{"role": "user", "content": [{"text": "\\udc00"}]}]}',
         "messages[0].content[0].text"),
        ("completions", b'{"prompt": "x", "logit_bias": {"\\ud800": 1}}', "logit_bias"),
        ("completions", b'{"prompt": "\\ud800"', None),
    ],
)  # fmt: skip
async def test_a_text_that_is_not_unicode_is_a_400_that_names_its_field(
    bench: GatewayBench, path: str, body: bytes, param: str | None
) -> None:
    response = await bench.client.post(f"/v1/{path}", content=body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param), error
    assert param is None or f"`{param}` is not valid Unicode" in error["message"]


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [1, "a"], [[1], 2], [300], [-1], {"a": 1}, None])
async def test_an_empty_mixed_or_missing_prompt_is_a_400(bench: GatewayBench, prompt: object) -> None:
    response = await bench.post("/v1/completions", {"prompt": prompt})
    assert response.status_code == 400
    assert error_of(response)["param"].startswith("prompt")


async def test_the_error_for_a_prompt_over_the_context_has_both_numbers(bench: GatewayBench) -> None:
    response = await bench.post("/v1/completions", {"prompt": "x" * 200})
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"
    assert "200 tokens" in error_of(response)["message"]
    assert (await bench.post("/v1/completions", {"prompt": "x" * 199})).status_code == 200


async def test_the_error_for_prompt_and_answer_over_the_context_has_the_room(bench: GatewayBench) -> None:
    body = {"prompt": "x" * 150, "max_tokens": 51}
    error = error_of(await bench.post("/v1/completions", body))
    assert error["code"] == "context_length_exceeded"
    assert "only 50 more tokens fit: this server holds at most 200 tokens" in error["message"]
    assert (await bench.post("/v1/completions", {**body, "max_tokens": 50})).status_code == 200


async def test_a_hopeless_prompt_is_refused_before_tokenising(bench: GatewayBench) -> None:
    error = error_of(await bench.post("/v1/completions", {"prompt": "x" * 60_000}))
    assert "60000 characters" in error["message"]


async def test_an_error_quotes_only_a_short_part_of_the_request(bench: GatewayBench) -> None:
    long = "ab" * 50_000
    for response in (await bench.chat(model=long), await bench.chat(**{long: 1})):
        assert 400 <= response.status_code < 500
        assert len(response.content) < 10_000


async def test_a_model_that_is_not_served_is_a_404(bench: GatewayBench) -> None:
    response = await bench.chat(model="other")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert "tiny" in error_of(response)["message"]


async def test_a_body_over_the_limit_is_a_413_declared_or_not(make_bench: MakeBench) -> None:
    bench = make_bench(max_body_bytes=1024)
    response = await bench.chat("x" * 2000)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"

    async def pieces() -> Any:
        for _ in range(3):
            yield b" " * 500

    assert (await bench.client.post("/v1/completions", content=pieces())).status_code == 413


async def test_unknown_paths_and_methods_have_openais_shape(bench: GatewayBench) -> None:
    assert (await bench.client.get("/v2/nothing")).status_code == 404
    assert error_of(await bench.client.get("/v2/nothing"))["message"] == "unknown path"
    response = await bench.client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert "method" in error_of(response)["message"]
    assert response.headers["allow"] == "POST"


async def test_a_prefill_or_decode_worker_refuses_and_names_the_router(make_bench: MakeBench) -> None:
    bench = make_bench(own_role=Role.PREFILL)
    for path in ("/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/detokenize"):
        response = await bench.post(path, {})
        assert response.status_code == 400
        assert "router" in error_of(response)["message"]


async def test_a_request_without_a_ready_worker_is_a_503_with_retry_after(bench: GatewayBench) -> None:
    bench.dispatcher.spec = None
    response = await bench.chat()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("path", "param", "value"), [("/tokenize", "prompt", ["a"] * 129), ("/detokenize", "tokens", [[1]] * 129)]
)
async def test_too_many_texts_are_refused_and_the_field_is_named(
    bench: GatewayBench, path: str, param: str, value: object
) -> None:
    response = await bench.post(path, {param: value})
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert "the limit is 128" in error["message"]
    assert "n=1" not in error["message"]
