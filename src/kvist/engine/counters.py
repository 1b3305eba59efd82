"""The counters of the engine's loop, and the collection of the counters of all rooms of an engine."""

from __future__ import annotations

from kvist.counter import Counter, CounterGroup
from kvist.grammar.counters import GRAMMAR_COUNTERS
from kvist.kv.counters import CACHE_COUNTERS
from kvist.memory.counters import COPY_COUNTERS
from kvist.scheduler.counters import SCHEDULER_COUNTERS
from kvist.store.counters import STORE_COUNTERS

LOOP_COUNTERS = CounterGroup(
    owner="engine",
    section="Workers, by their own reports",
    counters=(
        Counter(
            name="failed_steps",
            unit="steps",
            text="engine steps that failed in the model or on the device, or in which a request had no valid token, "
            "although its own fields exclude only some",
        ),
        Counter(
            name="abandoned_steps",
            unit="steps",
            text="engine steps aborted half-way because all requests of the step had ended, as their clients had "
            "disconnected; only on a CPU, where a step can take seconds",
        ),
        Counter(name="role_switches", unit="switches", text="switches of this worker to another role"),
        Counter(
            name="role_switch_seconds",
            unit="seconds",
            text="time from each switch until every router used the worker by its new role; meanwhile requests of both "
            "roles are admitted",
        ),
        Counter(
            name="undecodable_messages", unit="messages", text="messages dropped because they could not be decoded"
        ),
        Counter(
            name="refused_connections",
            unit="connections",
            text="connections to the engine's socket refused because of another cluster key, or none",
        ),
        Counter(
            name="unexpected_messages",
            unit="messages",
            text="messages dropped because their sender may not send them, or because their values are impossible",
        ),
    ),
)

CPU_COUNTERS = CounterGroup(
    owner="engine",
    section="CPU time",
    counters=(
        Counter(name="plan_cpu_seconds", unit="seconds", text="processor time spent planning steps"),
        Counter(
            name="launch_cpu_seconds",
            unit="seconds",
            text="processor time spent launching steps (on a CPU: computing them)",
        ),
        Counter(
            name="read_cpu_seconds",
            unit="seconds",
            text="processor time spent reading the results of steps that have ended",
        ),
        Counter(
            name="loop_cpu_seconds",
            unit="seconds",
            text="processor time of the engine loop: planning, launching and reading steps, and messages",
        ),
        Counter(name="process_cpu_seconds", unit="seconds", text="processor time of the engine process, all threads"),
    ),
)

ENGINE_COUNTERS = (
    SCHEDULER_COUNTERS,
    LOOP_COUNTERS,
    CACHE_COUNTERS,
    COPY_COUNTERS,
    STORE_COUNTERS,
    GRAMMAR_COUNTERS,
    CPU_COUNTERS,
)
COUNTER_BY_NAME = {counter.name: counter for group in ENGINE_COUNTERS for counter in group.counters}
