"""Who gets a mail with several recipients, and who is left out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission.options import Options
from relay.submission.policy import Policy, judge
from relay.submission.recipients import judge_options, judge_recipients
from relay.submission.request import SendRequest


def policy(**changes: Any) -> Policy:
    values: dict[str, Any] = {
        "email_enabled": True,
        "default_from": "noreply@mail.example.org",
        "default_from_display_name": "Example Service",
        "allowed_from_domains": ("mail.example.org",),
        "allowed_reply_to_domains": ("example.org",),
        "allowed_recipient_domains": (),
    }
    return Policy(**values | changes)


REQUEST = SendRequest("a@example.com", "s", "<p>h</p>", "t", "", "", "", "")


def refusal(options: Options, limit: int = 50, **changes: Any) -> SubmissionRejected:
    with pytest.raises(SubmissionRejected) as caught:
        judge_recipients(options, policy(**changes), limit)
    assert caught.value.error == contract.INVALID_REQUEST_PAYLOAD
    return caught.value


def test_everyone_in_the_order_of_the_fields() -> None:
    options = Options(to=("A <a@example.com>", "b@example.com"), cc=("c@EXAMPLE.com",), bcc=("d@bücher.example",))
    recipients = judge_recipients(options, policy(), 50)
    assert recipients.forward_paths == (
        "a@example.com",
        "b@example.com",
        "c@example.com",
        "d@xn--bcher-kva.example",
    )
    assert [recipient.text for recipient in recipients.to] == ["A <a@example.com>", "b@example.com"]
    assert [recipient.text for recipient in recipients.cc] == ["c@EXAMPLE.com"]
    assert [recipient.text for recipient in recipients.bcc] == ["d@bücher.example"]
    assert recipients.filtered == ()


def test_nobody_gets_a_mail_twice() -> None:
    options = Options(
        to=("a@example.com", "A <a@EXAMPLE.com>", '"a"@example.com', "A@example.com"),
        cc=("a@example.com", "b@example.com"),
        bcc=("b@example.com", "c@example.com", "a@example.com"),
    )
    recipients = judge_recipients(options, policy(), 50)
    # Whether case matters in a local part, only its own host knows.
    assert recipients.forward_paths == ("a@example.com", "A@example.com", "b@example.com", "c@example.com")
    assert [recipient.text for recipient in recipients.cc] == ["b@example.com"]
    assert [recipient.text for recipient in recipients.bcc] == ["c@example.com"]


def test_who_is_not_allowed_is_left_out_and_reported() -> None:
    options = Options(
        to=("X <x@example.com>", "a@example.org"), cc=("b@sub.example.org", "y@notexample.org"), bcc=("z@example.com",)
    )
    recipients = judge_recipients(options, policy(allowed_recipient_domains=("example.org",)), 50)
    assert recipients.forward_paths == ("a@example.org", "b@sub.example.org")
    assert recipients.filtered == ("X <x@example.com>", "y@notexample.org", "z@example.com")


BAD = [
    (Options(to=("a@example.com", "b")), "to", "to[1]: "),
    (Options(to=("a@example.com",), cc=("a@example.com", "b@example.com", "c..d@example.com")), "cc", "cc[2]: "),
    (Options(to=("a@example.com",), bcc=("a@example.com, b@example.com",)), "bcc", "bcc[0]: "),
    (Options(to=("a@example.com\r\nBcc: b@example.com",)), "to", "to[0]: "),
]


@pytest.mark.parametrize(("options", "field", "said"), BAD)
@pytest.mark.parametrize("allowed", [(), ("example.org",)])
def test_an_address_that_is_none_is_named_by_its_place(
    options: Options, field: str, said: str, allowed: tuple[str, ...]
) -> None:
    caught = refusal(options, allowed_recipient_domains=allowed)
    assert caught.field == field
    assert caught.detail.startswith(said)
    assert "example" not in caught.detail


def test_the_limit_counts_whoever_is_named() -> None:
    fifty = tuple(f"{number}@example.com" for number in range(48))
    options = Options(to=fifty, cc=("c@example.com",), bcc=("c@example.com",))
    assert len(judge_recipients(options, policy(), 50).everyone) == 49
    caught = refusal(options._replace(bcc=("c@example.com", "d@example.com")))
    assert caught.detail == "to, cc and bcc name 51 recipients; a request may have 50, so send several"


def test_too_many_are_not_even_read() -> None:
    assert "name 10000 recipients" in refusal(Options(to=("(" * 9000,) * 10_000)).detail


def test_each_alone() -> None:
    recipients = judge_recipients(Options(to=("a@example.com", "b@example.com")), policy(), 50)
    assert [each.forward_paths for each in recipients.individually()] == [("a@example.com",), ("b@example.com",)]


def test_the_sender_is_judged_as_ever() -> None:
    options = Options(to=("a@example.com", "b@example.com"))
    sender, recipients = judge_options(REQUEST, options, policy(), 50)
    assert sender == judge(REQUEST, policy())
    assert len(recipients.everyone) == 2
    with pytest.raises(SubmissionRejected, match=contract.FROM_DOMAIN_NOT_ALLOWED):
        judge_options(REQUEST._replace(from_="a@example.com"), options, policy(), 50)
    with pytest.raises(SubmissionRejected, match=contract.INVALID_REPLY_TO):
        judge_options(REQUEST._replace(reply_to="nonsense"), options, policy(), 50)


def test_nothing_is_sent_when_mail_is_off_or_everyone_is_filtered() -> None:
    options = Options(to=("a@example.com",), cc=("b@example.com",))
    assert judge_options(REQUEST, options, policy(email_enabled=False), 50)[0] is None
    nobody = policy(allowed_recipient_domains=("example.org",))
    # As without options: the filter comes before ``from`` is looked at.
    sender, recipients = judge_options(REQUEST._replace(from_="nonsense"), options, nobody, 50)
    assert sender is None
    assert recipients.filtered == ("a@example.com", "b@example.com")


def test_the_first_allowed_one_stands_for_the_recipient() -> None:
    options = Options(to=("a@example.com",), bcc=("b@example.org",))
    sender, _ = judge_options(REQUEST, options, policy(allowed_recipient_domains=("example.org",)), 50)
    assert sender is not None
    assert sender.recipient.mailbox == "b@example.org"


LABEL = st.sampled_from(["example", "org", "com", "sub", "notexample", "x"])
DOMAIN = st.lists(LABEL, min_size=1, max_size=4).map(".".join)


@settings(max_examples=300, deadline=None)
@given(DOMAIN, st.lists(DOMAIN, max_size=3).map(tuple))
def test_a_domain_is_allowed_as_policy_has_it(domain: str, allowed: tuple[str, ...]) -> None:
    rules = policy(allowed_recipient_domains=allowed)
    to = f"a@{domain}"
    is_sent = judge(REQUEST._replace(to=to), rules) is not None
    assert bool(judge_recipients(Options(to=(to,)), rules, 50).everyone) == is_sent
