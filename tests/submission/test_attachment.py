"""One attachment: what is taken, what is refused, and the fields of its part."""

from __future__ import annotations

import base64
import os
from typing import Any

import pytest

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission.attachment import ObjectRef, ascii_filename, decode_base64, new_attachment, part_fields


def new(**given: Any) -> Any:
    return new_attachment("attachments[3]", {"content": "", **given})


def refusal(**given: Any) -> str:
    with pytest.raises(SubmissionRejected) as caught:
        new(**given)
    assert (caught.value.error, caught.value.field) == (contract.INVALID_REQUEST_PAYLOAD, "attachments")
    assert caught.value.detail.startswith("attachments[3]")
    return caught.value.detail.removeprefix("attachments[3]")


CONTENT_TYPES = [
    ("", "application/octet-stream"),
    ("application/pdf", "application/pdf"),
    (" Application/PDF ", "application/pdf"),
    ("text/plain; charset=UTF-8", "text/plain; charset=UTF-8"),
    ('text/calendar;METHOD="REQUEST" ; charset="utf-8";', "text/calendar; method=REQUEST; charset=utf-8"),
    ('a/b; c="d \\" \\\\ e"', 'a/b; c="d \\" \\\\ e"'),
    ("a/b; c='", "a/b; c=\"'\""),
    ("a/b; name=evil.exe; boundary=x; c*=utf-8''d; e=f", "a/b; e=f"),
    ("application/vnd.openxmlformats-officedocument.wordprocessingml.document", "") ,
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), CONTENT_TYPES)
def test_a_content_type(given: str, expected: str) -> None:
    assert new(content_type=given).content_type == (expected or given)


BAD_CONTENT_TYPES = [
    *(
        "pdf",
        "application/",
        "/pdf",
        "a b/c",
        "a/b c",
        "a/b\r\nBcc: x@example.com",
        "a/b; c",
        "a/b; c=d e",
        'a/b; c="d',
    ),
    *('a/b; c="\n"', "a/b; c=é", "é/b", "a/b; c=1; C=2", "a/b; c==?utf-8?q?d?=", "multipart/mixed; boundary=x"),
    *("message/partial", "Message/External-Body; access-type=URL", "a/" + "b" * 260, "a/b;;c=d"),
]


@pytest.mark.parametrize("given", BAD_CONTENT_TYPES)
def test_a_content_type_that_is_none(given: str) -> None:
    assert refusal(content_type=given).startswith(".content_type must ") or "has" in refusal(content_type=given)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"filename": 1}, ".filename must be a string"),
    ({"filename": "a\r\nb"}, ".filename has a control character"),
    ({"filename": "é" * 128}, ".filename is longer than 255 bytes in UTF-8"),
    ({"content_type": ["a/b"]}, ".content_type must be a string"),
    ({"content_id": "a b"}, ".content_id must be"),
    ({"content_id": "<>"}, ".content_id must be"),
    ({"content_id": "<a>b>"}, ".content_id must be"),
    ({"content_id": "a" * 251}, ".content_id must be"),
    ({"content_id": "a\r\n"}, ".content_id must be"),
    ({"content_id": "=?utf-8?q?a?="}, ".content_id must be"),
    ({"disposition": "form-data"}, ".disposition must be 'attachment' or 'inline'"),
    ({"disposition": 1}, ".disposition must be a string"),
    ({"content": None}, " must have either content (base64) or object"),
    ({"content": "", "object": ObjectRef("a", "b")}, " must have either content (base64) or object"),
    ({"content": ["YQ=="]}, ".content must be a string in base64"),
]


@pytest.mark.parametrize(("given", "said"), BAD)
def test_what_is_wrong_is_said(given: dict[str, Any], said: str) -> None:
    assert refusal(**given).startswith(said)


@pytest.mark.parametrize("text", ["YQ", "YQ=", "Y", "YQ==YQ==", "Y Q==", "Y_-_", "YQ==\0", "é", "=YQ=", "Y\u2028Q=="])
def test_what_is_no_base64(text: str) -> None:
    assert refusal(content=text).startswith(".content is not base64 (RFC 4648 §4: '+' and '/', with padding)")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 56, 57, 58, 10_000])
def test_base64_with_and_without_lines(size: int) -> None:
    data = os.urandom(size)
    assert decode_base64("x", base64.b64encode(data).decode()) == data
    assert decode_base64("x", base64.encodebytes(data).decode()) == data
    assert decode_base64("x", base64.encodebytes(data).decode().replace("\n", "\r\n")) == data


def test_what_is_shown_inline() -> None:
    assert new().disposition == "attachment"
    assert new(content_id="<logo@example.com>")[3:5] == ("logo@example.com", "inline")
    assert new(content_id="logo", disposition="Attachment").disposition == "attachment"
    assert new(disposition="inline").disposition == "inline"


def test_an_object_stands_for_its_content() -> None:
    waiting = new(content=None, object=ObjectRef("a", "b"))
    assert (waiting.content, waiting.object) == (b"", ObjectRef("a", "b"))
    assert waiting.fetched(b"x")[2:] == (b"x", "", "attachment", None)


FILENAMES = [
    # the name, its parameter, the name for those who cannot read that
    ("a.pdf", '; filename="a.pdf"', ""),
    ("my report (2).pdf", '; filename="my report (2).pdf"', ""),
    ("", "", ""),
    ("Grüße.pdf", ";\r\n filename*=utf-8''Gr%C3%BC%C3%9Fe.pdf", "Gru_e.pdf"),
    ("日本.pdf", ";\r\n filename*=utf-8''%E6%97%A5%E6%9C%AC.pdf", "__.pdf"),
    ('a"b\\c.pdf', ";\r\n filename*=utf-8''a%22b%5Cc.pdf", "a_b_c.pdf"),
    ("a  b", ";\r\n filename*=utf-8''a%20%20b", "a b"),
    (" a", ";\r\n filename*=utf-8''%20a", "a"),
    ("=?utf-8?q?a?=", ";\r\n filename*=utf-8''%3D%3Futf-8%3Fq%3Fa%3F%3D", "__utf-8_q_a__"),
    (" ", ";\r\n filename*=utf-8''%20", "_"),
    ("\u0301", ";\r\n filename*=utf-8''%CC%81", "_"),
    ("a;b", '; filename="a;b"', ""),
]


@pytest.mark.parametrize(("filename", "parameter", "fallback"), FILENAMES)
def test_a_file_name_in_its_part(filename: str, parameter: str, fallback: str) -> None:
    attachment = new(filename=filename, content_type="a/b; c=d", content_id="logo")
    name = f';\r\n name="{fallback}"' if fallback else ""
    assert part_fields(attachment, "base64") == (
        f"Content-Type: a/b; c=d{name}\r\n"
        "Content-Transfer-Encoding: base64\r\n"
        f"Content-Disposition: inline{parameter}\r\n"
        "Content-ID: <logo>\r\n"
    )


def test_the_longest_values_fit_their_lines() -> None:
    long = "a/b; c=" + '"' + "\\\\" * 123 + '"'
    attachment = new(filename="\u0301" * 127, content_type=long[:254] + '"', content_id="a" * 250)
    lines = part_fields(attachment, "base64").split("\r\n")
    assert max(map(len, lines)) <= 998
    assert part_fields(attachment, "base64").isascii()


def test_an_ascii_name() -> None:
    assert ascii_filename("Ångström – ½ ﬁx.txt") == "Angstrom _ 1_2 fix.txt"
