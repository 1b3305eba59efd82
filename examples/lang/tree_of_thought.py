"""A tree of thoughts, three levels deep: each thought has three continuations, and the best path is kept by scores.

The method is from Yao et al., "Tree of Thoughts" (2023).
"""

from __future__ import annotations

from typing import Any

import kvist.lang as kv
from texts import run_example, sentences

FAN_OUT, DEPTH = 3, 3


def _grow(s: kv.State, depth: int) -> tuple[float, str]:
    """Add a level of thoughts; return the score of the best path below the state, and its last thought."""
    forks = s.fork(FAN_OUT)
    forks += kv.user("The next step of the solution?") + kv.assistant(
        kv.gen("thought", max_tokens=16, temperature=0.8, stop="\n")
    )
    forks += kv.user("Is this step right?") + kv.assistant(kv.select("verdict", ["yes", "no"]))
    forks.join()
    if depth > 1:
        below = [_grow(branch, depth - 1) for branch in forks]
    else:
        below = [(0.0, str(branch["thought"])) for branch in forks]
    scored = []
    for branch, (score, thought) in zip(forks, below, strict=True):
        scores: Any = branch.get_meta_info("verdict")["scores"]
        scored.append((score + scores["yes"] - scores["no"], thought))
    return max(scored)


@kv.function
def tree_of_thought(s: kv.State, task: str) -> tuple[float, str]:
    s += kv.system("You solve tasks in small steps.")
    s += kv.user(task)
    return _grow(s, DEPTH)


def arguments(count: int = 1, length: int = 1) -> list[dict[str, Any]]:
    return [{"task": f"Order these events. {sentences(number, 20 * length)}"} for number in range(count)]


if __name__ == "__main__":
    run_example(tree_of_thought, arguments(1), lambda state: state.ret_value)
