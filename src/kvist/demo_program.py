"""The program at the end of `kvist demo`: three verdicts on one text at the same time, then a title."""

from __future__ import annotations

from collections.abc import Callable

import kvist.lang as kv

_TEXT = "Leaves make sugar from light, water and air. The sugar feeds the roots, the stem and the fruit."
_QUALITIES = ("clear", "short", "funny")


@kv.function
def judge(s: kv.State, text: str) -> None:
    s += kv.system("You judge texts in one word.")
    s += kv.user(f"The text: {text}")
    forks = s.fork(len(_QUALITIES))
    forks += [kv.user(f"Is the text {quality}?") for quality in _QUALITIES]
    forks += kv.assistant(kv.select("verdict", ["Yes", "No"]))
    forks.join()
    s += kv.user("Write a title for the text.")
    s += kv.assistant(kv.gen("title", max_tokens=12, stop="\n"))


def run_demo_program(url: str, show: Callable[[str], None]) -> None:
    """Run the program on the server; show its results, and its plan beside what happened. Raises `KvistError`."""
    endpoint = kv.RuntimeEndpoint(url)
    try:
        state = judge.run(text=_TEXT, backend=endpoint, temperature=0)
    finally:
        endpoint.close()
    verdicts = state["verdict"]
    assert isinstance(verdicts, list)
    said = ", ".join(f"{quality}: {verdict}" for quality, verdict in zip(_QUALITIES, verdicts, strict=True))
    show(f"A program of kvist.lang judged a text ({said}) and called it {str(state['title']).strip()!r}.")
    show("Its plan, and what happened (docs/language.md):\n")
    show(state.explain().table())
