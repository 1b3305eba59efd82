"""Many questions behind one long prompt with examples: the prompt is computed once, ahead of the batch, and kept."""

from __future__ import annotations

from typing import Any

import kvist.lang as kv
from texts import run_example, sentences

NUM_EXAMPLES = 50  # about 2,000 tokens


def instructions(num_examples: int) -> str:
    examples = (f"Text: {sentences(number, 2)}\nTopic: history\n" for number in range(num_examples))
    return "Name the topic of a text in one word.\n\n" + "\n".join(examples)


@kv.function
def few_shot(s: kv.State, instructions: str, question: str) -> None:
    s += kv.system(instructions)
    s += kv.user(f"Text: {question}\nTopic:")
    s += kv.assistant(kv.gen("topic", max_tokens=8, stop="\n"))


def arguments(count: int = 100, length: int = 1) -> list[dict[str, Any]]:
    prompt = instructions(NUM_EXAMPLES * length)
    return [{"instructions": prompt, "question": sentences(1000 + number, 1)} for number in range(count)]


if __name__ == "__main__":
    run_example(few_shot, arguments(10), lambda state: state["topic"])
