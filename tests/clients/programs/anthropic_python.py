"""anthropic: messages, streams, tools, thinking, token counts, parsed answers."""

import os
from typing import Any

import anthropic
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    degrees: int


client: Any = anthropic.Anthropic(base_url=os.environ["KVIST_URL"], api_key="none")
question = {"role": "user", "content": "How warm is Oslo?"}
tool = {"name": "report", "description": "reports", "input_schema": Weather.model_json_schema()}
asked = {"model": "tiny", "max_tokens": 2048, "system": "Be brief.", "tools": [tool]}
assert client.messages.count_tokens(model="tiny", messages=[question], tools=[tool]).input_tokens > 10
thinking = {"type": "enabled", "budget_tokens": 1024}
with client.messages.stream(messages=[question], thinking=thinking, **asked) as stream:
    message = stream.get_final_message()
assert [block.type for block in message.content] == ["thinking", "tool_use"], message
assert (message.stop_reason, message.content[1].input) == ("tool_use", {"city": "Oslo", "degrees": 7})
result = {"type": "tool_result", "tool_use_id": message.content[1].id, "content": "7"}
messages = [question, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
final = client.messages.create(messages=messages, tool_choice={"type": "auto"}, **asked)
assert final.content[0].text == "It is 7 degrees in Oslo."
assert final.usage.input_tokens > 0
parsed = client.messages.parse(model="tiny", max_tokens=256, messages=[question], output_format=Weather)
assert parsed.parsed_output == Weather(city="Oslo", degrees=7)
