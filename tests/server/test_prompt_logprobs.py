"""Logprobs of prompts in the forms of OpenAI (`echo`), vLLM (`prompt_logprobs`) and SGLang (`logprob_start_len`)."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.testing.gateway_bench import GatewayBench, events_of
from tests.server.conftest import MakeBench


def text_of(bench: GatewayBench, token_id: int) -> str:
    found: str = bench.dispatcher.tokenizer.token_text(token_id)
    return found


async def complete(bench: GatewayBench, prompt: object, **fields: object) -> Any:
    response = await bench.post("/v1/completions", {"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def generate(bench: GatewayBench, **fields: object) -> Any:
    response = await bench.post("/generate", fields)
    assert response.status_code == 200, response.text
    return response.json()


# ---------------------------------------------------------------- echo


async def test_an_echoed_prompt_has_the_logprobs_of_its_tokens_before_those_of_the_answer(bench: GatewayBench) -> None:
    body = await complete(bench, "héy", echo=True, logprobs=1, max_tokens=2)
    (choice,) = body["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "héyhe"
    assert "".join(found["tokens"][:1] + found["tokens"][3:]) == "hyhe"
    assert found["token_logprobs"] == [None, -1.0, -2.0, -3.0, -0.5, -0.5]
    assert found["text_offset"] == [0, 1, 1, 2, 3, 4]  # the two bytes of é begin at the same character
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][3] == {text_of(bench, 70): -0.25, "y": -3.0}
    assert set(found["top_logprobs"][4]) == {"h"}
    assert "prompt_logprobs" not in choice
    assert body["usage"]["completion_tokens"] == 2


async def test_max_tokens_0_scores_the_prompt_alone(bench: GatewayBench) -> None:
    body = await complete(bench, "hey", echo=True, logprobs=0, max_tokens=0)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hey", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["top_logprobs"][1:] == [{"e": -1.0}, {"y": -2.0}]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 0,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert bench.dispatcher.requests[0].sampling.max_tokens == 0
    assert (await complete(bench, "hey", max_tokens=0))["choices"][0]["text"] == ""


async def test_a_prompt_that_fills_the_context_can_be_scored(bench: GatewayBench) -> None:
    assert len((await complete(bench, "x" * 200, echo=True, max_tokens=0))["choices"][0]["text"]) == 200
    response = await bench.post("/v1/completions", {"prompt": "x" * 201, "echo": True, "max_tokens": 0})
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_a_stream_echoes_text_and_logprobs_of_the_prompt_in_its_first_event(
    bench: GatewayBench, max_tokens: int
) -> None:
    fields = {"prompt": "hé", "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    *chunks, _ = events_of(await bench.post("/v1/completions", {**fields, "stream": True}))
    (whole,) = (await bench.post("/v1/completions", fields)).json()["choices"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["text"].startswith("hé")
    assert choices[0]["logprobs"]["token_logprobs"][:3] == [None, -1.0, -2.0]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, expected in whole["logprobs"].items():
        assert [item for choice in choices for item in choice["logprobs"][name]] == expected
    assert len(choices) == max(1, max_tokens)


async def test_token_ids_are_echoed_without_special_tokens_and_keep_their_logprobs(bench: GatewayBench) -> None:
    ids = [256, *bench.dispatcher.tokenizer.encode("ab")]
    (choice,) = (await complete(bench, ids, echo=True, logprobs=0, max_tokens=1))["choices"]
    assert choice["text"] == "abh"
    assert choice["logprobs"]["tokens"] == ["<|end|>", "a", "b", "h"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
    (choice,) = (await complete(bench, "a<|end|>b", echo=True, logprobs=0, max_tokens=1))["choices"]
    assert choice["text"] == "a<|end|>bh"
    assert choice["logprobs"]["text_offset"] == [0, 1, 8, 9]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_lm_evals_loglikelihood_requests_are_answered(bench: GatewayBench, as_ids: bool, max_tokens: int) -> None:
    texts = ["the sun", "a"]
    tokenizer = bench.dispatcher.tokenizer
    prompts = [tokenizer.encode(text) for text in texts] if as_ids else texts
    body = {
        "model": "tiny",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    found = (await bench.post("/v1/completions", body)).json()
    for text, choice in zip(texts, sorted(found["choices"], key=lambda each: int(each["index"])), strict=True):
        logprobs = choice["logprobs"]
        scored = len(logprobs["token_logprobs"]) - max_tokens
        assert scored == len(text)
        assert sum(logprobs["token_logprobs"][1:scored]) == -sum(range(1, len(text)))
        assert all(max(top.values()) == -0.25 for top in logprobs["top_logprobs"][1:scored])


# ---------------------------------------------------------------- prompt_logprobs


async def test_prompt_logprobs_have_vllms_form_in_completions_and_chats(bench: GatewayBench) -> None:
    tokenizer = bench.dispatcher.tokenizer
    ids = tokenizer.encode("abc")
    body = await complete(bench, "abc", prompt_logprobs=1, max_tokens=1)
    expected = {
        str(ids[1]): {"logprob": -1.0, "rank": 3, "decoded_token": "b"},
        "70": {"logprob": -0.25, "rank": 1, "decoded_token": tokenizer.token_text(70)},
    }
    assert body["choices"][0]["prompt_logprobs"][:2] == [None, expected]
    assert len(body["choices"][0]["prompt_logprobs"]) == 3
    chat = (await bench.chat("x", prompt_logprobs=0)).json()
    assert len(chat["prompt_logprobs"]) == len("<user>x<assistant>")
    assert list(chat["prompt_logprobs"][1].values()) == [{"logprob": -1.0, "rank": 3, "decoded_token": "u"}]
    assert bench.dispatcher.requests[1].sampling.prompt_logprobs == 0


async def test_each_form_has_its_own_number_of_likeliest_tokens(bench: GatewayBench) -> None:
    (choice,) = (await complete(bench, "ab", echo=True, logprobs=1, prompt_logprobs=2, max_tokens=0))["choices"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2  # the likeliest token, and the prompt's own
    assert len(choice["prompt_logprobs"][1]) == 3
    assert bench.dispatcher.requests[0].sampling.prompt_logprobs == 2


async def test_named_tokens_are_listed_among_the_likeliest(bench: GatewayBench) -> None:
    fields = {"logprob_token_ids": [70, 90], "prompt_logprobs": 1, "max_tokens": 1}
    (choice,) = (await complete(bench, "ab", logprobs=1, **fields))["choices"]
    assert choice["prompt_logprobs"][1]["90"] == {
        "logprob": -90.0,
        "rank": None,
        "decoded_token": text_of(bench, 90),
    }
    assert choice["prompt_logprobs"][1]["70"]["logprob"] == -0.25
    assert choice["logprobs"]["top_logprobs"][0] == {"h": -0.5, text_of(bench, 70): -70.0, text_of(bench, 90): -90.0}
    chat = (await bench.chat("x", logprobs=True, top_logprobs=1, logprob_token_ids=[90], max_tokens=1)).json()
    (content,) = chat["choices"][0]["logprobs"]["content"]
    assert [top["logprob"] for top in content["top_logprobs"]] == [-0.5, -90.0]


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs", "0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "0 to 20"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "needs `logprobs` or `prompt_logprobs`"),
        ({"logprob_token_ids": [300], "logprobs": True}, "logprob_token_ids", "0 to 299"),
        ({"logprob_token_ids": [1] * 1025, "logprobs": True}, "logprob_token_ids", "1024"),
    ],
)
async def test_a_wrong_demand_for_logprobs_is_refused(
    bench: GatewayBench, fields: dict[str, object], param: str, expected: str
) -> None:
    error = (await bench.chat(**fields)).json()["error"]
    assert error["param"] == param
    assert expected in error["message"]


async def test_the_logprobs_of_prompts_are_bounded_before_they_are_computed(make_bench: MakeBench) -> None:
    bench = make_bench()
    body = {"prompt": ["x" * 190] * 128, "prompt_logprobs": 20, "logprob_token_ids": [1] * 30, "max_tokens": 1}
    assert (await bench.post("/v1/completions", body)).status_code == 200
    body["logprob_token_ids"] = list(range(30))
    response = await bench.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"
    assert len(bench.dispatcher.requests) == 128


# ---------------------------------------------------------------- /generate


async def test_generate_reports_the_prompt_from_logprob_start_len_on(bench: GatewayBench) -> None:
    ids = bench.dispatcher.tokenizer.encode("abcd")
    fields = {"text": "abcd", "sampling_params": {"max_new_tokens": 1}, "return_logprob": True}
    meta = (await generate(bench, **fields, logprob_start_len=1, top_logprobs_num=1))["meta_info"]
    assert meta["input_token_logprobs"] == [[None, ids[1], None], [-2.0, ids[2], None], [-3.0, ids[3], None]]
    assert meta["input_top_logprobs"] == [None, [[-0.25, 70, None]], [[-0.25, 70, None]]]
    assert "input_token_ids_logprobs" not in meta
    assert len(meta["output_token_logprobs"]) == 1
    meta = (await generate(bench, **fields))["meta_info"]  # as in SGLang: the last token of the prompt, without logprob
    assert meta["input_token_logprobs"] == [[None, ids[3], None]]
    assert bench.dispatcher.requests[1].sampling.prompt_logprobs is None


async def test_generate_scores_a_prompt_without_an_answer(bench: GatewayBench) -> None:
    fields = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    answer = await generate(bench, text="abc", **fields)
    assert answer["output_ids"] == []
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]] == [None, -1.0, -2.0]
    assert answer["meta_info"]["output_token_logprobs"] == []


async def test_generate_reports_named_tokens_and_texts(bench: GatewayBench) -> None:
    meta = (
        await generate(
            bench,
            text="ab",
            sampling_params={"max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
            token_ids_logprob=[70, 90],
            return_text_in_logprobs=True,
        )
    )["meta_info"]
    asked = [[-70.0, 70, text_of(bench, 70)], [-90.0, 90, text_of(bench, 90)]]
    assert meta["input_token_ids_logprobs"] == [None, asked]
    assert meta["output_token_ids_logprobs"] == [asked]
    assert [entry[2] for entry in meta["input_token_logprobs"] + meta["output_token_logprobs"]] == ["a", "b", "h"]


async def test_a_generate_stream_has_the_prompts_logprobs_in_its_first_and_last_event(bench: GatewayBench) -> None:
    body = {"text": "ab", "return_logprob": True, "logprob_start_len": 0, "stream": True}
    *events, _ = events_of(await bench.post("/generate", body))
    counts = [len(event["meta_info"].get("input_token_logprobs", [])) for event in events]
    assert counts == [2] + [0] * (len(events) - 2) + [2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprob_start_len": 0}, "logprob_start_len"),
        ({"token_ids_logprob": [1]}, "token_ids_logprob"),
        ({"return_logprob": True, "logprob_start_len": 1}, "logprob_start_len"),
        ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"return_logprob": True, "token_ids_logprob": [300]}, "token_ids_logprob"),
    ],
)
async def test_generate_refuses_a_wrong_demand_for_logprobs(
    bench: GatewayBench, fields: dict[str, object], param: str
) -> None:
    response = await bench.post("/generate", {"text": "a", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
