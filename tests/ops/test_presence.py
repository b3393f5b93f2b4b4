"""What a program tells about itself, written and read back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gevent
import pytest

from relay.ops.measuring import Measuring
from relay.ops.presence import Presence, Report, Stage, presence_path, read_presence


def read(state_dir: Path) -> Report:
    """This process's presence."""
    report = read_presence(state_dir, "send-1", os.getpid())
    assert report is not None
    return report


def test_it_waits_for_whatever_is_lacking(tmp_path: Path) -> None:
    presence = Presence(tmp_path, "send-1")
    assert read(tmp_path).stage is Stage.WAITING
    presence.lacks("nats", "NATS: connection refused")
    presence.lacks("start", "")
    assert (read(tmp_path).stage, read(tmp_path).reason) == (Stage.WAITING, "NATS: connection refused")
    presence.lacks("nats", "")
    assert (read(tmp_path).stage, read(tmp_path).reason) == (Stage.READY, "")


def test_it_goes_on_without_what_is_noted(tmp_path: Path) -> None:
    presence = Presence(tmp_path, "send-1")
    presence.lacks("start", "")
    presence.note("tracking", "tracking is off")
    assert read(tmp_path).stage is Stage.READY
    assert read(tmp_path).notes == {"tracking": "tracking is off"}
    presence.note("tracking", "")
    assert read(tmp_path).notes == {}


def test_giving_up_is_told_until_it_works(tmp_path: Path) -> None:
    presence = Presence(tmp_path, "send-1")
    presence.lacks("start", "")
    presence.lacks("smtp", "wrong password", has_given_up=True)
    assert read(tmp_path).has_given_up
    presence.lacks("smtp", "wrong password")
    presence.lacks("nats", "")
    assert read(tmp_path).has_given_up
    presence.lacks("smtp", "")
    assert not read(tmp_path).has_given_up


def test_draining(tmp_path: Path) -> None:
    Presence(tmp_path, "send-1").draining()
    assert read(tmp_path).stage is Stage.DRAINING


def test_another_process_is_not_believed(tmp_path: Path) -> None:
    Presence(tmp_path, "send-1")
    assert read_presence(tmp_path, "send-1", os.getpid() + 1) is None
    assert read_presence(tmp_path, "send-2", os.getpid()) is None


def test_a_broken_file_is_no_presence(tmp_path: Path) -> None:
    path = presence_path(tmp_path, "send-1")
    path.parent.mkdir()
    path.write_text("{")
    assert read_presence(tmp_path, "send-1", os.getpid()) is None


def test_a_state_directory_that_is_gone_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    presence = Presence(tmp_path / "state", "send-1")
    shutil.rmtree(tmp_path / "state")
    for _ in range(3):
        presence.lacks("nats", "away")
    presence.draining()
    assert presence.stage is Stage.DRAINING
    assert caplog.text.count("cannot write") == 1


def test_what_could_not_be_written_is_written_once_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a program that gets ready while its file cannot be written
    monkeypatch.setattr("relay.ops.measuring.WRITE_SECONDS", 0.01)
    presence = Presence(tmp_path, "send-1")
    partial = presence_path(tmp_path, "send-1").with_suffix(".partial")
    again = partial.with_suffix(".again")
    partial.mkdir()  # nothing can be written there, whoever tries
    again.mkdir()
    measuring = Measuring(tmp_path, "send-1")
    measuring.also(lambda: presence.write_again(gevent.get_hub().threadpool.apply))
    measuring.start()
    presence.lacks("start", "")
    gevent.sleep(0.1)
    assert read(tmp_path).stage is Stage.WAITING
    # When it can be, and nothing changes any more
    again.rmdir()
    # Then it is told all the same
    with gevent.Timeout(5):
        while read(tmp_path).stage is not Stage.READY:
            gevent.sleep(0.01)
    measuring.stop()
    assert caplog.text.count("cannot write") == 1


def test_what_is_written_again_does_not_hide_what_came_later(tmp_path: Path) -> None:
    presence = Presence(tmp_path, "send-1")
    partial = presence_path(tmp_path, "send-1").with_suffix(".partial")
    again = partial.with_suffix(".again")
    partial.mkdir()
    presence.lacks("nats", "away")
    partial.rmdir()
    os.mkfifo(again)  # a disk that hangs: opening it for writing waits until somebody reads
    writing = gevent.spawn(presence.write_again, gevent.get_hub().threadpool.apply)
    gevent.sleep(0.05)
    presence.lacks("nats", "")
    presence.lacks("start", "")
    assert read(tmp_path).stage is Stage.READY, "nobody waited for the disk"
    with again.open("rb") as reader:
        reader.read()
    writing.join(5)
    assert presence_path(tmp_path, "send-1").is_fifo(), "what was older has replaced it"
    presence_path(tmp_path, "send-1").unlink()
    presence.write_again(gevent.get_hub().threadpool.apply)
    assert read(tmp_path).stage is Stage.READY
