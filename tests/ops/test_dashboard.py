"""The Grafana dashboard: what it asks for is on the page, and Prometheus understands it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from relay.ops.catalogue import ALL
from tests.ops.test_alerts import unknown_names
from tests.support.promtool import promtool

DASHBOARD = orjson.loads((Path(__file__).parents[2] / "conf/grafana/relay.json").read_bytes())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ROWS = ["Is mail flowing?", "Smarthost", "Queueing", "Tracking", "Events", "Processes"]


def expressions() -> Iterator[str]:
    """Everything that it asks Prometheus, with Grafana's variables filled in as Grafana would."""
    asked = [target["expr"] for panel in PANELS for target in panel["targets"]]
    asked += [each["expr"] for each in DASHBOARD["annotations"]["list"]]
    for expression in asked:
        yield expression.replace("$__rate_interval", "5m").replace("$job", "relay").replace("$instance", ".+")


def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions())]
    file = tmp_path / "panels.json"
    file.write_bytes(orjson.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", "--lint-fatal", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_names_only_what_the_page_has() -> None:
    for expression in expressions():
        assert not unknown_names(expression), expression
        assert "$" not in expression, expression


def test_it_shows_every_metric() -> None:
    named = set(re.findall(r"\brelay_\w+", " ".join(expressions())))
    shown = named | {name.removesuffix("_bucket") for name in named}
    assert [metric.name for metric in ALL if metric.name not in shown] == ["relay_process_virtual_memory_bytes"]


def test_every_expression_is_of_the_chosen_relays() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("relay_") == expression.count('job=~"$job",instance=~"$instance"'), expression


def test_the_rows_and_their_order() -> None:
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == ROWS


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["description"]
    assert panel["type"] == "heatmap" or panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not own & places, panel["title"]
        places |= own
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
