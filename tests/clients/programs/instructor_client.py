"""instructor: a model of pydantic by tools, and by a JSON schema."""

import os
from typing import Any

import instructor
import openai
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    degrees: int


base: Any = openai.OpenAI(base_url=f"{os.environ['KVIST_URL']}/v1", api_key="none")
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client: Any = instructor.from_openai(base, mode=mode)
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "How warm is Oslo?"}], response_model=Weather
    )
    assert found.model_dump() == {"city": "Oslo", "degrees": 7}, mode
