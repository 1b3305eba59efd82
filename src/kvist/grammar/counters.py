"""The counters of the compilation of constraints."""

from __future__ import annotations

from kvist.counter import Counter, CounterGroup

GRAMMAR_COUNTERS = CounterGroup(
    owner="grammar",
    section="Workers, by their own reports",
    counters=(
        Counter(name="grammars_compiled", unit="grammars", text="schemas and grammars of requests that were compiled"),
        Counter(
            name="grammar_compile_seconds",
            unit="seconds",
            text="total time of compiling them, the failed ones included",
        ),
        Counter(
            name="grammar_cache_hits",
            unit="requests",
            text="requests whose schema or grammar was compiled already, or was being compiled",
        ),
        Counter(
            name="grammar_failures",
            unit="grammars",
            text="schemas and grammars that could not be compiled",
        ),
    ),
)
