"""What relayctl tells workers by files: read as written, and never half written."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.ops.orders import (
    SettingsGone,
    drain_seconds,
    forget_drain_seconds,
    forget_settings,
    keep_settings,
    read_settings,
    send_workers,
    send_workers_path,
    tell_drain_seconds,
    tell_send_workers,
)


def test_settings_are_kept_from_others_under_the_next_number(tmp_path: Path) -> None:
    first = keep_settings(tmp_path, {"SMTP_PASSWORD": 'per%cent "quote"\n'})
    second = keep_settings(tmp_path, {})
    first.with_suffix(".partial").write_text("of a writer that was killed")
    assert (first.name, second.name) == ("1.json", "2.json")
    assert first.stat().st_mode & 0o077 == 0
    assert first.parent.stat().st_mode & 0o077 == 0
    assert read_settings(first) == {"SMTP_PASSWORD": 'per%cent "quote"\n'}
    forget_settings(tmp_path, but=[str(second)])
    assert list(first.parent.iterdir()) == [second]
    with pytest.raises(SettingsGone, match=r"1\.json cannot be read"):
        read_settings(first)


def test_a_file_that_is_named_and_gone_is_not_made_anew(tmp_path: Path) -> None:
    first = keep_settings(tmp_path, {})
    first.unlink()
    assert keep_settings(tmp_path, {}, named=["", str(first)]).name == "2.json"


@pytest.mark.parametrize("text", ["", "[", "3", "null"])
def test_settings_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "1.json").write_text(text)
    with pytest.raises(SettingsGone):
        read_settings(tmp_path / "1.json")


def test_how_many_share_the_rate(tmp_path: Path) -> None:
    assert send_workers(tmp_path, 2) == 2, "nobody has said anything"
    tell_send_workers(tmp_path, 4)
    assert send_workers(tmp_path, 2) == 4
    for broken in ("", "0", "-1", '"4"', "4.5"):
        send_workers_path(tmp_path).write_text(broken)
        assert send_workers(tmp_path, 2) == 2


def test_draining_is_only_ever_shortened(tmp_path: Path) -> None:
    assert drain_seconds(tmp_path, 25.0) == 25.0
    for told, holds in ((5.0, 5.0), (0.0, 0.0), (-1.0, 0.0), (60.0, 25.0)):
        tell_drain_seconds(tmp_path, told)
        assert drain_seconds(tmp_path, 25.0) == holds
    forget_drain_seconds(tmp_path)
    assert drain_seconds(tmp_path, 25.0) == 25.0
