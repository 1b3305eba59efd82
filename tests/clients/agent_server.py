"""A gateway without engines for client libraries: it calls the first tool that it is offered, once, then answers.

The programs of this folder run against it over HTTP when their requests are recorded (scripts/clients.py), and the test
replays the records against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvist.request import EngineRequest, FinishReason
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from kvist.testing.scripted_dispatcher import BYTE_MODEL, ScriptedDispatcher
from kvist.testing.tokenizers import byte_tokenizer

MODEL = "tiny"
ARGUMENTS = '{"city": "Oslo", "degrees": 7}'
TEXT = "It is 7 degrees in Oslo."
_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}?{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# <think> </think> #}"
)


class AgentDispatcher(ScriptedDispatcher):
    def _answer_to(self, request: EngineRequest) -> tuple[Sequence[int], FinishReason]:
        constraint = request.sampling.constraint
        prompt = self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        names = prompt.partition("<")[0].split("?")[:-1] if "<user>" in prompt else []  # of a chat's tools
        if names and "<tool>" not in prompt:
            call = f'<tool_call>{{"name": "{names[0]}", "arguments": {ARGUMENTS}}}</tool_call>'
            self.answer = f"<think>Which city?</think>{call}"
        elif constraint is not None and not names and "properties" in constraint.text:
            self.answer = ARGUMENTS
        else:
            self.answer = TEXT
        return super()._answer_to(request)


def agent_bench() -> GatewayBench:
    spec = msgspec.structs.replace(BYTE_MODEL, max_model_len=8000, num_pages=1000)
    return gateway_bench(dispatcher=AgentDispatcher(byte_tokenizer(chat_template=_TEMPLATE), spec=spec))
