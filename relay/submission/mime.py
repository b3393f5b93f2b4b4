"""The mail of a request with options: its parts (RFC 2045, 2046, 2387) and its header section, as bytes.

Owns which part stands where, and the sizes. A request with less has fewer parts:

    multipart/mixed                     with attachments
      multipart/alternative             with text and html
        text/plain
        multipart/related               with inline images that the html refers to by content id
          text/html
          image/png …
      application/pdf …

Texts are encoded by ``body``, in 7bit, quoted-printable or base64, files in base64, so that no mail depends on
8BITMIME. Only a mail in a mail may not be (RFC 2046 §5.2.1): it goes as it is, or is refused. A large file is
turned into base64 block by block, straight into the finished mail, whose size is known before: besides the file and
the mail nothing of their size is ever held.
"""

from __future__ import annotations

import binascii
import io
import os
import struct
from typing import Final, NamedTuple

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission import fields, header
from relay.submission.attachment import Attachment, part_fields
from relay.submission.body import LINE_LIMIT_BYTES, encode_body
from relay.submission.options import Options
from relay.submission.policy import Sender
from relay.submission.recipients import Recipient, Recipients
from relay.submission.request import SendRequest

_LINE_BYTES: Final = 57  # which make 76 of base64, RFC 2045 §6.8
_BLOCK_LINES: Final = 768
_BLOCK_BYTES: Final = _LINE_BYTES * _BLOCK_LINES
_split_into_lines: Final = struct.Struct("76s" * _BLOCK_LINES).unpack  # a third faster than slices


class _File(NamedTuple):
    """A piece of the body that is turned into base64 when the mail is written."""

    content: bytes


class _Part(NamedTuple):
    """A part. Its pieces end with a CRLF, which in multipart belongs to the boundary that follows."""

    fields: str
    """Its header section, each line with its CRLF."""
    pieces: tuple[bytes | _File, ...]


class Body(NamedTuple):
    """The body of a mail, checked and measured but not yet written. Mails to several recipients share one."""

    fields: str
    """The fields of the mail's header section that belong to it, each line with its CRLF."""
    pieces: tuple[bytes | _File, ...]
    size_bytes: int
    """Of all that ``pieces`` become."""


def prepare_body(request: SendRequest, options: Options, limit_bytes: int) -> Body:
    """The body that ``request`` and ``options`` make; one of ``html`` and ``text`` may be ''.

    Objects must have been fetched (``ValueError``). Raises ``SubmissionRejected`` with ``INVALID_REQUEST_PAYLOAD`` when
    the mail must exceed ``limit_bytes``, and for an attached mail that cannot go as it is.
    """
    check_size(least_size_bytes(request, options), limit_bytes)
    related: list[_Part] = []
    mixed: list[_Part] = []
    verbatim: list[bytes] = []  # whatever might hold a boundary
    for number, attachment in enumerate(options.attachments):
        if attachment.object is not None:  # it would go out empty
            raise ValueError(f"attachments[{number}] has not been fetched")
        part = _attachment_part(f"attachments[{number}]", attachment)
        if attachment.is_message:
            verbatim.append(attachment.content)
        is_shown = attachment.disposition == "inline" and attachment.content_id and request.html
        (related if is_shown else mixed).append(part)

    texts = []
    for subtype, text in (("plain", request.text), ("html", request.html)):
        if text:
            encoding, data = encode_body(text)
            if encoding == "7bit":
                verbatim.append(data)
            texts.append(_text_part(subtype, encoding, data))
    boundaries = _new_boundaries(verbatim)
    if related:
        # Our one inner part is the html: RFC 2387 wants its type, and that it comes first.
        texts[-1] = _multipart("related", (texts[-1], *related), boundaries[0], '; type="text/html"')
    whole = texts[0] if len(texts) == 1 else _multipart("alternative", tuple(texts), boundaries[1])
    if mixed:
        whole = _multipart("mixed", (whole, *mixed), boundaries[2])
    elif len(texts) == 1 and not related:
        whole = _without_boundary(whole)
    return Body(whole.fields, whole.pieces, sum(map(_size_bytes, whole.pieces)))


def compose_options(
    *,
    request: SendRequest,
    options: Options,
    sender: Sender,
    recipients: Recipients,
    body: Body,
    message_id_header: str,
    date_header: str,
    tracking_id: str,
    email_id: str,
    configuration_set: str,
    limit_bytes: int,
) -> bytes:
    """The content of one mail, as ``compose.compose`` makes it: CRLF line ends, lines of at most 998 octets.

    ``recipients`` are those of this mail: ``Recipients.individually`` gives them when each gets one alone. Its ``bcc``
    stand nowhere. ``body`` is what ``prepare_body`` made of ``request`` and ``options``. The SES fields stand there
    with a ``configuration_set``, the tags also without. Raises ``SubmissionRejected`` when the mail exceeds
    ``limit_bytes``.
    """
    lines = [header.mailbox("From", sender.from_display_name, sender.from_address)]
    if recipients.to:
        lines.append(_address_list("To", recipients.to))
    if recipients.cc:
        lines.append(_address_list("Cc", recipients.cc))
    if sender.reply_to is not None:
        lines.append(header.mailbox_as_given("Reply-To", request.reply_to, sender.reply_to))
    lines.append(header.unstructured("Subject", request.subject_header))
    lines.append(f"Date: {header.token(date_header)}")
    lines.append(f"Message-ID: {header.token(message_id_header)}")
    if options.in_reply_to:
        lines.append(fields.message_ids_field("In-Reply-To", options.in_reply_to.split(" ")))
    if options.references:
        lines.append(fields.message_ids_field("References", options.references))
    if configuration_set:
        lines.append(f"{contract.SES_CONFIGURATION_SET_HEADER}: {header.token(configuration_set)}")
    if configuration_set or options.tags:
        lines.append(fields.tags_field(options.tags, email_id))
    lines.append(f"{contract.TRACKING_HEADER}: {header.token(tracking_id)}")
    lines.extend(fields.header_field(name, value) for name, value in options.headers)
    lines.append("MIME-Version: 1.0")
    head = ("\r\n".join(lines) + "\r\n" + body.fields + "\r\n").encode("utf-8", "replace")
    size_bytes = len(head) + body.size_bytes
    check_size(size_bytes, limit_bytes)
    return _written(head, body.pieces, size_bytes)


# -- sizes ------------------------------------------------------------------------------------------------------------


def base64_bytes(size_bytes: int) -> int:
    """What a file of ``size_bytes`` takes in a mail: base64 in lines of 76, each with its CRLF."""
    lines = (size_bytes + _LINE_BYTES - 1) // _LINE_BYTES
    return (size_bytes + 2) // 3 * 4 + 2 * max(1, lines)


def least_size_bytes(request: SendRequest, options: Options) -> int:
    """What the mail takes at the least, whatever its header section is; nothing is encoded to find out."""
    texts = len(request.text) + len(request.html)
    return texts + sum(
        len(attachment.content) if attachment.is_message else base64_bytes(len(attachment.content))
        for attachment in options.attachments
    )


def room_bytes(request: SendRequest, options: Options, limit_bytes: int) -> int:
    """How large a file that is still to be fetched may be at the most; 0 when there is no room left."""
    return max(0, (limit_bytes - least_size_bytes(request, options)) // 78 * _LINE_BYTES)


def check_size(size_bytes: int, limit_bytes: int) -> None:
    """Refuses a mail of ``size_bytes`` (as it goes out, before dot-stuffing) when that exceeds the limit."""
    if size_bytes > limit_bytes:
        detail = (
            f"the mail would have {size_bytes} bytes with its attachments in base64; the relay's limit is {limit_bytes}"
        )
        raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, "attachments", detail)


def _size_bytes(piece: bytes | _File) -> int:
    return base64_bytes(len(piece.content)) if isinstance(piece, _File) else len(piece)


# -- parts ------------------------------------------------------------------------------------------------------------


def _text_part(subtype: str, encoding: str, data: bytes) -> _Part:
    return _Part(
        f"Content-Type: text/{subtype}; charset=utf-8\r\nContent-Transfer-Encoding: {encoding}\r\n",
        (data,),
    )


def _without_boundary(part: _Part) -> _Part:
    """A text that is a mail's whole body: no boundary takes its last CRLF, so it keeps the one line end it has."""
    (data,) = part.pieces
    if isinstance(data, bytes) and data.endswith(b"\r\n\r\n"):
        return part._replace(pieces=(data[:-2],))
    return part


def _attachment_part(field: str, attachment: Attachment) -> _Part:
    if not attachment.is_message:
        return _Part(part_fields(attachment, "base64"), (_File(attachment.content),))
    content = attachment.content
    line_ends = content.count(b"\r\n")
    if line_ends != content.count(b"\n") or line_ends != content.count(b"\r"):
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    if not content or not content.isascii() or b"\0" in content or not _has_short_lines(content):
        detail = (
            f"{field} is a mail, which may not be encoded, so it must be ASCII in lines of at most {LINE_LIMIT_BYTES};"
            " attach it as application/octet-stream instead"
        )
        raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, "attachments", detail)
    return _Part(part_fields(attachment, "7bit"), (content, b"\r\n"))


def _has_short_lines(content: bytes) -> bool:
    """``body.has_short_lines`` for bytes with CRLF: it makes no copy of what may be large."""
    start = 0
    last_line = len(content) - LINE_LIMIT_BYTES
    while start < last_line:
        line_end = content.rfind(b"\r\n", start, start + LINE_LIMIT_BYTES + 2)
        if line_end < 0:
            return False
        start = line_end + 2
    return True


def _multipart(subtype: str, parts: tuple[_Part, ...], boundary: str, parameters: str = "") -> _Part:
    pieces: list[bytes | _File] = []
    for part in parts:
        pieces.append(f"--{boundary}\r\n{part.fields}\r\n".encode())
        pieces.extend(part.pieces)
    pieces.append(f"--{boundary}--\r\n".encode())
    return _Part(f'Content-Type: multipart/{subtype}{parameters}; boundary="{boundary}"\r\n', tuple(pieces))


def _new_boundaries(verbatim: list[bytes]) -> list[str]:
    """Three boundaries of equal length, so that none begins another, and none of which stands in ``verbatim``.

    "=_" occurs neither in quoted-printable nor in base64. 96 random bits each: a caller cannot know it beforehand.
    """
    while True:
        digits = os.urandom(36).hex()
        boundaries = [f"=_{digits[at : at + 24]}" for at in (0, 24, 48)]
        if not any(boundary.encode() in text for text in verbatim for boundary in boundaries):
            return boundaries


# -- bytes ------------------------------------------------------------------------------------------------------------


def _address_list(name: str, recipients: tuple[Recipient, ...]) -> str:
    """``name: one,`` and each other on a line of its own, as ``header.mailbox_as_given`` writes it."""
    if len(recipients) == 1:
        return header.mailbox_as_given(name, *recipients[0])
    # As if the name were one longer, which leaves room for the comma.
    entries = [header.mailbox_as_given(f"{name} ", *recipient)[len(name) + 3 :] for recipient in recipients]
    return f"{name}: " + ",\r\n ".join(
        _with_room_for_comma(entry, recipient.address.mailbox)
        for entry, recipient in zip(entries, recipients, strict=True)
    )


def _with_room_for_comma(entry: str, mailbox: str) -> str:
    """``entry``, its mailbox on a line of its own when the comma would not fit (RFC 2047 §2)."""
    line = entry[entry.rfind("\n") + 1 :]
    if len(line) < header.FOLDED_LINE_BYTES or "=?" not in line or f" <{mailbox}>" not in line:
        return entry
    return f"{entry.removesuffix(f' <{mailbox}>')}\r\n <{mailbox}>"


def _written(head: bytes, pieces: tuple[bytes | _File, ...], size_bytes: int) -> bytes:
    if not any(isinstance(piece, _File) for piece in pieces):
        return b"".join((head, *pieces))  # type: ignore[arg-type]
    out = io.BytesIO()
    # Grown to its size at once; ``getvalue`` gives what it holds without a copy when that is all of it.
    out.seek(size_bytes - 1)
    out.write(b"\n")
    out.seek(0)
    out.write(head)
    for piece in pieces:
        if isinstance(piece, _File):
            _write_base64(out, piece.content)
        else:
            out.write(piece)
    return out.getvalue()


def _write_base64(out: io.BytesIO, content: bytes) -> None:
    whole_blocks = len(content) // _BLOCK_BYTES * _BLOCK_BYTES
    view = memoryview(content)
    for at in range(0, whole_blocks, _BLOCK_BYTES):
        lines = _split_into_lines(binascii.b2a_base64(view[at : at + _BLOCK_BYTES], newline=False))
        out.write(b"\r\n".join(lines))
        out.write(b"\r\n")
    rest = binascii.b2a_base64(view[whole_blocks:], newline=False)
    for at in range(0, len(rest), 76):
        out.write(rest[at : at + 76])
        out.write(b"\r\n")
    if not content:
        out.write(b"\r\n")
