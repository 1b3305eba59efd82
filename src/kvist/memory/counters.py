"""The counters of the page copier, between the device pool and the host tier."""

from __future__ import annotations

from kvist.counter import Counter, CounterGroup

COPY_COUNTERS = CounterGroup(
    owner="memory",
    section="Cache tiers",
    counters=(
        Counter(name="host_loads", unit="copies", text="copies from the host tier"),
        Counter(name="host_load_bytes", unit="bytes", text="bytes copied from the host tier"),
        Counter(name="host_load_seconds", unit="seconds", text="total time of copies from the host tier"),
        Counter(name="host_backups", unit="copies", text="copies to the host tier"),
        Counter(name="host_backup_bytes", unit="bytes", text="bytes copied to the host tier"),
        Counter(name="host_backup_seconds", unit="seconds", text="total time of copies to the host tier"),
    ),
)
