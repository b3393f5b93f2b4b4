"""Recipients: who gets a mail that may have several, and what each of them may see.

Owns ``to``, ``cc`` and ``bcc`` as lists: every entry must be an address, nobody gets a mail twice, and whom the
operator's recipient domains leave out gets nothing and is named in no header field, or a reply to all would
reach them after all. The sender, and the order of the checks that callers can observe, are ``policy``'s.
"""

from __future__ import annotations

from typing import NamedTuple

from relay.errors import AddressInvalid
from relay.submission.address import Address, parse_address
from relay.submission.fields import reject
from relay.submission.options import Options
from relay.submission.policy import Policy, Sender, is_within, judge
from relay.submission.request import SendRequest


class Recipient(NamedTuple):
    """One mailbox that gets the mail."""

    text: str
    """As the caller wrote it."""
    address: Address


class Recipients(NamedTuple):
    """Everybody who gets the mail, each once: who stands in several fields stands here in the first of them."""

    to: tuple[Recipient, ...]
    cc: tuple[Recipient, ...]
    bcc: tuple[Recipient, ...]
    filtered: tuple[str, ...]
    """As the caller wrote them: who is left out, for their domain is not among the operator's."""

    @property
    def everyone(self) -> tuple[Recipient, ...]:
        """In the order of the transaction: ``to``, ``cc``, ``bcc``."""
        return self.to + self.cc + self.bcc

    @property
    def forward_paths(self) -> tuple[str, ...]:
        """The mailboxes of ``everyone``, in that order."""
        return tuple(recipient.address.mailbox for recipient in self.everyone)

    def individually(self) -> tuple[Recipients, ...]:
        """The recipients of each mail when each of ``to`` gets one alone."""
        return tuple(Recipients((recipient,), (), (), ()) for recipient in self.to)


def judge_options(
    request: SendRequest, options: Options, policy: Policy, max_recipients: int
) -> tuple[Sender | None, Recipients]:
    """The sender and the recipients of a request with options; no sender: nothing is sent, and that is a success.

    The sender's own ``recipient`` is the first of them. Raises ``SubmissionRejected`` as ``policy.judge`` does, and for
    recipients as ``judge_recipients`` does; unlike for a request without options, an address in ``to`` that is none is
    a refused request.
    """
    recipients = judge_recipients(options, policy, max_recipients)
    everyone = recipients.everyone
    if not everyone:
        return None, recipients
    return judge(request._replace(to=everyone[0].text), policy), recipients


def judge_recipients(options: Options, policy: Policy, max_recipients: int) -> Recipients:
    """Who gets the mail. At most ``max_recipients`` may be named, repeated and filtered ones included.

    Raises ``SubmissionRejected`` with ``INVALID_REQUEST_PAYLOAD`` when there are more, and for the first entry that is
    no address; it is named by its place, ``cc[2]``, since the detail may be logged.
    """
    named = len(options.to) + len(options.cc) + len(options.bcc)
    if named > max_recipients:
        reject("to", f"to, cc and bcc name {named} recipients; a request may have {max_recipients}, so send several")
    seen: set[str] = set()
    filtered: list[str] = []
    lists: list[tuple[Recipient, ...]] = []
    for field, texts in (("to", options.to), ("cc", options.cc), ("bcc", options.bcc)):
        found: list[Recipient] = []
        for number, text in enumerate(texts):
            address = _parsed(field, number, text)
            # A local part is compared as it is: whether case matters in it only its own host knows (RFC 5321 §2.4).
            mailbox = address.mailbox
            if mailbox in seen:
                continue
            seen.add(mailbox)
            allowed = policy.allowed_recipient_domains
            if not allowed or is_within(address.domain, allowed):
                found.append(Recipient(text, address))
            else:
                filtered.append(text)
        lists.append(tuple(found))
    to, cc, bcc = lists
    return Recipients(to, cc, bcc, tuple(filtered))


def _parsed(field: str, number: int, text: str) -> Address:
    try:
        return parse_address(text)
    except AddressInvalid as error:
        reject(field, f"{field}[{number}]: {error}")
