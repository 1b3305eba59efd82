"""litellm: chats with tools, whole and streamed; Anthropic's messages; responses."""

import os
from typing import Any

import litellm

URL = os.environ["KVIST_URL"]
schema = {"type": "object", "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}}}
tool = {"type": "function", "function": {"name": "report", "description": "reports", "parameters": schema}}
question = {"role": "user", "content": "How warm is Oslo?"}
ours: dict[str, Any] = {"model": "hosted_vllm/tiny", "api_base": f"{URL}/v1", "api_key": "none"}
message = litellm.completion(messages=[question], tools=[tool], **ours).choices[0].message
assert message.tool_calls[0].function.arguments == '{"city": "Oslo", "degrees": 7}'
result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "7"}
stream = litellm.completion(messages=[question, message, result], tools=[tool], stream=True, **ours)
assert "".join(piece.choices[0].delta.content or "" for piece in stream) == "It is 7 degrees in Oslo."
claude: dict[str, Any] = {"model": "anthropic/tiny", "api_base": URL, "api_key": "none"}
message = litellm.completion(messages=[question], tools=[tool], max_tokens=256, **claude).choices[0].message
assert message.tool_calls[0].function.arguments == '{"city": "Oslo", "degrees": 7}'
response: Any = litellm.responses(model="openai/tiny", input="Hello", api_base=f"{URL}/v1", api_key="none")
assert response.output[-1].content[0].text == "It is 7 degrees in Oslo."
