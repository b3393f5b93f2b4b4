"""A mail as a caller asks for it, and the request that it becomes.

Owns the JSON names of ``send_email`` as the client writes them: what is empty is left out, so a mail that uses only
the contract's eight string fields is a request like those of every caller before. What the values mean is judged by
the relay alone.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict

from relay.client.errors import InvalidMail

MAX_REQUEST_ID_CHARACTERS: Final = 128

Mailboxes = str | Sequence[str]
"""One mailbox, or several."""


class ObjectRef(NamedTuple):
    """An object of a NATS Object Store, where what is too large for one message lies."""

    bucket: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """A file that goes with a mail: its ``content``, or the ``object`` that holds it."""

    filename: str
    content: bytes | None = None
    object: ObjectRef | None = None
    content_type: str = ""
    """'' = by the file's name."""
    content_id: str = ""
    """Of an inline image: ``<img src="cid:…">`` names it."""
    disposition: str = ""
    """``attachment`` or ``inline``; '' = the relay's choice."""

    @classmethod
    def from_path(cls, path: str | Path, **changed: Any) -> Attachment:
        """The file at ``path``, which is read at once; ``changed`` are fields of the attachment."""
        path = Path(path)
        return cls(**{"filename": path.name, "content": path.read_bytes(), **changed})

    def __repr__(self) -> str:
        return f"Attachment(content_type={self.content_type!r})"

    def members(self) -> dict[str, Any]:
        """Itself as JSON has it. Raises ``InvalidMail``."""
        if (self.content is None) == (self.object is None):
            raise InvalidMail("invalid attachment", detail="an attachment has either content or an object")
        guessed = mimetypes.guess_type(self.filename)[0] or "application/octet-stream"
        members: dict[str, Any] = {"filename": self.filename, "content_type": self.content_type or guessed}
        if self.object is not None:
            members["object"] = self.object._asdict()
        elif self.content is not None:
            members["content"] = base64.b64encode(self.content).decode()
        if self.content_id:
            members["content_id"] = self.content_id
        if self.disposition:
            members["disposition"] = self.disposition
        return members


class MailFields(TypedDict, total=False):
    """The fields of a ``Mail`` as keyword arguments."""

    to: Mailboxes
    subject: str
    html: str
    text: str
    from_: str
    from_display_name: str
    reply_to: str
    group_id: str
    cc: Mailboxes
    bcc: Mailboxes
    recipients_as: str
    request_id: str | None
    timeout_seconds: float | None
    message_id_header: str
    in_reply_to: str
    references: str | Sequence[str]
    headers: Mapping[str, str | Sequence[str]]
    tags: Mapping[str, str]
    attachments: Sequence[Attachment]
    allow_single_part: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Mail:
    """One ``send_email`` request. The names are the contract's, but for ``from_``."""

    to: Mailboxes
    subject: str
    html: str = ""
    text: str = ""
    from_: str = ""
    from_display_name: str = ""
    reply_to: str = ""
    group_id: str = ""
    cc: Mailboxes = ()
    bcc: Mailboxes = ()
    recipients_as: str = ""
    """``together`` (the relay's default) or ``individual``: one mail for each of ``to``."""
    request_id: str | None = ""
    """Under which the relay sends the mail once. '' = the client makes one up for the call; None = none, and then a
    try that is not answered is not repeated. Your own, kept with your data, also covers a call that your process
    did not live to finish."""
    timeout_seconds: float | None = None
    """The mail is not to go out any later than this after the call; None = as long as client and relay try."""
    message_id_header: str = ""
    in_reply_to: str = ""
    references: str | Sequence[str] = ()
    headers: Mapping[str, str | Sequence[str]] | None = None
    tags: Mapping[str, str] | None = None
    attachments: Sequence[Attachment] = ()
    allow_single_part: bool = False
    """Whether one of ``html`` and ``text`` may be missing."""

    def __repr__(self) -> str:
        """Nothing that may hold an address or content: this ends up in logs and tracebacks."""
        return f"Mail(request_id={self.request_id!r})"

    def own_request_id(self) -> str:
        """Its request_id, a new one, or '' for none. Raises ``InvalidMail``."""
        if self.request_id is None:
            return ""
        if self.request_id == "":
            return str(uuid.uuid4())
        is_fit = self.request_id.isascii() and self.request_id.isprintable()
        if not is_fit or len(self.request_id) > MAX_REQUEST_ID_CHARACTERS:
            raise InvalidMail(
                "invalid request_id", detail=f"request_id must be 1 to {MAX_REQUEST_ID_CHARACTERS} printable ASCII"
            )
        return self.request_id

    def encode(self, request_id: str) -> bytes:
        """The request, without ``timeout_seconds``, which differs from try to try. Raises ``InvalidMail``."""
        members: dict[str, Any] = {}
        for name in _NAMES:
            value = getattr(self, name)
            if value:
                members[_JSON_NAMES.get(name, name)] = value
        if self.attachments:
            members["attachments"] = [attachment.members() for attachment in self.attachments]
        if request_id:
            members["request_id"] = request_id
        return as_json(members)


_NAMES: Final = [
    each.name for each in fields(Mail) if each.name not in {"request_id", "timeout_seconds", "attachments"}
]
_JSON_NAMES: Final = {"from_": "from"}


class StoredMail(NamedTuple):
    """A whole request that lies in a bucket, as ``put_mail`` made it."""

    object: ObjectRef
    request_id: str

    def encode(self) -> bytes:
        """The request that refers to it."""
        return as_json({"object": self.object._asdict()})


def with_timeout(request: bytes, timeout_seconds: float) -> bytes:
    """The encoded request with one field more; it is a JSON object that is not empty and has none such."""
    return b'%b,"timeout_seconds":%.3f}' % (request[:-1], max(timeout_seconds, 0.001))


def as_mail(mail: Mail | None, changed: MailFields) -> Mail:
    """The mail of a call that gave one, fields, or both. Raises ``InvalidMail`` for names that there are not."""
    if mail is not None and not changed:
        return mail
    given: dict[str, Any] = {} if mail is None else {each.name: getattr(mail, each.name) for each in fields(mail)}
    try:
        return Mail(**{**given, **changed})
    except TypeError as error:
        raise InvalidMail("invalid mail", detail=str(error).removeprefix("Mail.__init__() ")) from error


def as_json(value: Any) -> bytes:
    """JSON in UTF-8. Raises ``InvalidMail`` for what JSON has no word for."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_listed, allow_nan=False)
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: as an escape it travels, and the relay makes it U+FFFD
        return json.dumps(value, separators=(",", ":"), default=_listed, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidMail("invalid mail", detail=str(error)) from error


def _listed(value: Any) -> Any:
    """Sequences and mappings that are no lists and dicts."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"a value of a mail may not be of type {type(value).__name__}")
