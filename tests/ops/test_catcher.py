"""The catcher keeps what it gets, byte for byte."""

from __future__ import annotations

import smtplib
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.ops import catcher as catcher_module
from relay.ops.catcher import Catcher, caught_mails
from tests.support.nats_server import free_port

CONTENT = b"Subject: Hello\r\n\r\n.dot\r\nline\r\n"


@pytest.fixture
def catching(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A started catcher: its directory and port."""
    port = free_port()
    catcher = Catcher(tmp_path / "caught", port)
    catcher.start()
    yield tmp_path / "caught", port
    catcher.stop()


def send(port: int, count: int = 1) -> None:
    """Sends the same mail ``count`` times."""
    with smtplib.SMTP("127.0.0.1", port) as client:
        for _ in range(count):
            client.sendmail("a@example.com", ["b@example.com", "c@example.com"], CONTENT)


def test_it_keeps_content_and_envelope(catching: tuple[Path, int]) -> None:
    directory, port = catching
    send(port)
    (mail,) = caught_mails(directory)
    assert mail.content == CONTENT
    assert mail.reverse_path == "a@example.com"
    assert mail.forward_paths == ["b@example.com", "c@example.com"]


def test_it_keeps_only_the_newest(catching: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catcher_module, "KEEP", 3)
    directory, port = catching
    send(port, 5)
    assert [mail.number for mail in caught_mails(directory)] == [3, 4, 5]


def test_it_goes_on_counting_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        port = free_port()
        catcher = Catcher(tmp_path, port)
        catcher.start()
        send(port)
        catcher.stop()
    assert [mail.number for mail in caught_mails(tmp_path)] == [1, 2]
