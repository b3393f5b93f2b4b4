"""The alerts: each fires when it should, and alone, and is quiet when the trouble is small or short; by promtool."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import yaml

from relay.ops.catalogue import ALL, Type
from tests.support.promtool import promtool

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "conf/prometheus/alerts.yml"
GROUPS = yaml.safe_load(ALERTS.read_text())["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}

MINUTES = 120
AT = f"{MINUTES}m"

HEALTHY = {
    "up{}": "1x120",
    'relay_workers{kind="send",stage="ready"}': "2x120",
    'relay_workers{kind="send",stage="waiting"}': "0x120",
    'relay_workers{kind="send",stage="silent"}': "0x120",
    'relay_workers{kind="status",stage="ready"}': "1x120",
    'relay_workers{kind="status",stage="silent"}': "0x120",
    'relay_workers{kind="engagement",stage="ready"}': "0x120",
    'relay_workers_expected{kind="send"}': "2x120",
    'relay_workers_expected{kind="status"}': "1x120",
    'relay_workers_expected{kind="engagement"}': "0x120",
    'relay_nats_connected_workers{kind="send"}': "2x120",
    'relay_nats_connected_workers{kind="status"}': "1x120",
    'relay_nats_connected_workers{kind="engagement"}': "0x120",
    "relay_smtp_circuit_open_workers{}": "0x120",
    'relay_requests_total{outcome="relayed"}': "1000+60x120",
    'relay_requests_total{outcome="failed"}': "10+1x120",
    'relay_requests_total{outcome="deferred"}': "10+1x120",
    'relay_requests_total{outcome="in_doubt"}': "3x120",
    'relay_requests_total{outcome="overloaded"}': "3x120",
    'relay_requests_total{outcome="broken"}': "1x120",
    'relay_requests_total{outcome="refused"}': "50+50x120",
    "relay_backlog_requests{}": "100x120",
    "relay_backlog_limit_requests{}": "10000x120",
    "relay_backlog_bytes{}": "1000000x120",
    "relay_backlog_limit_bytes{}": "128000000x120",
    'relay_send_duration_seconds_bucket{le="0.1"}': "0+60x120",
    'relay_send_duration_seconds_bucket{le="5.0"}': "0+62x120",
    'relay_send_duration_seconds_bucket{le="10.0"}': "0+62x120",
    'relay_send_duration_seconds_bucket{le="+Inf"}': "0+62x120",
    "relay_send_duration_seconds_count{}": "0+62x120",
    'relay_tracking_off_workers{kind="send"}': "0x120",
    'relay_tracking_off_workers{kind="status"}': "0x120",
    'relay_tracking_records_total{result="written"}': "1000+60x120",
    'relay_tracking_records_total{result="lost"}': "7x120",
    "relay_tracking_unsettled_total{}": "1x120",
    "relay_request_ids_off_workers{}": "0x120",
    "relay_events_stopped_workers{}": "0x120",
    'relay_sqs_queue_messages{state="waiting"}': "5x120",
    'relay_sqs_messages_total{step="deleted"}': "0+30x120",
    'relay_notifications_total{result="parked"}': "4x120",
    'relay_worker_starts_total{program="send-1"}': "12x120",
    'relay_process_open_fds{program="send-1"}': "60x120",
    'relay_process_max_fds{program="send-1"}': "1024x120",
    "relay_figures_unreadable{}": "0x120",
}
"""A relay with which nothing is wrong; what went wrong long ago is counted."""

SENT = "relay_requests_total"


class Case(NamedTuple):
    """What is different when the alert fires, and in a case that is near it."""

    fires: dict[str, str | None]
    near: dict[str, str | None]
    also: tuple[str, ...] = ()
    """Alerts that this trouble sets off, too."""


def lasting(minutes: int, *, before: str = "0", value: str = "1") -> str:
    """A gauge that has been ``value`` for so long at the end."""
    return f"{before}x{MINUTES - minutes} {value}x{minutes - 1}"


CASES: dict[str, Case] = {
    "RelayDown": Case({"up{}": lasting(4, before="1", value="0")}, {"up{}": lasting(1, before="1", value="0")}),
    "RelayNobodyReady": Case(
        {
            'relay_workers{kind="send",stage="ready"}': lasting(3, before="2", value="0"),
            'relay_workers{kind="send",stage="waiting"}': lasting(3, value="2"),
        },
        {
            'relay_workers{kind="send",stage="ready"}': lasting(30, before="2", value="1"),
            'relay_workers_expected{kind="send"}': lasting(30, before="2", value="1"),
            'relay_nats_connected_workers{kind="send"}': lasting(30, before="2", value="1"),
        },
    ),
    "RelayWorkerMissing": Case(
        {
            'relay_workers{kind="send",stage="ready"}': lasting(10, before="2", value="1"),
            'relay_workers{kind="send",stage="waiting"}': lasting(10, value="1"),
        },
        {
            'relay_workers{kind="send",stage="ready"}': lasting(4, before="2", value="1"),
            'relay_workers{kind="send",stage="waiting"}': lasting(4, value="1"),
        },
    ),
    "RelayWorkerSilent": Case(
        {'relay_workers{kind="status",stage="silent"}': lasting(3)},
        {'relay_workers{kind="status",stage="silent"}': lasting(1)},
    ),
    "RelayCircuitOpen": Case(
        {"relay_smtp_circuit_open_workers{}": lasting(4, value="2")},
        {"relay_smtp_circuit_open_workers{}": lasting(1, value="2")},
    ),
    "RelayMailNotGoingOut": Case(
        {
            f'{SENT}{{outcome="relayed"}}': "1000x120",
            f'{SENT}{{outcome="failed"}}': "10+60x120",
            f'{SENT}{{outcome="deferred"}}': "10x120",
        },
        # Nobody asks for anything.
        {f'{SENT}{{outcome="{each}"}}': "1000x120" for each in ("relayed", "failed", "deferred", "refused")},
        ("RelayFailedRatio",),
    ),
    "RelayErrorRatio": Case(
        {f'{SENT}{{outcome="deferred"}}': "0+6x120"},
        # A third of very little mail.
        {
            f'{SENT}{{outcome="relayed"}}': "0x90 1+0.5x29",
            f'{SENT}{{outcome="deferred"}}': "0x90 1+0.5x29",
            f'{SENT}{{outcome="failed"}}': "10x120",
        },
    ),
    "RelayFailedRatio": Case({f'{SENT}{{outcome="failed"}}': "10+10x120"}, {f'{SENT}{{outcome="failed"}}': "10+6x120"}),
    "RelayMailsInDoubt": Case(
        {f'{SENT}{{outcome="in_doubt"}}': "3x115 4x4"}, {f'{SENT}{{outcome="in_doubt"}}': "3x80 4x39"}
    ),
    "RelayRequestsBroken": Case(
        {f'{SENT}{{outcome="broken"}}': "1x115 2x4"}, {f'{SENT}{{outcome="broken"}}': "1x80 2x39"}
    ),
    "RelayBacklogNearLimit": Case(
        {"relay_backlog_bytes{}": lasting(4, before="0", value="127000000")},
        {"relay_backlog_requests{}": lasting(30, before="0", value="7900")},
    ),
    "RelaySlow": Case(
        {
            'relay_send_duration_seconds_bucket{le="0.1"}': "0+6x120",
            'relay_send_duration_seconds_bucket{le="5.0"}': "0+16x120",
        },
        {
            'relay_send_duration_seconds_bucket{le="0.1"}': "0+6x120",
            'relay_send_duration_seconds_bucket{le="5.0"}': "0+61x120",
        },
    ),
    "RelayTrackingOff": Case(
        {'relay_tracking_off_workers{kind="send"}': lasting(4)}, {'relay_tracking_off_workers{kind="send"}': lasting(1)}
    ),
    "RelayAnswersOff": Case(
        {'relay_tracking_off_workers{kind="status"}': lasting(8)},
        {'relay_tracking_off_workers{kind="status"}': lasting(3)},
    ),
    "RelayRecordsLost": Case(
        {'relay_tracking_records_total{result="lost"}': "7x110 9x9"},
        {'relay_tracking_records_total{result="lost"}': "7x80 9x39", "relay_tracking_unsettled_total{}": "0x80 1x39"},
    ),
    "RelayRequestIdsOff": Case(
        {"relay_request_ids_off_workers{}": lasting(8)}, {"relay_request_ids_off_workers{}": lasting(3)}
    ),
    "RelayNatsDisconnected": Case(
        {'relay_nats_connected_workers{kind="send"}': lasting(3, before="2", value="1")},
        {'relay_nats_connected_workers{kind="send"}': lasting(1, before="2", value="0")},
    ),
    "RelayEventsStopped": Case(
        {"relay_events_stopped_workers{}": lasting(14)}, {"relay_events_stopped_workers{}": lasting(8)}
    ),
    "RelayEventsStuck": Case(
        {'relay_sqs_messages_total{step="deleted"}': "0+30x80 2400x39"},
        # Nothing is deleted since nothing waits.
        {
            'relay_sqs_messages_total{step="deleted"}': "0+30x80 2400x39",
            'relay_sqs_queue_messages{state="waiting"}': "5x79 0x40",
        },
    ),
    "RelayEventsQueueGrows": Case(
        {'relay_sqs_queue_messages{state="waiting"}': "5x60 500+50x59"},
        {'relay_sqs_queue_messages{state="waiting"}': "5x60 6000-50x59"},
    ),
    "RelayEventsParked": Case(
        {'relay_notifications_total{result="parked"}': "4x90 5x29"},
        {'relay_notifications_total{result="parked"}': "4x30 5x89"},
    ),
    "RelayWorkerRestarts": Case(
        {'relay_worker_starts_total{program="send-1"}': "12x110 13+1x9"},
        # A rolling restart, and another one.
        {'relay_worker_starts_total{program="send-1"}': "12x110 13x4 14x4"},
    ),
    "RelayFdsNearLimit": Case(
        {'relay_process_open_fds{program="send-1"}': lasting(8, before="60", value="900")},
        {'relay_process_open_fds{program="send-1"}': lasting(3, before="60", value="900")},
    ),
    "RelayFiguresUnreadable": Case(
        {"relay_figures_unreadable{}": lasting(14)}, {"relay_figures_unreadable{}": lasting(8)}
    ),
}


def series(changes: dict[str, str | None], instance: str = "relay-1:8080") -> list[dict[str, str]]:
    """Promtool's input series, with the labels that Prometheus adds."""
    target = f'job="relay",instance="{instance}"'
    return [
        {"series": name.replace("{", f"{{{target},").replace(",}", "}"), "values": values}
        for name, values in (HEALTHY | changes).items()
        if values is not None
    ]


def firing(alerts: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """That exactly these alerts fire at the end, by instance."""
    samples = [
        {"labels": f'{{alertname="{alert}",instance="{instance}"}}', "value": 1}
        for instance, expected in alerts.items()
        for alert in expected
    ]
    fired = 'count by (instance, alertname) (ALERTS{alertstate="firing"})'
    return [{"expr": fired, "eval_time": AT, "exp_samples": samples}]


def judge(tmp_path: Path, tests: list[dict[str, Any]]) -> str:
    """What promtool has against them; '' when all is as expected."""
    file = tmp_path / "alerts_test.json"  # JSON is YAML
    file.write_bytes(
        orjson.dumps(
            {
                "rule_files": [str(ALERTS)],
                "evaluation_interval": "1m",
                "tests": [{"interval": "1m", **test} for test in tests],
            }
        )
    )
    done = promtool("test", "rules", str(file))
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    done = promtool("check", "rules", str(ALERTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_played() -> None:
    assert list(CASES) == list(RULES)


def test_each_fires_when_it_should_and_alone_and_is_quiet_when_the_trouble_is_small_or_short(tmp_path: Path) -> None:
    """All at once, each on a relay of its own: a run of promtool for each would take a minute."""
    inputs, expected = series({}, "healthy"), {}
    for alert, case in CASES.items():
        inputs += series(case.fires, f"{alert} fires") + series(case.near, f"{alert} is near")
        expected[f"{alert} fires"] = (alert, *case.also)
    assert not judge(tmp_path, [{"input_series": inputs, "promql_expr_test": firing(expected)}])


def test_a_relay_that_nobody_scrapes_is_noticed(tmp_path: Path) -> None:
    test = {
        "input_series": [{"series": 'up{job="other",instance="other:1"}', "values": "1x120"}],
        "promql_expr_test": [
            {
                "expr": 'ALERTS{alertstate="firing"}',
                "eval_time": AT,
                "exp_samples": [
                    {
                        "labels": 'ALERTS{alertname="RelayDown",alertstate="firing",job="relay",severity="critical"}',
                        "value": 1,
                    }
                ],
            }
        ],
    }
    assert not judge(tmp_path, [test])


def test_what_the_operator_reads(tmp_path: Path) -> None:
    rule = RULES["RelayBacklogNearLimit"]
    test = {
        "input_series": series({"relay_backlog_requests{}": "9000x120"}),
        "alert_rule_test": [
            {
                "alertname": "RelayBacklogNearLimit",
                "eval_time": AT,
                "exp_alerts": [
                    {
                        "exp_labels": {"severity": "warning", "job": "relay", "instance": "relay-1:8080"},
                        "exp_annotations": {
                            "summary": "The backlog of relay relay-1:8080 is 90% full",
                            "description": rule["annotations"]["description"],
                        },
                    }
                ],
            }
        ],
    }
    assert not judge(tmp_path, [test])


@pytest.mark.parametrize("alert", RULES)
def test_it_says_what_to_do_and_how_urgent_it_is(alert: str) -> None:
    rule = RULES[alert]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert "for" in rule or "increase(" in rule["expr"], "what is over in a moment must not wake anybody"
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 80


@pytest.mark.parametrize("alert", RULES)
def test_it_names_only_what_the_page_has(alert: str) -> None:
    assert not unknown_names(RULES[alert]["expr"])


def unknown_names(expression: str) -> set[str]:
    """Metrics of Relay's in an expression that no page has."""
    known = {metric.name for metric in ALL if metric.type is not Type.HISTOGRAM}
    for metric in ALL:
        if metric.type is Type.HISTOGRAM:
            known |= {f"{metric.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    return set(re.findall(r"\brelay_\w+", expression)) - known
