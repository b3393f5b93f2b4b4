"""The mail: what submission makes, delivery sends and tracking records."""

from __future__ import annotations

from typing import NamedTuple


class Mail(NamedTuple):
    """One mail, ready to be handed over. Built by ``compose``, never changed afterwards."""

    email_id: str
    """Ours (a UUID); it is the key of the record."""
    group_id: str
    """As the caller gave it; equal to ``email_id`` when none was given."""
    reverse_path: str
    """RFC 5321 mailbox without angle brackets; the domain in A-labels, so ASCII but for the local part."""
    forward_paths: tuple[str, ...]
    """RFC 5321 mailboxes without angle brackets, like ``reverse_path``."""
    content: bytes
    """Header section and body (RFC 5322): CRLF line ends, ends in CRLF, not yet dot-stuffed."""
    to: str
    """The To header as the caller wrote it, for the record."""
    subject_header: str
    """The subject as the caller wrote it, for the record."""
    message_id_header: str
    """With its angle brackets."""
