"""The Responses and Messages APIs give the tokens of the same chat, over a pair and at a unified worker."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from kvist.api.messages import Message
from kvist.api.response_objects import ResponseObject
from tests.e2e.conftest import Cluster

CONTENT = "Name three rivers of Europe, and the seas into which they flow. Then say which of them is the longest one."
QUESTION = {"role": "user", "content": CONTENT}
FEW = {"temperature": 0, "max_tokens": 8}


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    response = httpx.post(f"{url}{path}", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("place", ["router", "unified"])
def test_an_answer_has_the_text_of_the_same_chat(settled: Cluster, place: str) -> None:
    url = getattr(settled, place)
    chat = post(url, "/v1/chat/completions", {**FEW, "messages": [QUESTION]}).json()
    text, num_prompt = chat["choices"][0]["message"]["content"], chat["usage"]["prompt_tokens"]

    message = msgspec.json.decode(post(url, "/v1/messages", {**FEW, "messages": [QUESTION]}).content, type=Message)
    assert [msgspec.to_builtins(block)["text"] for block in message.content] == [text]
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == num_prompt
    assert message.usage.cache_read_input_tokens > 0
    streamed = post(url, "/v1/messages", {**FEW, "messages": [QUESTION], "stream": True}).text
    deltas = [msgspec.json.decode(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    assert "".join(one["delta"]["text"] for one in deltas if one["type"] == "content_block_delta") == text
    counted = post(url, "/v1/messages/count_tokens", {"messages": [QUESTION]}).json()
    assert counted == {"input_tokens": num_prompt}

    asked = {"temperature": 0, "max_output_tokens": 8}
    first = post(url, "/v1/responses", {**asked, "input": CONTENT})
    response = msgspec.json.decode(first.content, type=ResponseObject)
    assert response.output[0].content[0].text == text  # type: ignore[union-attr]
    second = {**asked, "input": "And of Asia?", "previous_response_id": response.id}
    found = msgspec.json.decode(post(url, "/v1/responses", second).content, type=ResponseObject)
    assert found.usage is not None
    assert found.usage.input_tokens_details.cached_tokens >= num_prompt // 16 * 16
    conversation = [QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": "And of Asia?"}]
    again = post(url, "/v1/chat/completions", {**FEW, "messages": conversation}).json()
    assert found.output[0].content[0].text == again["choices"][0]["message"]["content"]  # type: ignore[union-attr]
    assert found.usage.input_tokens == again["usage"]["prompt_tokens"]
