"""``relayctl metrics``: the page without HTTP. A real relay's is in ``tests/system/test_metrics.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from relay.cli.main import cli
from tests.ops.test_metrics import numbers, relayed, tell


def test_what_was_counted_is_printed_also_when_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_STATE_DIR", str(tmp_path))
    (tmp_path / "run").mkdir()
    tell(tmp_path, "send-1", 1, counters=relayed(5))
    done = CliRunner().invoke(cli, ["metrics"])
    assert done.exit_code == 0
    assert numbers(done.stdout_bytes)["relay_requests_total"]["relayed",] == 5


def test_where_no_relay_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_STATE_DIR", str(tmp_path))
    done = CliRunner().invoke(cli, ["metrics"])
    assert done.exit_code == 1
    assert "no relay has run in" in done.stderr
