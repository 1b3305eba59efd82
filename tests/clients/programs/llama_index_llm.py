"""llama-index: a chat, a stream, and a call of a tool through OpenAILike."""

import os
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def report(city: str, degrees: int) -> str:
    """Report the weather."""
    return f"{city}: {degrees}"


model: Any = OpenAILike(
    model="tiny",
    api_base=f"{os.environ['KVIST_URL']}/v1",
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=8000,
)
question = [ChatMessage(role="user", content="How warm is Oslo?")]
assert model.chat(question).message.content == "It is 7 degrees in Oslo."
assert "".join(piece.delta for piece in model.stream_chat(question)) == "It is 7 degrees in Oslo."
tool: Any = FunctionTool.from_defaults(report)
calls = model.get_tool_calls_from_response(model.chat_with_tools([tool], user_msg="How warm is Oslo?"))
assert calls[0].tool_kwargs == {"city": "Oslo", "degrees": 7}
