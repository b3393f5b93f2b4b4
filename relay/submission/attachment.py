"""Attachments: what a caller said of a file becomes a value, and the fields of its part.

Owns the rules for file names (RFC 2183, RFC 2231), content types (RFC 2045 §5.1) and content ids (RFC 2392), and
base64 in (RFC 4648 §4). The bytes of a file are kept as they are, decoded: that is three quarters of what
came, base64 for the wire is made from them when the mail is written, and never stands in memory by itself. Where
a part stands in the mail is ``mime``'s.
"""

from __future__ import annotations

import binascii
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission.fields import reject

FILENAME_LIMIT_BYTES: Final = 255
"""In UTF-8: what file systems take. So no name needs to go on over several parameters."""
CONTENT_TYPE_LIMIT: Final = 255
CONTENT_ID_LIMIT: Final = 250
OBJECT_NAME_LIMIT: Final = 1024
DEFAULT_CONTENT_TYPE: Final = "application/octet-stream"

ATTACHMENT_FIELDS: Final = ("filename", "content_type", "content", "object", "content_id", "disposition")
OBJECT_FIELDS: Final = ("bucket", "name")

_TOKEN: Final = r"[!#$%&'*+.0-9A-Z^_`a-z{|}~-]+"
_CONTENT_TYPE: Final = re.compile(rf"[ \t]*({_TOKEN})/({_TOKEN})[ \t]*")
_PARAMETER: Final = re.compile(rf';[ \t]*({_TOKEN})=(?:({_TOKEN})|"((?:[ !#-\[\]-~]|\\[ -~])*)")[ \t]*')
# Without what marks extended values in RFC 2231: some take a token with one for such.
_PLAIN_TOKEN: Final = re.compile(r"[A-Za-z0-9._+-]+")
_QUOTED_PAIR: Final = re.compile(r"\\(.)")
# The file's name is given beside; a boundary belongs to multipart; extended values (RFC 2231) nobody needs here.
_DROPPED_PARAMETERS: Final = ("name", "boundary")
_FORBIDDEN_IN_NAMES: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# What every reader takes in a quoted string: no escapes, no encoded words, no space that might be trimmed or merged.
_PLAIN_FILENAME: Final = re.compile(r"(?!.*(?:=\?|  ))[!#-\[\]-~](?:[ !#-\[\]-~]*[!#-\[\]-~])?")
_NOT_IN_FALLBACK: Final = re.compile(r'[^ -~]|["\\=?%]')
_CONTENT_ID: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.@-]+")
_BUCKET: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LINE_ENDS: Final = {0x0A: None, 0x0D: None}


class ObjectRef(NamedTuple):
    """An object in a NATS Object Store."""

    bucket: str
    name: str


class Attachment(NamedTuple):
    """One file of a mail."""

    filename: str
    """'' when the caller gave none."""
    content_type: str
    """As it stands in the header: checked, parameters quoted where needed."""
    content: bytes
    """As the recipient gets it, not in base64; b'' as long as ``object`` was not fetched."""
    content_id: str
    """Without angle brackets; '' when the caller gave none."""
    disposition: str
    """``attachment`` or ``inline``."""
    object: ObjectRef | None

    @property
    def is_message(self) -> bool:
        """Whether it is a mail itself, which may not be in base64 (RFC 2046 §5.2.1)."""
        return self.content_type.startswith("message/")

    def fetched(self, content: bytes) -> Attachment:
        """This attachment with the content of its object, which it refers to no longer."""
        return self._replace(content=content, object=None)


def new_attachment(field: str, given: dict[str, Any]) -> Attachment:
    """The attachment that ``given`` says; its keys are some of ``ATTACHMENT_FIELDS``, with ``object`` a value already.

    ``field`` is where it stands in the request, for errors. Its ``content`` is taken out of ``given``, so that the
    base64 can be let go of as soon as it is decoded.
    """
    texts: dict[str, str] = {}
    for name in ("filename", "content_type", "content_id", "disposition"):
        value = given.get(name, "")
        if not isinstance(value, str):
            reject("attachments", f"{field}.{name} must be a string")
        texts[name] = value
    filename, content_id = texts["filename"], texts["content_id"]
    if _FORBIDDEN_IN_NAMES.search(filename):
        reject("attachments", f"{field}.filename has a control character")
    if len(filename.encode()) > FILENAME_LIMIT_BYTES:
        reject("attachments", f"{field}.filename is longer than {FILENAME_LIMIT_BYTES} bytes in UTF-8")
    content_type = _content_type(field, texts["content_type"]) if texts["content_type"] else DEFAULT_CONTENT_TYPE
    if content_id.startswith("<") and content_id.endswith(">"):
        content_id = content_id[1:-1]
    if texts["content_id"] and (
        len(content_id) > CONTENT_ID_LIMIT or "=?" in content_id or not _CONTENT_ID.fullmatch(content_id)
    ):
        reject("attachments", f"{field}.content_id must be at most {CONTENT_ID_LIMIT} of the characters of an address")
    disposition = texts["disposition"].lower() or ("inline" if content_id else "attachment")
    if disposition not in ("attachment", "inline"):
        reject("attachments", f"{field}.disposition must be 'attachment' or 'inline'")
    reference = given.get("object")
    if (reference is None) == (given.get("content") is None):
        reject("attachments", f"{field} must have either content (base64) or object, and not both")
    content = b"" if reference is not None else decode_base64(f"{field}.content", given.pop("content"))
    return Attachment(filename, content_type, content, content_id, disposition, reference)


def new_object_ref(field: str, given: Mapping[str, object]) -> ObjectRef:
    """The object that ``given`` names; ``field`` is where it stands in the request."""
    top = field.partition("[")[0]
    bucket, name = given.get("bucket"), given.get("name")
    if not isinstance(bucket, str) or not _BUCKET.fullmatch(bucket):
        reject(top, f"{field}.bucket must be the name of an Object Store bucket: letters, digits, '_' and '-'")
    if (
        not isinstance(name, str)
        or not 0 < len(name.encode("utf-8", "replace")) <= OBJECT_NAME_LIMIT
        or _FORBIDDEN_IN_NAMES.search(name)
    ):
        reject(top, f"{field}.name must be 1 to {OBJECT_NAME_LIMIT} bytes without control characters")
    return ObjectRef(bucket, name)


def decode_base64(field: str, text: object) -> bytes:
    """The bytes of ``text``. Line ends in it are skipped, as Go does; anything else that is not base64 is refused."""
    if not isinstance(text, str):
        reject("attachments", f"{field} must be a string in base64")
    # a2b_base64 reads the string where it stands, which base64.b64decode would copy first.
    if "\n" in text or "\r" in text:
        text = text.translate(_LINE_ENDS)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        detail = f"{field} is not base64 (RFC 4648 §4: '+' and '/', with padding)"
        raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, "attachments", detail) from error


def _content_type(field: str, text: str) -> str:
    """``type/subtype; name=value`` written anew. Names in lower case; parameters that mean nothing here are dropped."""
    match = _CONTENT_TYPE.match(text) if len(text) <= CONTENT_TYPE_LIMIT else None
    if match is None:
        reject("attachments", f"{field}.content_type must be 'type/subtype', as RFC 2045 has it: 'application/pdf'")
    essence = f"{match[1]}/{match[2]}".lower()
    if essence.startswith("multipart/"):
        reject("attachments", f"{field}.content_type must not be multipart; attach its parts one by one")
    if essence in ("message/partial", "message/external-body"):
        reject("attachments", f"{field}.content_type must not be {essence}, which stands for content that is elsewhere")
    parameters: dict[str, str] = {}
    at = match.end()
    while at < len(text):
        parameter = _PARAMETER.match(text, at)
        if parameter is None:
            if text[at:].strip(" \t") == ";":  # as some write at the end
                break
            reject("attachments", f'{field}.content_type has a parameter that is not name=value or name="value"')
        name, token, quoted = parameter[1].lower(), parameter[2], parameter[3]
        if name in parameters:
            reject("attachments", f"{field}.content_type has the parameter {name} twice")
        value = token if token is not None else _QUOTED_PAIR.sub(r"\1", quoted)
        if "=?" in value:
            reject("attachments", f"{field}.content_type must not have encoded words")
        parameters[name] = value
        at = parameter.end()
    for name in [name for name in parameters if name in _DROPPED_PARAMETERS or "*" in name]:
        del parameters[name]
    return essence + "".join(f"; {name}={_parameter_value(value)}" for name, value in parameters.items())


def _parameter_value(value: str) -> str:
    if _PLAIN_TOKEN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def part_fields(attachment: Attachment, transfer_encoding: str) -> str:
    """The header section of the part, without the empty line that ends it. ASCII; no line exceeds 998 octets."""
    filename, name_parameter = attachment.filename, ""
    if not filename:
        filename_parameter = ""
    elif _PLAIN_FILENAME.fullmatch(filename):
        filename_parameter = f'; filename="{filename}"'
    else:
        filename_parameter = f";\r\n filename*=utf-8''{quote(filename, safe='')}"
        # For who cannot read RFC 2231. Not as a second filename, of which some would take the wrong one.
        name_parameter = f';\r\n name="{ascii_filename(filename)}"'
    content_id = f"Content-ID: <{attachment.content_id}>\r\n" if attachment.content_id else ""
    return (
        # Its parameters are at most twice as long as they came, for their backslashes.
        f"Content-Type: {attachment.content_type}{name_parameter}\r\n"
        f"Content-Transfer-Encoding: {transfer_encoding}\r\n"
        f"Content-Disposition: {attachment.disposition}{filename_parameter}\r\n"
        f"{content_id}"
    )


def ascii_filename(filename: str) -> str:
    """``filename`` as ASCII can say it: letters without their marks, ``_`` for whatever has no such letter."""
    decomposed = unicodedata.normalize("NFKD", filename)
    letters = "".join(character for character in decomposed if not unicodedata.combining(character))
    return " ".join(_NOT_IN_FALLBACK.sub("_", letters).split()) or "_"
