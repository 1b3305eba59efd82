"""POST /v1/continuations/score: engine requests, response, and errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.request import Role
from kvist.testing.gateway_bench import GatewayBench, gateway_bench

PATH = "/v1/continuations/score"


async def score(bench: GatewayBench, **fields: object) -> Any:
    response = await bench.post(PATH, fields)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(bench: GatewayBench, **fields: object) -> tuple[str, str]:
    """Return the field and the message of the error."""
    response = await bench.post(PATH, fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert not bench.dispatcher.requests
    return error["param"], error["message"]


async def test_each_continuation_gets_its_tokens_and_their_logprobs(bench: GatewayBench) -> None:
    ids = bench.dispatcher.tokenizer.encode
    answer = await score(bench, prompt="abc", continuations=["de", "f", [65], "de"])
    assert [each["index"] for each in answer["results"]] == [0, 1, 2, 3]
    assert [each["token_ids"] for each in answer["results"]] == [ids("de"), ids("f"), [65], ids("de")]
    # the scripted engine gives -position, and for tokens beside them -id
    assert [each["logprobs"] for each in answer["results"]] == [[-3, -4], [-ids("f")[0]], [-65], [-3, -4]]
    assert [each["logprob"] for each in answer["results"]] == [-7, -ids("f")[0], -65, -7]
    assert (answer["object"], answer["model"], answer["worker"]) == ("continuations.score", "tiny", "p:1")
    assert answer["cached_tokens"] == {"device": 1, "host": 2, "storage": 1}
    assert answer["computed_tokens"] == 5 - 4
    assert answer["usage"]["prompt_tokens"] == 3 + 2 + 1 + 1 + 2
    assert "unconditional_logprobs" not in answer["results"][0]


async def test_the_requests_of_a_group_share_the_prompt_and_generate_nothing(bench: GatewayBench) -> None:
    await score(bench, prompt="abc", continuations=["de", "fgh", "i"], session_id="s", kvist={"role": "prefill"})
    first, second = bench.dispatcher.requests
    assert first.prompt_token_ids == (*bench.dispatcher.tokenizer.encode("abcde"),)
    assert second.num_shared_tokens == first.num_shared_tokens == 3
    assert first.sampling.prompt_logprobs_start == 3
    assert first.sampling.max_tokens == second.sampling.max_tokens == 0
    assert first.sampling.logprob_token_ids == (*bench.dispatcher.tokenizer.encode("i"),)
    assert second.sampling.logprob_token_ids == ()
    group, other = bench.dispatcher.placements
    assert group == other
    assert group.group
    assert group.session
    assert group.role is Role.PREFILL


async def test_unconditional_logprobs_follow_the_start_token_or_lack_the_first(bench: GatewayBench) -> None:
    answer = await score(bench, prompt="abc", continuations=["de", "f"], unconditional=True)
    assert [each["unconditional_logprobs"] for each in answer["results"]] == [[None, -1], [None]]
    assert answer["results"][0]["logprobs"] == [-3, -4]
    assert [len(each.prompt_token_ids) for each in bench.dispatcher.requests] == [5, 2]


async def test_a_chat_is_scored_behind_its_generation_prompt(bench: GatewayBench) -> None:
    await score(bench, messages=[{"role": "user", "content": "hi"}], continuations=["x"])
    text = bench.dispatcher.tokenizer.decode(bench.dispatcher.requests[0].prompt_token_ids)
    assert text == "<user>hix"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a"}, None),
        ({"prompt": "a", "continuations": []}, "continuations"),
        ({"prompt": "a", "continuations": ["b", ""]}, "continuations[1]"),
        ({"prompt": "a", "continuations": [[1], []]}, "continuations[1]"),
        ({"prompt": "a", "continuations": [[300]]}, "continuations[0]"),
        ({"prompt": "a", "continuations": [[-1]]}, "continuations[0]"),
        ({"prompt": "a", "continuations": ["b"] * 129}, "continuations"),
        ({"prompt": "a", "continuations": ["b" * 200]}, "continuations[0]"),
        ({"prompt": "a", "continuations": ["b" * (4097 * 256)]}, "continuations[0]"),
        ({"prompt": "a", "continuations": [{}]}, "continuations[0]"),
        ({"prompt": "", "continuations": ["b"]}, "prompt"),
        ({"prompt": [], "continuations": ["b"]}, "prompt"),
        ({"prompt": [300], "continuations": ["b"]}, "prompt"),
        ({"prompt": "a" * 201, "continuations": ["b"]}, "prompt"),
        ({"continuations": ["b"]}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "continuations": ["b"]}, "prompt"),
        ({"prompt": "a", "continuations": ["b"], "max_tokens": 1}, "max_tokens"),
        ({"prompt": "a", "continuations": ["b"], "kvist": {"report": True}}, "kvist.report"),
        ({"prompt": "a", "continuations": ["b"], "kvist": {"role": "x"}}, "kvist.role"),
    ],
)
async def test_a_faulty_field_is_named(bench: GatewayBench, fields: dict[str, object], param: str | None) -> None:
    found, message = await refused(bench, **fields)
    assert found == param
    assert message


async def test_a_port_of_a_prefill_worker_names_the_router() -> None:
    made = gateway_bench(own_role=Role.PREFILL)
    async with made.client:
        response = await made.post(PATH, {"prompt": "a", "continuations": ["b"]})
    assert response.status_code == 400
    assert "router" in response.json()["error"]["message"]


async def test_the_endpoints_of_other_servers_name_this_one(bench: GatewayBench) -> None:
    for path in ("/score", "/v1/score"):
        response = await bench.post(path, {})
        assert response.status_code == 404
        assert PATH in response.json()["error"]["message"]
