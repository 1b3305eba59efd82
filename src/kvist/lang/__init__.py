"""The front-end language: programs of prompts, generations and choices, planned into prefill and decode work.

    import kvist.lang as kv

    @kv.function
    def review(s, text):
        s += kv.user("Essay: " + text)
        s += kv.assistant(kv.select("verdict", ["good", "bad"]))

    state = review.run(text=..., backend="http://127.0.0.1:30000")

The words are those of SGLang's language. docs/language.md has the tutorial and the reference.
"""

from kvist.errors import ProgramError, ProgramTimeout
from kvist.execution.choices import ChoicesMethod
from kvist.lang.endpoint import Endpoint, OpenAI, RuntimeEndpoint, set_default_backend
from kvist.lang.expressions import (
    Expression,
    assistant,
    assistant_begin,
    assistant_end,
    gen,
    gen_int,
    gen_string,
    select,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
)
from kvist.lang.function import Function, function
from kvist.lang.program_state import ProgramState
from kvist.lang.state import Forks, State
from kvist.lang.tools import tool

token_length_normalized = ChoicesMethod.TOKEN_LENGTH_NORMALIZED
greedy_token_selection = ChoicesMethod.GREEDY_TOKEN_SELECTION
unconditional_likelihood_normalized = ChoicesMethod.UNCONDITIONAL_LIKELIHOOD_NORMALIZED

__all__ = [
    "ChoicesMethod",
    "Endpoint",
    "Expression",
    "Forks",
    "Function",
    "OpenAI",
    "ProgramError",
    "ProgramState",
    "ProgramTimeout",
    "RuntimeEndpoint",
    "State",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "greedy_token_selection",
    "select",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "tool",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
]
