"""pydantic-ai: an agent with a tool, by chats and by responses, and an answer of a type."""

import os
from typing import Any

import pydantic_ai
from pydantic import BaseModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: str
    degrees: int


def report(city: str, degrees: int) -> str:
    """Report the weather."""
    return f"{city}: {degrees}"


provider = OpenAIProvider(base_url=f"{os.environ['KVIST_URL']}/v1", api_key="none")
for model_type in (OpenAIChatModel, OpenAIResponsesModel):
    model: Any = model_type("tiny", provider=provider)
    agent: Any = pydantic_ai.Agent(model, tools=[report], system_prompt="Be brief.")
    assert agent.run_sync("How warm is Oslo?").output == "It is 7 degrees in Oslo."
    typed: Any = pydantic_ai.Agent(model, output_type=Weather)
    assert typed.run_sync("How warm is Oslo?").output == Weather(city="Oslo", degrees=7)
