"""openai: chats, parsed answers, tools, responses; synchronous and asynchronous."""

import asyncio
import os
from typing import Any

import openai
from pydantic import BaseModel

URL = os.environ["KVIST_URL"]


class Weather(BaseModel):
    city: str
    degrees: int


def main() -> None:
    client: Any = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    question = {"role": "user", "content": "How warm is Oslo?"}
    parsed = client.chat.completions.parse(model="tiny", messages=[question], response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(city="Oslo", degrees=7)
    tool = openai.pydantic_function_tool(Weather, name="report")
    with client.chat.completions.stream(model="tiny", messages=[question], tools=[tool]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == Weather(city="Oslo", degrees=7)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "7"}
    again = client.chat.completions.create(
        model="tiny", messages=[question, message.to_dict(), result], tools=[tool], tool_choice="auto"
    )
    assert again.choices[0].message.content == "It is 7 degrees in Oslo."

    response = client.responses.parse(model="tiny", input="How warm is Oslo?", text_format=Weather)
    assert response.output_parsed == Weather(city="Oslo", degrees=7)
    function = {"type": "function", **{name: tool["function"][name] for name in ("name", "parameters", "strict")}}
    first = client.responses.create(model="tiny", input="How warm is Oslo?", tools=[function], tool_choice="required")
    call = next(item for item in first.output if item.type == "function_call")
    second = client.responses.create(
        model="tiny",
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "7"}],
        tools=[function],
    )
    assert second.output_text == "It is 7 degrees in Oslo."
    asyncio.run(stream_response())


async def stream_response() -> None:
    client: Any = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none")
    async with client.responses.stream(model="tiny", input="Hello", reasoning={"effort": "low"}) as stream:
        final = await stream.get_final_response()
    assert final.output_text == "It is 7 degrees in Oslo."
    await client.responses.delete(final.id)


main()
