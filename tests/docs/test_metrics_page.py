"""``docs/metrics.md``: every metric and every alert is in it, as the code and the rules have it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from relay.histogram import BOUNDS_SECONDS
from relay.ops.catalogue import ALL, Metric

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/metrics.md"
ALERTS = [
    rule
    for group in yaml.safe_load((ROOT / "conf/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


def _row(metric: Metric) -> str:
    values = dict(zip(metric.labels, metric.values, strict=False))
    labels = "; ".join(
        f"{label}: {', '.join(f'`{value}`' for value in values[label])}" if label in values else label
        for label in metric.labels
    )
    return f"| {metric.name} | {metric.type.value} | {labels} | {metric.help} |"


def rows() -> str:
    """The table of metrics."""
    return "\n".join(["| Metric | Type | Labels | What it tells |", "|---|---|---|---|", *map(_row, ALL)])


def test_the_table_of_metrics_is_the_catalogue() -> None:
    assert rows() in PAGE.read_text(), (
        "put the output of `python -c 'from tests.docs.test_metrics_page import rows; print(rows())'` into"
        " docs/metrics.md"
    )


def test_the_bounds_are_those_of_the_histograms() -> None:
    said = "1,\n2.5, 5, 10, 25, 50, 100, 250 and 500 ms, 1, 2.5, 5, 10 and 30 s"
    assert said in PAGE.read_text()
    milliseconds, seconds = (re.findall(r"[\d.]+", part) for part in said.split(" ms, "))
    assert [*(float(each) / 1000 for each in milliseconds), *map(float, seconds)] == list(BOUNDS_SECONDS)


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_the_table_of_alerts_has_it(rule: dict[str, dict[str, str]]) -> None:
    assert f"| {rule['alert']} | {rule['labels']['severity']} | " in PAGE.read_text()


def test_the_table_of_alerts_has_no_other() -> None:
    named = re.findall(r"^\| (Relay\w+) \|", PAGE.read_text(), re.MULTILINE)
    assert named == [rule["alert"] for rule in ALERTS]


def test_every_metric_that_the_page_names_exists() -> None:
    named = set(re.findall(r"\brelay_[a-z_]+[a-z]\b", PAGE.read_text()))
    known = {metric.name for metric in ALL} | {"relay_send_duration_seconds_bucket", "relay_process"}
    assert named <= known
