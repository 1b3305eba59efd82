"""A tree of thoughts, three levels deep: each thought has three continuations, and the best path is kept by scores.

The method is from Yao et al., "Tree of Thoughts" (2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kvist.lang as kv
from texts import run_example, sentences

FAN_OUT, DEPTH = 3, 3


def _grow(s: kv.State, depth: int) -> Iterator[list[kv.State]]:
    """Add `depth` levels of thoughts; yield each path from the first thought to a last one. Waits for no result."""
    forks = s.fork(FAN_OUT)
    forks += kv.user("The next step of the solution?") + kv.assistant(
        kv.gen("thought", max_tokens=16, temperature=0.8, stop="\n")
    )
    forks += kv.user("Is this step right?") + kv.assistant(kv.select("verdict", ["yes", "no"]))
    forks.join()
    for branch in forks:
        if depth == 1:
            yield [branch]
        else:
            yield from ([branch, *path] for path in _grow(branch, depth - 1))


def _score(branch: kv.State) -> float:
    scores: Any = branch.get_meta_info("verdict")["scores"]
    return float(scores["yes"] - scores["no"])


@kv.function
def tree_of_thought(s: kv.State, task: str) -> tuple[float, str]:
    s += kv.system("You solve tasks in small steps.")
    s += kv.user(task)
    paths = list(_grow(s, DEPTH))  # the whole tree, before any of its results is read
    return max((sum(map(_score, path)), str(path[-1]["thought"])) for path in paths)


def arguments(count: int = 1, length: int = 1) -> list[dict[str, Any]]:
    return [{"task": f"Order these events. {sentences(number, 20 * length)}"} for number in range(count)]


if __name__ == "__main__":
    run_example(tree_of_thought, arguments(1), lambda state: state.ret_value)
