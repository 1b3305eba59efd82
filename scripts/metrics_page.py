"""Writes the tables of docs/metrics.md, from the metrics that a gateway exports and the counters that rooms declare.

    python scripts/metrics_page.py

tests/test_docs.py fails if the page has other tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import Metric

from kvist.agents_api.response_store import store_families as response_families
from kvist.engine.counters import COUNTER_BY_NAME, ENGINE_COUNTERS
from kvist.metrics import GatewayMetrics
from kvist.nodes.node_metrics import StoreFigures, master_families, store_families
from kvist.page_index.page_feed import KnownPages
from kvist.request import Role, WorkerId
from kvist.router.members import MemberCounts
from kvist.router.stream import ClusterSnapshot, WorkerSnapshot
from kvist.server.constraints import grammar_families
from kvist.server.worker_metrics import member_families, worker_families
from kvist.wire import LoadReport

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
GATEWAY, WORKERS, TIERS, CPU = "Requests at this gateway", "Workers, by their own reports", "Cache tiers", "CPU time"
NODES = "Nodes of a page pool"
SECTIONS = (GATEWAY, WORKERS, TIERS, CPU, NODES)
_TABLE = "<!-- {}: made by scripts/metrics_page.py -->\n(.*?)<!-- end -->\n"


def families() -> Iterator[tuple[str, Metric]]:
    """Yield the section and the family of every metric, as exported for one worker that has counted nothing."""
    load = LoadReport(
        num_running=0,
        num_waiting=0,
        num_free_pages=1,
        num_cached_pages=0,
        num_owned_pages=0,
        num_in_flight_pages=0,
        totals=dict.fromkeys(COUNTER_BY_NAME, 0.0),
    )
    worker = WorkerSnapshot(
        worker_id=WorkerId("w"),
        role=Role.UNIFIED,
        alive=True,
        spec=None,
        load=load,
        known_pages=KnownPages(num_listings={"gap": 0}),
    )
    for family in GatewayMetrics().collect():
        yield GATEWAY, family
    for family in grammar_families(None):
        yield GATEWAY, family
    for family in response_families(0, 0):
        yield GATEWAY, family
    for family in worker_families(ClusterSnapshot(workers=(worker,))):
        if family.name.startswith("kvist:storage_pool_"):
            yield TIERS, family
        elif "worker" not in labels_of(family):
            yield GATEWAY, family
        elif re.match("kvist:(worker_)?(host|storage)_", family.name):
            yield TIERS, family
        else:
            yield WORKERS, family
    for family in member_families(MemberCounts()):
        yield GATEWAY, family
    for family in (*master_families(), *store_families(StoreFigures(state="serving", ssd_limit_bytes=1))):
        yield NODES, family


def labels_of(family: Metric) -> tuple[str, ...]:
    return tuple(getattr(family, "_labelnames", ()))


def exported_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def rows() -> Iterator[tuple[str, str]]:
    """Yield the section and the line of every metric: gauges and the like first, then the counters room by room."""
    for section, family in families():
        if family.name.removeprefix("kvist:worker_") not in COUNTER_BY_NAME:
            labels = ",".join(label for label in labels_of(family) if label not in ("worker", "role"))
            name = exported_name(family) + (f"{{{labels}}}" if labels else "")
            yield section, f"| `{name}` | {family.type} | {family.documentation} |\n"
    for group in ENGINE_COUNTERS:
        for counter in group.counters:
            kind = f"counter, {counter.unit}"
            yield group.section, f"| `kvist:worker_{counter.name}_total` | {kind} | {counter.text} |\n"


def table(section: str) -> str:
    assert {each for each, _ in rows()} == set(SECTIONS)
    return "| metric | type | meaning |\n|---|---|---|\n" + "".join(row for each, row in rows() if each == section)


def tables_of(page: str) -> dict[str, str]:
    """Return the table of each section in the text of the page."""
    found = {section: re.search(_TABLE.format(section), page, re.DOTALL) for section in SECTIONS}
    return {section: "" if match is None else match[1] for section, match in found.items()}


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for section, old in tables_of(page).items():
        begin = f"<!-- {section}: made by scripts/metrics_page.py -->\n"
        head, rest = page.split(begin)
        page = head + begin + table(section) + rest.removeprefix(old)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
