"""The mail of a request with options, as the standard library's parser reads it, and what it costs in memory."""

from __future__ import annotations

import base64
import email
import email.policy
import os
import re
import subprocess
import sys
import tracemalloc
from email.headerregistry import AddressHeader
from email.message import EmailMessage
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission import mime
from relay.submission.address import parse_address
from relay.submission.attachment import Attachment, ObjectRef
from relay.submission.compose import compose
from relay.submission.fields import DEFAULT_ALLOWED_HEADERS, judge_headers
from relay.submission.options import Options, decode_options
from relay.submission.policy import Policy
from relay.submission.recipients import Recipients, judge_options
from relay.submission.request import SendRequest

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 40_000_000
RANDOM_MAILS = int(os.environ.get("RANDOM_MAILS", "200"))
"""How many random mails are tried; RANDOM_MAILS=10000 takes some minutes."""

REQUEST = SendRequest("user@example.com", "Hello", "<p>Hi</p>", "Hi", "", "", "", "")
POLICY = Policy(
    email_enabled=True,
    default_from="noreply@example.org",
    default_from_display_name="Example Service",
    allowed_from_domains=(),
    allowed_reply_to_domains=("example.org",),
    allowed_recipient_domains=(),
)
IDS = {
    "message_id_header": "<1@example.org>",
    "date_header": "Sun, 22 Nov 2026 01:02:03 +0000",
    "tracking_id": "batch/id-1",
    "email_id": "id-1",
}


def attachment(content: bytes = b"abc", content_type: str = "application/pdf", **changes: Any) -> Attachment:
    return Attachment("a.pdf", content_type, content, "", "attachment", None)._replace(**changes)


def mail(options: Options, request: SendRequest = REQUEST, *, configuration_set: str = "", **changes: Any) -> bytes:
    options = options if options.to else options._replace(to=(request.to,))
    sender, recipients = judge_options(request, options, POLICY, 50)
    assert sender is not None
    body = mime.prepare_body(request, options, LIMIT_BYTES)
    values: dict[str, Any] = {"recipients": recipients, "limit_bytes": LIMIT_BYTES, **IDS, **changes}
    content = mime.compose_options(
        request=request, options=options, sender=sender, body=body, configuration_set=configuration_set, **values
    )
    check_lines(content)
    return content


def parsed(content: bytes) -> EmailMessage:
    message = email.message_from_bytes(content, policy=email.policy.SMTP)
    for part in message.walk():
        assert not part.defects
        for value in part.values():
            assert not cast(Any, value).defects, str(value)
    return cast(EmailMessage, message)


def check_lines(content: bytes) -> None:
    assert content.endswith(b"\r\n")
    lines = content.split(b"\r\n")
    assert all(len(line) <= 998 for line in lines)
    assert all(len(line) <= 76 for line in lines if b"=?utf-8?" in line)
    assert not any(b"\r" in line or b"\n" in line or b"\0" in line for line in lines)


def shape(part: EmailMessage) -> Any:
    """Types of the parts, nested as they are."""
    if part.get_content_maintype() != "multipart":
        return part.get_content_type()
    return {part.get_content_type(): [shape(inner) for inner in cast(Any, part.iter_parts())]}


def without_boundaries(content: bytes) -> bytes:
    return re.sub(rb"=_[0-9a-f]{24}", b"B", content)


IMAGE = attachment(b"\x89PNG", "image/png", filename="logo.png", content_id="logo", disposition="inline")
ALTERNATIVE = {"multipart/alternative": ["text/plain", "text/html"]}
WITH_IMAGE = {"multipart/alternative": ["text/plain", {"multipart/related": ["text/html", "image/png"]}]}
SHAPES = [
    # html, text, attachments, the mail
    ("h", "t", (), ALTERNATIVE),
    ("h", "", (), "text/html"),
    ("", "t", (), "text/plain"),
    ("h", "t", (attachment(),), {"multipart/mixed": [ALTERNATIVE, "application/pdf"]}),
    ("", "t", (attachment(),), {"multipart/mixed": ["text/plain", "application/pdf"]}),
    ("h", "", (attachment(),), {"multipart/mixed": ["text/html", "application/pdf"]}),
    ("h", "t", (IMAGE,), WITH_IMAGE),
    ("h", "", (IMAGE,), {"multipart/related": ["text/html", "image/png"]}),
    ("", "t", (IMAGE,), {"multipart/mixed": ["text/plain", "image/png"]}),
    ("h", "t", (attachment(), IMAGE), {"multipart/mixed": [WITH_IMAGE, "application/pdf"]}),
    ("h", "t", (IMAGE._replace(content_id=""),), {"multipart/mixed": [ALTERNATIVE, "image/png"]}),
    ("h", "t", (IMAGE._replace(disposition="attachment"),), {"multipart/mixed": [ALTERNATIVE, "image/png"]}),
]


@pytest.mark.parametrize(("html", "text", "attachments", "expected"), SHAPES)
def test_the_parts_stand_where_they_belong(html: str, text: str, attachments: Any, expected: Any) -> None:
    content = mail(Options(attachments=attachments, allow_single_part=True), REQUEST._replace(html=html, text=text))
    assert shape(parsed(content)) == expected


def test_the_bytes_of_a_mail_with_an_image_and_a_file() -> None:
    options = Options(
        to=("user@example.com", "Jane <jane@example.com>"),
        cc=("cc@example.com",),
        bcc=("bcc@example.com",),
        in_reply_to="<0@example.com>",
        references=("<00@example.com>", "<0@example.com>"),
        headers=(("X-Campaign", "spring"),),
        tags=(("campaign", "spring"),),
        attachments=(IMAGE, attachment()),
    )
    content = mail(options, configuration_set="set-1")
    assert without_boundaries(content).decode().split("\r\n") == [
        'From: "Example Service" <noreply@example.org>',
        "To: user@example.com,",
        " Jane <jane@example.com>",
        "Cc: cc@example.com",
        "Subject: Hello",
        "Date: Sun, 22 Nov 2026 01:02:03 +0000",
        "Message-ID: <1@example.org>",
        "In-Reply-To: <0@example.com>",
        "References: <00@example.com> <0@example.com>",
        "X-SES-CONFIGURATION-SET: set-1",
        "X-SES-MESSAGE-TAGS: email_id=id-1, campaign=spring",
        "X-LFX-TRACKING-ID: batch/id-1",
        "X-Campaign: spring",
        "MIME-Version: 1.0",
        'Content-Type: multipart/mixed; boundary="B"',
        "",
        "--B",
        'Content-Type: multipart/alternative; boundary="B"',
        "",
        "--B",
        "Content-Type: text/plain; charset=utf-8",
        "Content-Transfer-Encoding: 7bit",
        "",
        "Hi",
        "--B",
        'Content-Type: multipart/related; type="text/html"; boundary="B"',
        "",
        "--B",
        "Content-Type: text/html; charset=utf-8",
        "Content-Transfer-Encoding: 7bit",
        "",
        "<p>Hi</p>",
        "--B",
        "Content-Type: image/png",
        "Content-Transfer-Encoding: base64",
        'Content-Disposition: inline; filename="logo.png"',
        "Content-ID: <logo>",
        "",
        "iVBORw==",
        "--B--",
        "--B--",
        "--B",
        "Content-Type: application/pdf",
        "Content-Transfer-Encoding: base64",
        'Content-Disposition: attachment; filename="a.pdf"',
        "",
        "YWJj",
        "--B--",
        "",
    ]
    assert len(set(re.findall(rb'boundary="([^"]+)"', content))) == 3


@pytest.mark.parametrize("configuration_set", ["", "set-1"])
def test_without_options_it_is_the_mail_that_compose_makes(configuration_set: str) -> None:
    sender, _ = judge_options(REQUEST, Options(to=(REQUEST.to,)), POLICY, 50)
    assert sender is not None
    plain = compose(request=REQUEST, sender=sender, configuration_set=configuration_set, **IDS)
    with_options = mail(Options(request_id="1"), configuration_set=configuration_set)
    assert without_boundaries(with_options) == without_boundaries(plain)


def test_tags_go_out_also_without_a_configuration_set() -> None:
    assert b"\r\nX-SES-MESSAGE-TAGS: email_id=id-1, a=b\r\n" in mail(Options(tags=(("a", "b"),)))


def test_bcc_stands_nowhere() -> None:
    content = mail(Options(to=("user@example.com",), bcc=("Hidden <hidden@example.com>", "b@example.com")))
    assert b"idden" not in content
    assert "Bcc" not in parsed(content)


def test_who_is_filtered_is_not_named() -> None:
    recipients = Recipients((), (), (), ("user@example.com",))
    content = mail(Options(), recipients=recipients)
    assert "To" not in parsed(content)
    assert b"user@example.com" not in content


def test_each_mail_of_its_own_has_one_recipient_and_the_same_body() -> None:
    options = Options(to=("a@example.com", "B <b@example.com>"), attachments=(attachment(),), is_individual=True)
    _, recipients = judge_options(REQUEST, options, POLICY, 50)
    mails = [mail(options, recipients=each) for each in recipients.individually()]
    assert [str(parsed(content)["To"]) for content in mails] == ["a@example.com", "B <b@example.com>"]


SINGLE = [
    # text, what the recipient has
    ("Hi", "Hi\r\n"),
    ("Hi\n", "Hi\r\n"),
    ("Hi\r\n\r\n", "Hi\r\n\r\n"),
    ("Grüße", "Grüße"),  # in base64, which says exactly where a text ends
    ("Grüße an alle, die dies hier lesen\n", "Grüße an alle, die dies hier lesen\r\n"),
    ("\u65e5\u672c", "\u65e5\u672c"),
    ("\n", "\r\n"),
]


@pytest.mark.parametrize(("text", "expected"), SINGLE)
def test_a_text_alone_ends_in_one_line_end(text: str, expected: str) -> None:
    content = mail(Options(allow_single_part=True), REQUEST._replace(html="", text=text))
    assert parsed(content).get_payload(decode=True) == expected.encode()


# -- mails in mails ---------------------------------------------------------------------------------------------------

INNER = b"From: a@example.com\r\nSubject: Inner\r\n\r\nHello\r\n.\r\nWorld\r\n"


@pytest.mark.parametrize("inner", [INNER, INNER.replace(b"\r\n", b"\n"), INNER.replace(b"\r\n", b"\r"), INNER[:-2]])
def test_a_mail_in_a_mail_is_not_encoded(inner: bytes) -> None:
    content = mail(Options(attachments=(attachment(inner, "message/rfc822", filename="inner.eml"),)))
    part = parsed(content).get_payload()[1]  # type: ignore[index]
    assert part["Content-Transfer-Encoding"] == "7bit"  # type: ignore[index]
    whole = INNER if inner.endswith((b"\r\n", b"\n", b"\r")) else INNER[:-2]
    assert b"\r\n\r\n" + whole + b"\r\n--=_" in content
    (message,) = cast(Any, part).get_payload()
    assert message["Subject"] == "Inner"


def test_a_mail_in_a_mail_cannot_end_the_part_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = iter([b"\1" * 36, b"\2" * 36])
    monkeypatch.setattr(os, "urandom", lambda _: next(digits))
    inner = INNER + b"--=_" + b"01" * 12 + b"--\r\n"
    content = mail(Options(attachments=(attachment(inner, "message/rfc822"),)))
    assert content.count(b"=_" + b"01" * 12) == 1


UNFIT = [b"", b"Subject: \xe9\r\n\r\n", b"Subject: x\r\n\r\n\0", INNER + b"x" * 999, b"x" * 999 + b"\r\n" + INNER]


@pytest.mark.parametrize("inner", UNFIT)
def test_a_mail_that_would_need_encoding_is_refused(inner: bytes) -> None:
    with pytest.raises(SubmissionRejected) as refusal:
        mail(Options(attachments=(attachment(), attachment(inner, "message/rfc822"))))
    assert refusal.value.error == contract.INVALID_REQUEST_PAYLOAD
    assert refusal.value.field == "attachments"
    assert refusal.value.detail.startswith("attachments[1] is a mail")


def test_lines_of_998_octets_go_as_they_are() -> None:
    mail(Options(attachments=(attachment(b"x" * 998 + b"\r\n" + INNER + b"y" * 998, "message/rfc822"),)))


def test_an_object_that_was_not_fetched_never_goes_out_empty() -> None:
    waiting = attachment(b"", object=ObjectRef("files", "a"))
    with pytest.raises(ValueError, match=r"^attachments\[0\] has not been fetched"):
        mail(Options(attachments=(waiting,)))
    assert b"\r\nYWJj\r\n" in mail(Options(attachments=(waiting.fetched(b"abc"),)))


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 2, 3, 56, 57, 58, 114, 57 * 768 - 1, 57 * 768, 57 * 768 + 1, 57 * 768 * 3 + 100]
)
def test_a_file_is_base64_in_lines_of_76(size: int) -> None:
    data = os.urandom(size)
    content = mail(Options(attachments=(attachment(data),)))
    encoded = content.rpartition(b'"a.pdf"\r\n\r\n')[2].rpartition(b"--=_")[0]
    lines = encoded.removesuffix(b"\r\n").split(b"\r\n")
    assert [len(line) for line in lines[:-1]] == [76] * (len(lines) - 1)
    assert base64.b64decode(encoded) == data
    assert len(encoded) == mime.base64_bytes(size)


def test_the_limit_is_exact() -> None:
    options = Options(to=(REQUEST.to,), attachments=(attachment(b"x" * 100_000),))
    size = len(mail(options))
    assert len(mail(options, limit_bytes=size)) == size
    with pytest.raises(SubmissionRejected, match=rf"would have {size} bytes .* limit is {size - 1}"):
        mail(options, limit_bytes=size - 1)


def test_a_mail_that_must_be_too_large_is_refused_before_it_is_made() -> None:
    options = Options(to=(REQUEST.to,), attachments=(attachment(b"x" * 3_000_000),))
    least = mime.least_size_bytes(REQUEST, options)
    assert 3_000_000 * 78 / 57 <= least <= len(mail(options))
    mime.prepare_body(REQUEST, options, least)
    tracemalloc.start()
    try:
        with pytest.raises(SubmissionRejected, match="the relay's limit is"):
            mime.prepare_body(REQUEST, options, least - 1)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("limit", [10_000, 10_077, 1_000_000])
def test_what_fits_beside_the_rest(limit: int) -> None:
    options = Options(attachments=(attachment(b"x" * 1000), attachment(b"", object=ObjectRef("files", "a"))))
    room = mime.room_bytes(REQUEST, options, limit)
    fetched = options._replace(attachments=(options.attachments[0], options.attachments[1].fetched(b"x" * room)))
    assert limit - 2 * 78 < mime.least_size_bytes(REQUEST, fetched) <= limit
    assert mime.room_bytes(REQUEST, options, 10) == 0


# -- whatever is sent arrives -----------------------------------------------------------------------------------------

# The parser under comparison breaks lines also at U+2028 and U+2029; no caller may send controls in names and fields.
# It also merges spaces other than U+0020 with those.
CLEAN = st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]) | st.just(" ")
ASCII = st.characters(min_codepoint=0x20, max_codepoint=0x7E)
ATOM = st.text("abcXYZ019!#$%&'*+-/=^_`{|}~", min_size=1, max_size=12).filter(lambda text: "=?" not in text)
DOMAIN = st.sampled_from(["example.com", "sub.example.org", "bücher.example", "xn--bcher-kva.example", "EXAMPLE.TEST"])
BODY_PIECES = ["a", "word ", "\r", "\n", "\r\n", "\r\n.\r\n", "--", "=_", "é", "\U0001f600", "\0", "z" * 600, " "]
BODY = st.lists(st.sampled_from(BODY_PIECES), min_size=1, max_size=25).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100
)


@st.composite
def addresses(draw: st.DrawFn) -> str:
    spec = f"{draw(ATOM)}@{draw(DOMAIN)}"
    name = draw(st.none() | st.text(CLEAN, max_size=30) | st.text('a "\\,<>é=?', max_size=60))
    if name is None:
        return spec
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}" <{spec}>'


MESSAGE_ID = st.builds("<{}@{}>".format, ATOM, st.sampled_from(["example.com", "[192.0.2.1]", "a.b.example.org"]))
FOREIGN_ID = MESSAGE_ID | st.text('abc..@[]:;,"\\()=', min_size=1, max_size=60).map("<{}>".format)
FREE_VALUE = st.text(CLEAN, min_size=1, max_size=300) | st.text("a =?_é", min_size=1, max_size=1100)
PLAIN_VALUE = (
    st.lists(st.text("ab<>:,.=-", min_size=1, max_size=70), min_size=1, max_size=20)
    .map(" ".join)
    .filter(lambda text: "=?" not in text)
)
HEADERS = st.dictionaries(
    st.text("ABcd09-_", max_size=20).map("X-A{}z".format), FREE_VALUE | st.lists(FREE_VALUE, min_size=1, max_size=3)
)
TAG = st.text("abcXYZ019_-", min_size=1, max_size=256)
FILENAME = st.text(CLEAN, max_size=60) | st.text('ab."\\=?;% éü日', max_size=80)
TOKEN = st.text("abc019!#$&'*+-.^_`{|}~", min_size=1, max_size=20).filter(lambda text: "'" not in text)
PARAMETER = st.text(ASCII, max_size=30).filter(lambda text: "=?" not in text)


def quoted_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.integers(0, 9)) == 0:
        lines = draw(st.lists(st.text("ab .-=", max_size=90), min_size=1, max_size=8))
        content = "\r\n".join(["From: a@example.com", f"Subject: {draw(TAG)}", "", *lines]).encode()
        content_type, parameters = "message/rfc822", {}
    else:
        content = draw(st.binary(max_size=200))
        content_type = draw(st.sampled_from(["application/pdf", "image/png", "text/csv", "Text/Calendar", "x-a/b+c.d"]))
        parameters = draw(st.dictionaries(st.sampled_from(["charset", "method", "x-a"]), PARAMETER, max_size=3))
    return {
        "filename": draw(FILENAME.filter(lambda name: len(name.encode()) <= 255)),
        "content_type": content_type + "".join(f"; {name}={quoted_string(v)}" for name, v in parameters.items()),
        "content": base64.b64encode(content).decode(),
        "content_id": draw(st.just("") | ATOM.map("<{}@example.com>".format)),
        "disposition": draw(st.sampled_from(["", "attachment", "inline"])),
    }


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    to, cc, bcc = (draw(st.lists(addresses(), min_size=1, max_size=6)) for _ in range(3))
    has = draw(st.sampled_from(["both", "both", "html", "text"]))
    return {
        "to": to,
        "cc": cc if draw(st.booleans()) else cc[0],
        "bcc": bcc,
        "subject": draw(st.text(CLEAN, min_size=1, max_size=120)),
        "html": draw(BODY) if has != "text" else "",
        "text": draw(BODY) if has != "html" else "",
        "allow_single_part": True,
        "request_id": draw(st.text(ASCII, max_size=128)),
        "timeout_seconds": draw(st.integers(1, 60) | st.floats(0.001, 60)),
        "message_id_header": draw(MESSAGE_ID),
        "in_reply_to": draw(FOREIGN_ID.filter(lambda text: "=?" not in text)),
        "references": draw(st.lists(FOREIGN_ID.filter(lambda text: "=?" not in text), min_size=1, max_size=30)),
        "headers": {
            **draw(HEADERS),
            "List-Unsubscribe": draw(PLAIN_VALUE),
            "Auto-Submitted": "auto-generated",
            "Precedence": "bulk",
        },
        "tags": draw(st.dictionaries(TAG, TAG, min_size=1, max_size=49)),
        "attachments": draw(
            st.lists(files(), min_size=1, max_size=5, unique_by=lambda file: file["content_id"] or id(file))
        ),
    }


def named(texts: list[str], seen: set[str]) -> list[tuple[str, str]]:
    """Name and mailbox of each, but for those who stand in a field before; several spaces as one."""
    found = []
    for address in map(parse_address, texts):
        if address.mailbox not in seen:
            seen.add(address.mailbox)
            found.append((re.sub(" +", " ", address.display_name), address.mailbox))
    return found


def shown(content: bytes, name: str) -> list[tuple[str, str]]:
    """Name and mailbox of each in an address field."""
    # RFC 2047 §6.2: the space between adjacent encoded words is none. The parser forgets that in a display name, and
    # makes one space of several.
    head = content.partition(b"\r\n\r\n")[0].replace(b"?=\r\n =?", b"?==?")
    message = email.message_from_bytes(head, policy=email.policy.SMTP)
    if name not in message:
        return []
    addresses = cast(AddressHeader, message[name]).addresses
    return [(re.sub(" +", " ", a.display_name), parse_address(a.addr_spec).mailbox) for a in addresses]


def canonical(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")


def leaves(part: EmailMessage) -> list[EmailMessage]:
    if part.get_content_maintype() != "multipart":
        return [part]
    return [leaf for inner in cast(Any, part.iter_parts()) for leaf in leaves(inner)]


@settings(
    max_examples=RANDOM_MAILS, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(requests())
def test_any_mail_comes_out_as_it_went_in(wanted: dict[str, Any]) -> None:
    options = decode_options(orjson.loads(orjson.dumps(wanted)).items())
    assert options is not None
    judge_headers(options.headers, DEFAULT_ALLOWED_HEADERS)
    request = SendRequest(", ".join(options.to), wanted["subject"], wanted["html"], wanted["text"], "", "", "", "")
    content = mail(options, request, configuration_set="set-1", message_id_header=options.message_id_header)
    assert content.isascii()
    message = parsed(content)

    seen: set[str] = set()
    assert shown(content, "To") == named(wanted["to"], seen)
    assert shown(content, "Cc") == named([wanted["cc"]] if isinstance(wanted["cc"], str) else wanted["cc"], seen)
    assert "Bcc" not in message
    assert str(message["Subject"]) == wanted["subject"]
    assert str(message["Message-ID"]) == wanted["message_id_header"]
    assert str(message["In-Reply-To"]) == wanted["in_reply_to"]
    assert str(message["References"]).split(" ") == wanted["references"]
    for name in wanted["headers"]:
        # The parser does not tell X-A from x-a, and both may be given.
        assert [str(value) for value in message.get_all(name, [])] == [
            value
            for other, others in wanted["headers"].items()
            if other.lower() == name.lower()
            for value in ([others] if isinstance(others, str) else others)
        ]
    tags = dict(pair.split("=") for pair in str(message["X-SES-MESSAGE-TAGS"]).split(", "))
    assert tags == {"email_id": "id-1", **wanted["tags"]}

    texts = [wanted[field] for field in ("text", "html") if wanted[field]]
    parts = leaves(message)
    assert len(parts) == len(texts) + len(wanted["attachments"])
    inline = [
        f for f in wanted["attachments"] if f["content_id"] and f["disposition"] != "attachment" and wanted["html"]
    ]
    files_in_order = inline + [file for file in wanted["attachments"] if file not in inline]
    for part, text in zip(parts, texts, strict=False):
        assert part.get_payload(decode=True) == canonical(text).encode()
    for part, file in zip(parts[len(texts) :], files_in_order, strict=True):
        check_file(part, file)


def check_file(part: EmailMessage, file: dict[str, Any]) -> None:
    # Not get_filename, which strips spaces.
    assert part["Content-Disposition"].params.get("filename", "") == file["filename"]
    assert part.get_content_type() == file["content_type"].partition(";")[0].lower()
    assert part.get_content_disposition() == (file["disposition"] or ("inline" if file["content_id"] else "attachment"))
    assert str(part["Content-ID"] or "") == file["content_id"]
    given_parameters = email.message_from_string(f"Content-Type: {file['content_type']}\n\n", policy=email.policy.SMTP)[
        "Content-Type"
    ].params
    parameters = dict(part["Content-Type"].params)
    fallback = parameters.pop("name", None)
    assert fallback is None or (fallback.isascii() and fallback != file["filename"])
    assert parameters == dict(given_parameters)
    data = base64.b64decode(file["content"])
    if part.get_content_type() == "message/rfc822":
        (inner,) = cast(Any, part).get_payload()
        assert inner.as_bytes(policy=email.policy.SMTP.clone(max_line_length=0)) == data
    else:
        assert part.get_payload(decode=True) == data


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, orjson
from relay.submission import mime
from relay.submission.options import decode_options
from relay.submission.policy import Policy
from relay.submission.recipients import judge_options
from relay.submission.request import SendRequest
from tests.submission.test_mime import IDS, POLICY

def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = peak_bytes()
with open(sys.argv[1], "rb") as file:
    payload = file.read()
request = SendRequest("user@example.com", "Hello", "<p>Hi \\U0001f600</p>", "Hi", "", "", "", "")
options = decode_options(orjson.loads(payload).items())
decoded = peak_bytes()
options = options._replace(to=("user@example.com",))
sender, recipients = judge_options(request, options, POLICY, 50)
body = mime.prepare_body(request, options, 40_000_000)
content = mime.compose_options(request=request, options=options, sender=sender, recipients=recipients, body=body,
    configuration_set="", limit_bytes=40_000_000, **IDS)
print(len(payload), len(content), before, decoded - before, peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("number", [1, 3])
def test_a_mail_of_25_mb_takes_at_most_4_times_its_size(tmp_path: Path, number: int) -> None:
    # 25 MB on the wire: base64, and the line ends in it.
    raw = os.urandom(25_000_000 * 57 // 78 // number)
    file = {"filename": "a.bin", "content": base64.b64encode(raw).decode()}
    payload = {"to": "user@example.com", "html": "<p>Hi \U0001f600</p>", "text": "Hi", "attachments": [file] * number}
    path = tmp_path / "payload.json"
    path.write_bytes(orjson.dumps(payload))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    payload_bytes, content_bytes, _, _, peak = map(int, done.stdout.split())
    assert content_bytes > 24_900_000
    assert payload_bytes > 24_000_000
    assert peak <= 4 * content_bytes, done.stdout


def test_composing_holds_nothing_but_the_file_and_the_mail() -> None:
    options = Options(to=(REQUEST.to,), attachments=(attachment(os.urandom(10_000_000)),))
    sender, recipients = judge_options(REQUEST, options, POLICY, 50)
    assert sender is not None
    tracemalloc.start()
    try:
        body = mime.prepare_body(REQUEST, options, LIMIT_BYTES)
        content = mime.compose_options(
            request=REQUEST,
            options=options,
            sender=sender,
            recipients=recipients,
            body=body,
            configuration_set="",
            limit_bytes=LIMIT_BYTES,
            **IDS,
        )
        assert tracemalloc.get_traced_memory()[1] < len(content) + 500_000
    finally:
        tracemalloc.stop()


def test_base64_is_let_go_of_once_it_is_decoded() -> None:
    text = base64.b64encode(os.urandom(3_000_000)).decode()
    payload = orjson.dumps({"to": "a@example.com", "attachments": [{"content": text}] * 4})
    tracemalloc.start()
    try:
        members = orjson.loads(payload)
        decoded_bytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        options = decode_options(members.items())
        assert options is not None
        # The file being decoded is the only one that is held twice.
        assert tracemalloc.get_traced_memory()[1] < decoded_bytes + 3_500_000
        assert tracemalloc.get_traced_memory()[0] < 12_500_000
    finally:
        tracemalloc.stop()
