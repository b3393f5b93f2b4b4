"""What JetStream's acknowledgements say."""

from __future__ import annotations

import pytest

from relay.bus.messages import Msg, Publication
from relay.bus.stored import Stored, acknowledgement
from relay.errors import BusRefused, BusUnavailable, RevisionConflict

ASKED = Publication("stored.a", b"")


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"stream":"S", "seq":5}', Stored("S", 5, False)),
        (b'{"stream":"S", "seq":5,"duplicate": true}', Stored("S", 5, True)),
        (b'{"stream":"S", "seq":5,"duplicate": false}', Stored("S", 5, False)),
        (b'{"stream":"S","domain":"hub","seq":5}', Stored("S", 5, False)),
    ],
)
def test_what_is_stored(payload: bytes, expected: Stored) -> None:
    assert acknowledgement(Msg("inbox", "", payload, {}), ASKED) == expected


@pytest.mark.parametrize(
    ("payload", "kind", "code"),
    [
        (b'{"error":{"code":400,"err_code":10071,"description":"x"},"stream":"S","seq":0}', RevisionConflict, 10071),
        (b'{"error":{"code":400,"err_code":10164,"description":"x"},"stream":"S","seq":0}', RevisionConflict, 10164),
        (b'{"error":{"code":400,"err_code":10060,"description":"x"},"stream":"S","seq":0}', BusRefused, 10060),
        (b'{"error":{"code":400}}', BusRefused, 400),
        (b'{"error":{"code":503,"err_code":10008,"description":"x"}}', BusUnavailable, None),
        (b'{"stream":"S"}', BusUnavailable, None),
        (b'{"error":null}', BusUnavailable, None),
        (b"{}", BusUnavailable, None),
        (b"[]", BusUnavailable, None),
        (b"5", BusUnavailable, None),
        (b'"error"', BusUnavailable, None),
        (b"", BusUnavailable, None),
        (b"\xff", BusUnavailable, None),
    ],
)
def test_what_is_not_stored_is_a_value(payload: bytes, kind: type[Exception], code: int | None) -> None:
    answer = acknowledgement(Msg("inbox", "", payload, {}), ASKED)
    assert type(answer) is kind
    assert getattr(answer, "code", None) == code


def test_nobody_takes_it() -> None:
    answer = acknowledgement(Msg("inbox", "", b"", {"Status": "503"}), ASKED)
    assert isinstance(answer, BusRefused)
    assert (answer.code, str(answer)) == (503, "no stream takes stored.a")


def test_what_was_never_answered_stays_what_it_is() -> None:
    error = BusUnavailable("lost")
    assert acknowledgement(error, ASKED) is error
