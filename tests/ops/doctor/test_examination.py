"""The examination as a whole: in order, and whatever happens to one party, the others are heard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from relay.ops.doctor.examination import _Party, examine
from relay.ops.doctor.finding import Finding, well
from relay.settings import load_settings
from tests.support.nats_server import NatsServer, free_port
from tests.support.scripted_smtp import ScriptedSmtp


def test_the_chapters(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    with ScriptedSmtp() as smtp:
        for name, value in {
            "NATS_URL": nats_server.url,
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(smtp.port),
            "EMAIL_ENABLED": "true",
            "PORT": str(free_port()),
            "RELAY_STATE_DIR": str(tmp_path),
        }.items():
            monkeypatch.setenv(name, value)
        chapters = list(examine(load_settings()))
    assert [chapter.title for chapter in chapters] == ["This host", "NATS", "Smarthost"]
    assert all(chapter.findings for chapter in chapters)


def test_a_party_that_breaks_off() -> None:
    def ask() -> Iterator[Finding]:
        yield well("one", "answered")
        raise LookupError("what nobody thought of")

    party = _Party("Somebody", ask)
    party.listen()
    assert party.is_over
    answered, broken = party.findings
    assert answered.ok
    assert (broken.what, broken.level) == ("Somebody", "failed")
    assert broken.detail == "asking broke off: LookupError: what nobody thought of"
