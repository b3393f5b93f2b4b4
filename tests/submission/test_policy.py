"""The domain rules and, above all, their order."""

from __future__ import annotations

from typing import Any

import pytest

from relay import contract
from relay.errors import AddressInvalid, SubmissionRejected
from relay.submission.policy import Policy, judge, normalised_domains
from relay.submission.request import SendRequest


def policy(**changes: Any) -> Policy:
    settings: dict[str, Any] = {
        "email_enabled": True,
        "default_from": "Relay <noreply@mail.example.org>",
        "default_from_display_name": "Example Service",
        "allowed_from_domains": ("mail.example.org", "xn--bcher-kva.example"),
        "allowed_reply_to_domains": ("example.org",),
        "allowed_recipient_domains": (),
    }
    return Policy(**settings | changes)


def request(**changes: str) -> SendRequest:
    return SendRequest("user@example.com", "s", "<p>h</p>", "t", "", "", "", "")._replace(**changes)


def test_the_default_sender() -> None:
    sender = judge(request(), policy())
    assert sender is not None
    assert sender.from_address.mailbox == "noreply@mail.example.org"
    assert sender.from_display_name == "Example Service"
    assert sender.reply_to is None
    assert sender.recipient.mailbox == "user@example.com"


def test_the_callers_sender() -> None:
    wanted = request(from_="X <News@MAIL.example.org>", from_display_name="News", reply_to="R <help@a.b.Example.ORG>")
    sender = judge(wanted, policy())
    assert sender is not None
    assert sender.from_address.mailbox == "News@mail.example.org"
    assert sender.from_display_name == "News"
    assert sender.reply_to is not None
    assert sender.reply_to.mailbox == "help@a.b.example.org"


REFUSED = [
    # what the request says, what the policy says, error, field
    ({"from_": "nonsense"}, {}, contract.INVALID_FROM, "from"),
    ({"from_": " "}, {}, contract.INVALID_FROM, "from"),
    ({"from_": "a@mail.example.org\r\nBcc: x@example.com"}, {}, contract.INVALID_FROM, "from"),
    ({"from_": "a@mail.example.org, b@mail.example.org"}, {}, contract.INVALID_FROM, "from"),
    ({"from_": "a@example.org"}, {}, contract.FROM_DOMAIN_NOT_ALLOWED, "from"),
    ({"from_": "a@sub.mail.example.org"}, {}, contract.FROM_DOMAIN_NOT_ALLOWED, "from"),
    ({"from_": "a@evil-mail.example.org"}, {}, contract.FROM_DOMAIN_NOT_ALLOWED, "from"),
    ({"from_": '"a@mail.example.org"@example.com'}, {}, contract.FROM_DOMAIN_NOT_ALLOWED, "from"),
    ({"from_": "noreply@mail.example.org"}, {"allowed_from_domains": ()}, contract.FROM_DOMAIN_NOT_ALLOWED, "from"),
    ({"reply_to": "nonsense"}, {}, contract.INVALID_REPLY_TO, "reply_to"),
    ({"reply_to": "a@example.com"}, {}, contract.REPLY_TO_DOMAIN_NOT_ALLOWED, "reply_to"),
    ({"reply_to": "a@badexample.org"}, {}, contract.REPLY_TO_DOMAIN_NOT_ALLOWED, "reply_to"),
    ({"reply_to": "a@org"}, {}, contract.REPLY_TO_DOMAIN_NOT_ALLOWED, "reply_to"),
    (
        {"reply_to": "a@example.org"},
        {"allowed_reply_to_domains": ()},
        contract.REPLY_TO_DOMAIN_NOT_ALLOWED,
        "reply_to",
    ),
    # the order: from before reply_to, both before EMAIL_ENABLED and before to
    ({"from_": "x", "reply_to": "y", "to": "z"}, {}, contract.INVALID_FROM, "from"),
    ({"from_": "x"}, {"email_enabled": False}, contract.INVALID_FROM, "from"),
    ({"reply_to": "y", "to": "z"}, {"email_enabled": False}, contract.INVALID_REPLY_TO, "reply_to"),
]


@pytest.mark.parametrize(("asked", "allowed", "error", "field"), REFUSED)
def test_what_is_refused(asked: dict[str, str], allowed: dict[str, Any], error: str, field: str) -> None:
    with pytest.raises(SubmissionRejected) as refusal:
        judge(request(**asked), policy(**allowed))
    assert (refusal.value.error, refusal.value.field) == (error, field)


FILTERED = [
    # to, allowed recipient domains, sent?
    ("user@example.com", (), True),
    ("user@example.com", ("example.com",), True),
    ("User <user@EXAMPLE.com>", ("example.com",), True),
    ("user@a.b.example.com", ("example.com",), True),
    ("user@example.com", ("example.org", "example.com"), True),
    ("user@b\u00fccher.example", ("xn--bcher-kva.example",), True),
    ("user@notexample.com", ("example.com",), False),
    ("user@com", ("example.com",), False),
    ("user@example.com.example.net", ("example.com",), False),
    ('"user@example.com"@example.net', ("example.com",), False),
    ("nonsense", ("example.com",), False),
]


@pytest.mark.parametrize(("to", "domains", "is_sent"), FILTERED)
def test_the_recipient_filter(to: str, domains: tuple[str, ...], is_sent: bool) -> None:
    assert (judge(request(to=to), policy(allowed_recipient_domains=domains)) is not None) is is_sent


def test_the_recipient_filter_comes_before_from_and_reply_to() -> None:
    assert judge(request(from_="x", reply_to="y"), policy(allowed_recipient_domains=("example.net",))) is None


def test_nothing_is_sent_when_mail_is_off() -> None:
    assert judge(request(), policy(email_enabled=False)) is None
    assert judge(request(to="nonsense"), policy(email_enabled=False)) is None


def test_a_recipient_that_does_not_parse_is_not_a_refusal() -> None:
    with pytest.raises(AddressInvalid):
        judge(request(to="nonsense"), policy())


def test_a_default_sender_that_is_no_address_is_found_at_once() -> None:
    with pytest.raises(AddressInvalid):
        policy(default_from="nonsense")


def test_domains_of_a_setting() -> None:
    assert normalised_domains([" Example.ORG", "", "B\u00dcCHER.example", "localhost"]) == (
        "example.org",
        "xn--bcher-kva.example",
        "localhost",
    )


@pytest.mark.parametrize(
    "bad", ["a..b", "@example.org", "*.example.org", "exa mple.org", ".example.org", "x" * 64, "\u2665"]
)
def test_a_bad_domain_is_named(bad: str) -> None:
    with pytest.raises(ValueError, match=r"label|character|internationalised"):
        normalised_domains(["example.org", bad])
