"""The domain rules: whether a request is sent, from whom, and where replies may go.

Owns the order of the checks, which callers can observe: recipient filter, ``from``, ``reply_to``,
EMAIL_ENABLED, ``to``. It is that of the service that Relay replaces. Reading the settings is left to
``settings``, address syntax to ``address``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from relay import contract
from relay.errors import AddressInvalid, SubmissionRejected
from relay.submission.address import Address, normalised_domain, parse_address
from relay.submission.request import SendRequest

_HOST_NAME: Final = re.compile(r"[a-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows. Domains as ``normalised_domains`` gives them.

    Raises ``AddressInvalid`` when ``default_from`` is no address.
    """

    email_enabled: bool
    default_from: str
    """An address, or ``Name <address>``, of which only the address is used. Its domain needs no permission."""
    default_from_display_name: str
    allowed_from_domains: tuple[str, ...]
    """Exactly these; empty: callers may not set ``from``."""
    allowed_reply_to_domains: tuple[str, ...]
    """These and their subdomains; empty: callers may not set ``reply_to``."""
    allowed_recipient_domains: tuple[str, ...]
    """These and their subdomains; empty: every recipient is allowed."""
    default_from_address: Address = field(init=False)
    """``default_from``, parsed once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "default_from_address", parse_address(self.default_from))


class Sender(NamedTuple):
    """On whose behalf a permitted request is sent, and to whom."""

    from_address: Address
    """The effective From address; its mailbox is also the reverse-path."""
    from_display_name: str
    """As given, not yet fit for a header; may be ''."""
    reply_to: Address | None
    recipient: Address
    """``to``, parsed; its mailbox is the forward-path."""


def judge(request: SendRequest, policy: Policy) -> Sender | None:
    """The sender of ``request``; None when nothing is to be sent and the caller is told of success all the same.

    Raises ``SubmissionRejected`` when ``from`` or ``reply_to`` is no address or its domain is not allowed, and
    ``AddressInvalid`` when ``to`` is none: by the contract a failed delivery, not a refused request.
    """
    recipient = None
    if policy.allowed_recipient_domains:
        try:
            recipient = parse_address(request.to)
        except AddressInvalid:
            return None
        if not is_within(recipient.domain, policy.allowed_recipient_domains):
            return None

    from_address = policy.default_from_address
    if request.from_:
        from_address = _parsed(request.from_, contract.INVALID_FROM, "from")
        if from_address.domain not in policy.allowed_from_domains:
            raise SubmissionRejected(contract.FROM_DOMAIN_NOT_ALLOWED, "from")

    reply_to = None
    if request.reply_to:
        reply_to = _parsed(request.reply_to, contract.INVALID_REPLY_TO, "reply_to")
        if not is_within(reply_to.domain, policy.allowed_reply_to_domains):
            raise SubmissionRejected(contract.REPLY_TO_DOMAIN_NOT_ALLOWED, "reply_to")

    if not policy.email_enabled:
        return None
    return Sender(
        from_address,
        request.from_display_name or policy.default_from_display_name,
        reply_to,
        recipient or parse_address(request.to),
    )


def normalised_domains(texts: Iterable[str]) -> tuple[str, ...]:
    """The domains of a setting in the form that ``Policy`` needs; blank entries are dropped.

    Raises ``ValueError`` that names the first bad one.
    """
    domains = []
    for text in filter(None, map(str.strip, texts)):
        try:
            domain = normalised_domain(text)
        except AddressInvalid as error:
            raise ValueError(f"{text[:60]!r}: {error}") from error
        if not _HOST_NAME.fullmatch(domain):  # "*.example.org", for one, would silently match nothing
            raise ValueError(f"{text[:60]!r}: the domain has a character that no host name has")
        domains.append(domain)
    return tuple(domains)


def _parsed(text: str, error: str, field: str) -> Address:
    try:
        return parse_address(text)
    except AddressInvalid as cause:
        raise SubmissionRejected(error, field, str(cause)) from cause


def is_within(domain: str, allowed: tuple[str, ...]) -> bool:
    """Whether ``domain`` is one of ``allowed`` or a subdomain of one."""
    while domain not in allowed:
        _, dot, domain = domain.partition(".")
        if not dot:
            return False
    return True
