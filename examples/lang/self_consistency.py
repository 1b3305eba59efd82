"""Eight answers to one question, and their majority: one prefix, eight branches with seeds of their own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import kvist.lang as kv
from texts import run_example, sentences

NUM_ANSWERS = 8


@kv.function
def self_consistency(s: kv.State, question: str) -> str:
    s += kv.system("Solve the task step by step. The last word is the answer.")
    s += kv.user(question)
    forks = s.fork(NUM_ANSWERS)
    forks += kv.assistant(kv.gen("thoughts", max_tokens=24, temperature=0.8))
    forks.join()
    last_words = [str(branch["thoughts"]).split()[-1:] for branch in forks]
    counted = Counter(word[0] for word in last_words if word).most_common(1)
    return counted[0][0] if counted else ""


def arguments(count: int = 4, length: int = 1) -> list[dict[str, Any]]:
    return [{"question": f"Which year comes first? {sentences(number, 30 * length)}"} for number in range(count)]


if __name__ == "__main__":
    run_example(self_consistency, arguments(1), lambda state: state.ret_value)
