"""Texts for the examples, the same in every run; and their common command line."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kvist.lang as kv

_SUBJECTS = ("The river", "A farmer", "The old bridge", "My neighbour", "The library", "A storm", "The teacher")
_VERBS = ("changed", "remembers", "needs", "built", "forgot", "follows", "explains", "lost")
_OBJECTS = ("the harvest", "a quiet road", "the winter", "an early train", "the market", "its history", "the shore")


def sentences(seed: int, count: int) -> str:
    """Return `count` short sentences, about ten tokens each."""
    draw = random.Random(seed)
    return " ".join(
        f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)} in {draw.randint(1800, 2020)}."
        for _ in range(count)
    )


def run_example(
    program: kv.Function, arguments: Sequence[Mapping[str, Any]], show: Callable[[kv.ProgramState], object]
) -> None:
    """Run the program for each mapping of arguments on the server of the command line; print results and the plan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000", help="the server")
    parser.add_argument("--no-plan", action="store_true", help="send the requests one by one: the results are the same")
    parser.add_argument("--seed", type=int, help="of all random choices")
    given = parser.parse_args()
    kv.set_default_backend(given.url)
    states = program.run_batch(arguments, progress_bar=True, temperature=0, plan=not given.no_plan, seed=given.seed)
    for state in states:
        print(show(state))
    print(states[0].explain())
