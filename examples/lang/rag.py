"""An answer from twenty passages: each one is judged by itself, the useful ones are read together."""

from __future__ import annotations

from typing import Any

import kvist.lang as kv
from texts import run_example, sentences

NUM_PASSAGES, NUM_READ = 20, 4


@kv.function
def rag(s: kv.State, question: str, passages: list[str]) -> None:
    s += kv.system("You answer questions from passages. " * 6)
    s += kv.user("The question: " + question)
    forks = s.fork(len(passages))
    forks += [kv.user(f"Does this passage help? {passage}") for passage in passages]
    forks += kv.assistant(kv.select("helps", ["yes", "no"]))
    forks.join()
    scores: list[Any] = [branch.get_meta_info("helps")["scores"] for branch in forks]
    ranked = sorted(range(len(passages)), key=lambda index: scores[index]["no"] - scores[index]["yes"])
    s += kv.user("Read these: " + " ".join(passages[index] for index in ranked[:NUM_READ]) + " Now answer.")
    s += kv.assistant(kv.gen("answer", max_tokens=32, stop="\n"))


def arguments(count: int = 2, length: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "question": f"What is told of the year {1900 + number}?",
            "passages": [sentences(100 * number + passage, 8 * length) for passage in range(NUM_PASSAGES)],
        }
        for number in range(count)
    ]


if __name__ == "__main__":
    run_example(rag, arguments(1), lambda state: state["answer"])
