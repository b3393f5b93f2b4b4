"""Addresses in logs."""

from __future__ import annotations

import pytest

from relay.redaction import redacted, without_addresses


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("someone@example.com", "som****@example.com"),
        ("abcdef@example.com", "abc****@example.com"),
        ("abcde@example.com", "a****@example.com"),
        ("abc@example.com", "a****@example.com"),
        ("ab@example.com", "**@example.com"),
        ("a@example.com", "**@example.com"),
        ("@example.com", "**@example.com"),
        ('"a@b c"@example.com', '"a@****@example.com'),
    ],
)
def test_an_address(address: str, shown: str) -> None:
    assert redacted(address) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("550 <someone@example.com>: Recipient rejected", "550 <som****@example.com>: Recipient rejected"),
        ("to=someone@example.com, from someone.else@example.org.", "to=som****@example.com, from som****@example.org."),
        ('550 <"john doe"@example.com> is unknown', '550 <"jo****@example.com> is unknown'),
        ("no address at all", "no address at all"),
        ("Email address is not verified: user@example.com", "Email address is not verified: u****@example.com"),
    ],
)  # fmt: skip
def test_addresses_in_a_text(text: str, shown: str) -> None:
    assert without_addresses(text) == shown
