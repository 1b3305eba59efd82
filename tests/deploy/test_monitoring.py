"""The Grafana dashboard and the alert rules name metrics, labels and pages that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import grafana
from kvist.deploy.pods import QUEUE_METRIC
from metrics_page import NODES, families

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
RULES = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
OF_PROMETHEUS = {"instance", "job", "pod", "namespace", "le"}  # labels that a scrape or a histogram adds
FUNCTIONS = {
    *("sum", "max", "min", "avg", "rate", "increase", "histogram_quantile", "max_over_time", "by", "label_values")
}
WORD = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")


def exported() -> dict[str, set[str]]:
    """Return the labels of each series that Kvist exports, by its name."""
    found: dict[str, set[str]] = {}
    for section, family in families():
        labels = set(getattr(family, "_labelnames", ())) | {name for sample in family.samples for name in sample.labels}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        names = [f"{name}_{part}" for part in ("bucket", "sum", "count")] if family.type == "histogram" else [name]
        of_worker = {"worker", "role"} if section != NODES and "worker" in labels else set[str]()
        for each in names:
            found.setdefault(each, set()).update(labels | of_worker)
    return found


EXPORTED = exported()


def problems(query: str) -> Iterator[str]:
    """Yield the names in a PromQL query that do not exist: of metrics, of their labels, of functions."""
    names = {name for name in WORD.findall(re.sub(r'"[^"]*"', "", query)) if ":" in name}
    labels = set[str]().union(*(EXPORTED.get(name, set()) for name in names)) | OF_PROMETHEUS
    yield from (f"the metric {name}" for name in sorted(names - EXPORTED.keys()))
    if not names:
        yield "no metric of Kvist"
    for metric, selector in re.findall(r"([A-Za-z_:][A-Za-z0-9_:]*)\{([^}]*)\}", query):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector):
            if label not in EXPORTED.get(metric, set()) | OF_PROMETHEUS:
                yield f"the label {label} of {metric}"
    for grouped in re.findall(r"by \(([^)]*)\)", query):
        yield from (f"the label {name}" for name in re.findall(r"\w+", grouped) if name not in labels)
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|by \([^)]*\)', "", query)
    yield from (f"the word {word}" for word in WORD.findall(bare) if word not in FUNCTIONS | names | labels)
    if query.count("(") != query.count(")") or query.count("{") != query.count("}"):
        yield "brackets that do not match"


def dashboard() -> Any:
    return json.loads((ROOT / "deploy" / "grafana" / "kvist.json").read_text(encoding="utf-8"))


def queries() -> list[str]:
    panels = dashboard()["panels"]
    variables = [each["query"]["query"] for each in dashboard()["templating"]["list"] if each["type"] == "query"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())] + variables


def test_the_dashboard_is_what_the_script_writes() -> None:
    written = (ROOT / "deploy" / "grafana" / "kvist.json").read_text(encoding="utf-8")
    assert written == grafana.page(), "python scripts/grafana.py"


def test_every_query_of_the_dashboard_names_metrics_and_labels_that_exist() -> None:
    assert len(queries()) > 50
    found = {query: wrong for query in queries() if (wrong := list(problems(query.replace("$__rate_interval", "5m"))))}
    assert found == {}


def test_the_autoscaler_scales_by_a_metric_that_exists_under_the_name_that_the_docs_give_it() -> None:
    exists = QUEUE_METRIC.replace("_", ":", 1)
    assert exists in EXPORTED
    (text,) = re.findall(r"```yaml\n(rules:.*?)```", (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8"), re.S)
    (rule,) = yaml.safe_load(text)["rules"]
    assert rule["name"]["as"] == QUEUE_METRIC
    assert rule["seriesQuery"].startswith(exists + "{")


def test_panels_do_not_cover_each_other() -> None:
    taken = set[tuple[int, int]]()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_a_rule_names_metrics_that_exist_and_a_page_that_helps(rule: dict[str, Any]) -> None:
    assert list(problems(rule["expr"])) == []
    assert rule["labels"]["severity"] in ("warning", "critical")
    for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
        assert label in re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))), label
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page in ("docs/operations.md", "docs/failure-modes.md")
    headings = re.findall(r"(?m)^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"))
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert anchor in anchors


def test_alerts_have_different_names() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) > 10
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("sum(kvist:no_such_metric)", "the metric kvist:no_such_metric"),
        ("sum(rate(kvist:time_to_first_token_seconds[5m]))", "the metric kvist:time_to_first_token_seconds"),
        ('kvist:workers{colour="red"} == 0', "the label colour of kvist:workers"),
        ("sum by (colour) (kvist:workers)", "the label colour"),
        ("median(kvist:workers)", "the word median"),
        ("sum((kvist:workers)", "brackets"),
        ("up == 0", "no metric of Kvist"),
    ],
)
def test_the_check_finds_wrong_queries(query: str, words: str) -> None:
    assert any(words in problem for problem in problems(query)), list(problems(query))
