"""openai-agents: an agent with a tool, by responses (whole and streamed) and by chats."""

import asyncio
import os
from typing import Any

import agents
import openai


@agents.function_tool
def report(city: str, degrees: int) -> str:
    """Report the weather."""
    return f"{city}: {degrees}"


async def main() -> None:
    agents.set_tracing_disabled(True)
    client: Any = openai.AsyncOpenAI(base_url=f"{os.environ['KVIST_URL']}/v1", api_key="none")
    for model_type in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
        model: Any = model_type(model="tiny", openai_client=client)
        agent: Any = agents.Agent(name="Weather", instructions="Be brief.", tools=[report], model=model)
        found = await agents.Runner.run(agent, "How warm is Oslo?")
        assert found.final_output == "It is 7 degrees in Oslo.", found
        streamed = agents.Runner.run_streamed(agent, "How warm is Oslo?")
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == "It is 7 degrees in Oslo."


asyncio.run(main())
