"""A chat of several turns with a tool: while the tool runs, the next turn's known part is computed."""

from __future__ import annotations

import time
from typing import Any

import kvist.lang as kv
from texts import run_example, sentences

TOOL_S = 0.2  # as a database that takes its time


@kv.tool(timeout_s=10)
def search(query: str) -> str:
    """Return a passage about the query."""
    time.sleep(TOOL_S)
    return sentences(len(query), 12)


@kv.function
def chat_tools(s: kv.State, questions: list[str]) -> None:
    s += kv.system("You answer from what a search has found. " * 6)
    for number, question in enumerate(questions):
        s += kv.user(question)
        s += kv.assistant("Search for: " + kv.gen(f"query{number}", max_tokens=8, stop="\n"))
        query = str(s[f"query{number}"])
        s += kv.user_begin() + "The search has found the following passages, of which some are useless. "
        s += search(query) + kv.user_end()
        s += kv.assistant("Answer: " + kv.gen(f"answer{number}", max_tokens=16, stop="\n"))


def arguments(count: int = 4, length: int = 1) -> list[dict[str, Any]]:
    asked = [
        [f"What happened? {sentences(10 * chat + turn, 3 * length)}" for turn in range(3)] for chat in range(count)
    ]
    return [{"questions": questions} for questions in asked]


if __name__ == "__main__":
    run_example(chat_tools, arguments(1), lambda state: state.text())
