"""Fields that change logits reach the engine, and wrong values are refused with the field's name and the rule."""

from __future__ import annotations

import pytest

from kvist.request import MAX_BAD_WORDS, MAX_LOGIT_BIAS, SamplingParams
from kvist.testing.gateway_bench import GatewayBench

PLAIN = SamplingParams(max_tokens=1)


async def test_penalties_and_bias_reach_the_engine_from_every_endpoint(bench: GatewayBench) -> None:
    fields = {
        "frequency_penalty": 0.5,
        "presence_penalty": -2,
        "repetition_penalty": 1.25,
        "logit_bias": {"70": 100, "0": -0.5},
    }
    await bench.chat(**fields)
    await bench.post("/v1/completions", {"prompt": "a", **fields})
    await bench.post("/generate", {"text": "a", "sampling_params": fields})
    assert len(bench.dispatcher.requests) == 3
    for request in bench.dispatcher.requests:
        sampling = request.sampling
        assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -2.0)
        assert sampling.repetition_penalty == 1.25
        assert sampling.logit_bias == ((70, 100.0), (0, -0.5))


async def test_allowed_tokens_and_bad_words_reach_the_engine(bench: GatewayBench) -> None:
    await bench.chat(allowed_token_ids=[70, 71, 70], bad_words=["ab", " a"])
    sampling = bench.dispatcher.requests[0].sampling
    assert sampling.allowed_token_ids == (70, 71)
    encode = bench.dispatcher.tokenizer.encode
    assert sampling.bad_words == tuple(tuple(encode(text)) for text in ("ab", " ab", "a", " a"))


async def test_neutral_values_change_nothing(bench: GatewayBench) -> None:
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1,
        "logit_bias": {},
        "bad_words": [],
        "allowed_token_ids": None,
    }
    await bench.chat(**neutral)
    sampling = bench.dispatcher.requests[0].sampling
    for name in neutral:
        assert getattr(sampling, name) == getattr(PLAIN, name)


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty", "between -2 and 2"),
        ({"presence_penalty": -3}, "presence_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 100"),
        ({"logit_bias": {"70": 100.5}}, "logit_bias.70", "between -100 and 100"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "0 to 299"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "0 to 299"),
        ({"logit_bias": {"07": 1}}, "logit_bias", "token ids as keys"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "token ids as keys"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids as keys"),
        ({"logit_bias": {str(one): 1 for one in range(MAX_LOGIT_BIAS + 1)}}, "logit_bias", f"most {MAX_LOGIT_BIAS}"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "omit the field"),
        ({"allowed_token_ids": [300]}, "allowed_token_ids", "0 to 299"),
        ({"bad_words": [""]}, "bad_words", "1 to 256"),
        ({"bad_words": ["x" * 257]}, "bad_words", "1 to 256"),
        ({"bad_words": ["a"] * (MAX_BAD_WORDS // 2 + 1)}, "bad_words", f"most {MAX_BAD_WORDS // 2} words"),
        ({"bad_words": ["x" * 250 + str(one) for one in range(10)]}, "bad_words", "tokens"),
    ],
)  # fmt: skip
async def test_a_wrong_value_is_refused(
    bench: GatewayBench, fields: dict[str, object], param: str, expected: str
) -> None:
    response = await bench.chat(**fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert expected in error["message"]
    assert not bench.dispatcher.requests


async def test_generate_names_the_fields_inside_sampling_params(bench: GatewayBench) -> None:
    response = await bench.post("/generate", {"text": "a", "sampling_params": {"presence_penalty": 3}})
    assert response.json()["error"]["param"] == "sampling_params.presence_penalty"
    response = await bench.post("/generate", {"text": "a", "sampling_params": {"bad_words": ["a"]}})
    assert "a field of /v1/chat/completions and /v1/completions" in response.json()["error"]["message"]


async def test_contradictory_fields_are_refused(bench: GatewayBench) -> None:
    (a,) = bench.dispatcher.tokenizer.encode("a")
    stopped = {"allowed_token_ids": [70], "stop_token_ids": [70], "max_tokens": 5}
    assert (await bench.chat(**stopped)).status_code == 200
    for fields in ({**stopped, "min_tokens": 1}, {"allowed_token_ids": [a], "bad_words": ["a"]}):
        response = await bench.chat(**fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "allowed_token_ids"
        assert "leaves no token" in response.json()["error"]["message"]
