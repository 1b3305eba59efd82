"""langchain-openai: with_structured_output, bind_tools, streams, and its Responses mode."""

import importlib
import os
from typing import Any

from pydantic import BaseModel

library: Any = importlib.import_module("langchain_openai")


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


chat = library.ChatOpenAI(model="tiny", base_url=f"{os.environ['KVIST_URL']}/v1", api_key="none", temperature=0)
assert chat.with_structured_output(Weather).invoke("How warm is Oslo?") == Weather(city="Oslo", degrees=7)
by_call = chat.with_structured_output(Weather, method="function_calling")
assert by_call.invoke("How warm is Oslo?") == Weather(city="Oslo", degrees=7)
answer = chat.bind_tools([Weather]).invoke("How warm is Oslo?")
assert answer.tool_calls[0]["args"] == {"city": "Oslo", "degrees": 7}
assert "".join(piece.content for piece in chat.stream("Hello")) == "It is 7 degrees in Oslo."
responses = library.ChatOpenAI(
    model="tiny", base_url=f"{os.environ['KVIST_URL']}/v1", api_key="none", use_responses_api=True
)
answer = responses.bind_tools([Weather]).invoke("How warm is Oslo?")
assert answer.tool_calls[0]["args"] == {"city": "Oslo", "degrees": 7}
assert responses.invoke("Hello").text == "It is 7 degrees in Oslo."
