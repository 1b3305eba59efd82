"""An essay judged by five criteria: each verdict is a `select`, which is prefill work alone."""

from __future__ import annotations

from typing import Any

import kvist.lang as kv
from texts import run_example, sentences

CRITERIA = ("clear", "short", "original", "kind", "complete")
VERDICTS = ["yes", "no", "partly"]


@kv.function
def judge(s: kv.State, essay: str, criteria: list[str]) -> None:
    s += kv.system("You judge essays by one criterion at a time.")
    s += kv.user("Essay: " + essay)
    forks = s.fork(len(criteria))
    forks += [kv.user(f"Is the essay {criterion}? Answer yes, no or partly.") for criterion in criteria]
    forks += kv.assistant(kv.select("verdict", VERDICTS))
    forks.join()


def arguments(count: int = 8, length: int = 1) -> list[dict[str, Any]]:
    return [{"essay": sentences(number, 50 * length), "criteria": list(CRITERIA)} for number in range(count)]


if __name__ == "__main__":
    run_example(judge, arguments(2), lambda state: dict(zip(CRITERIA, state["verdict"], strict=True)))  # type: ignore[call-overload]
