"""Addresses: from what a caller wrote to a mailbox that may stand in MAIL and RCPT.

Owns the syntax. What is accepted is what Go's ``net/mail.ParseAddress`` accepts, since callers are used to it:
RFC 5322 §3.4 with comments, quoted names, encoded words (RFC 2047) and a group of one, and UTF-8 wherever RFC
6532 allows it. On top of that comes what RFC 5321 needs on the wire: a domain in A-labels (RFC 5891, mapped by
UTS 46), the lengths of §4.5.3.1, no control character anywhere, and no encoded word in the mailbox. Which domains
are welcome is left to ``policy``, SMTPUTF8 to delivery.

The texts of ``AddressInvalid`` never repeat the address: they end up in logs.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from functools import lru_cache
from typing import Final, NamedTuple

import idna

from relay.errors import AddressInvalid

LOCAL_PART_LIMIT_BYTES: Final = 64
DOMAIN_LIMIT_BYTES: Final = 253
LABEL_LIMIT_BYTES: Final = 63
PATH_LIMIT_BYTES: Final = 254  # RFC 5321 §4.5.3.1.3: 256 with the angle brackets
TEXT_LIMIT_CHARACTERS: Final = 10_000  # name and comments included: a payload full of '(' must not cost half a second

# No possessive quantifiers: CPython before 3.11.5 matches `(?:...)*+` wrongly. None is needed, no two parts overlap.
_ATEXT: Final = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
# The address of nearly every mail: a local part of at most 64 octets with nothing of an encoded word in it.
_PLAIN: Final = re.compile(
    rf"(?=[^@]{{1,64}}@)(?![^@]*=\?)"
    rf"([{_ATEXT}]+(?:\.[{_ATEXT}]+)*)@((?:[A-Za-z0-9_-]{{1,63}}\.)*[A-Za-z0-9_-]{{1,63}})"
)
_SPACE: Final = re.compile(r"[ \t]*")
_ATOM: Final = re.compile(rf"[{_ATEXT}.\x80-\U0010ffff]+")
_DOT_ATOM: Final = re.compile(rf"[{_ATEXT}\x80-\U0010ffff]+(?:\.[{_ATEXT}\x80-\U0010ffff]+)*")
_QUOTED_STRING: Final = re.compile(r'"((?:[^\x00-\x08\x0a-\x1f\x7f"\\]|\\[^\x00-\x08\x0a-\x1f\x7f])*)"')
_QUOTED_PAIR: Final = re.compile(r"\\(.)")
_DOMAIN_LITERAL: Final = re.compile(r"\[([^\x00-\x20\x7f\[\]\\]*)\]")
_COMMENT_MARK: Final = re.compile(r"[()\\]")
_ENCODED_WORD: Final = re.compile(r"=\?([^?]+)\?([bBqQ])\?([^?]*)\?=")
_Q_TEXT: Final = re.compile(r"(?:[ -<>-~]|=[0-9A-Fa-f]{2})*")
# C0, DEL and C1 controls, the two separators that some software takes for a line end, and halves of surrogate pairs.
_NEVER_IN_LOCAL_PART: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ASCII_DOMAIN: Final = re.compile(rf"[{_ATEXT}.]+")


class Address(NamedTuple):
    """A mailbox and the name that stood with it."""

    display_name: str
    """Decoded and unquoted; '' when there was none. May hold anything: it is for headers, which clean it."""
    local_part: str
    """As it goes on the wire: quoted where needed; UTF-8 stays."""
    domain: str
    """Lower-case A-labels, or an address literal in RFC 5321 form; two equal domains are equal strings."""

    @property
    def mailbox(self) -> str:
        """``local@domain``, for MAIL, RCPT and header fields."""
        return f"{self.local_part}@{self.domain}"


def parse_address(text: str) -> Address:
    """The single address in ``text``: ``local@domain`` or ``Name <local@domain>``.

    Raises ``AddressInvalid`` with one sentence.
    """
    if len(text) <= PATH_LIMIT_BYTES and (plain := _PLAIN.fullmatch(text)):
        local_part, domain = plain.groups()
        return Address("", local_part, domain.lower())
    if len(text) > TEXT_LIMIT_CHARACTERS:
        raise AddressInvalid(f"the address and its name are longer than {TEXT_LIMIT_CHARACTERS} characters")
    addresses = _Parser(text).addresses()
    if len(addresses) != 1:
        raise AddressInvalid("a group must hold exactly one address")
    return addresses[0]


def normalised_domain(text: str) -> str:
    """A host name as lower-case A-labels, so that equal domains compare equal.

    Raises ``AddressInvalid`` for empty or overlong labels, for what IDNA refuses, and for characters no domain has.
    """
    if len(text) > DOMAIN_LIMIT_BYTES:
        raise AddressInvalid(f"the domain is longer than {DOMAIN_LIMIT_BYTES} octets")
    domain = text.lower() if text.isascii() else _a_labels(text)
    if not _ASCII_DOMAIN.fullmatch(domain):
        raise AddressInvalid("the domain is empty or has a character that no domain has")
    if len(domain) > DOMAIN_LIMIT_BYTES:
        raise AddressInvalid(f"the domain is longer than {DOMAIN_LIMIT_BYTES} octets")
    for label in domain.split("."):
        if not label:
            raise AddressInvalid("the domain has an empty label")
        if len(label) > LABEL_LIMIT_BYTES:
            raise AddressInvalid(f"a label of the domain is longer than {LABEL_LIMIT_BYTES} octets")
    return domain


@lru_cache(maxsize=1024)
def _a_labels(domain: str) -> str:
    try:
        return idna.encode(domain, uts46=True).decode("ascii")
    except UnicodeError as error:  # what idna raises for everything it refuses
        raise AddressInvalid("the domain is not a valid internationalised domain name") from error


def _address_literal(text: str) -> str:
    try:
        if "%" in text:  # a zone: Python takes it, Go and RFC 5321 do not
            raise ValueError("zone")
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise AddressInvalid("the domain literal is not an IP address") from error
    return f"[{text}]" if address.version == 4 else f"[IPv6:{text.lower()}]"


def _mailbox(display_name: str, local_content: str, domain: str) -> Address:
    """Checks what only the wire forbids, and quotes the local part again where needed."""
    if _NEVER_IN_LOCAL_PART.search(local_content):
        raise AddressInvalid("the local part has a control character")
    # RFC 2047 §5 allows none there, but some who read header fields decode it, to a line end or an '@' of its own.
    if _ENCODED_WORD.search(f"{local_content}@{domain}"):
        raise AddressInvalid("the address has an encoded word in it")
    if _DOT_ATOM.fullmatch(local_content):
        local_part = local_content
    else:
        local_part = '"' + local_content.replace("\\", "\\\\").replace('"', '\\"') + '"'
    local_part_bytes = len(local_part.encode())
    if local_part_bytes > LOCAL_PART_LIMIT_BYTES:
        raise AddressInvalid(f"the local part is longer than {LOCAL_PART_LIMIT_BYTES} octets")
    if local_part_bytes + 1 + len(domain) > PATH_LIMIT_BYTES:
        raise AddressInvalid(f"the address is longer than {PATH_LIMIT_BYTES} octets")
    return Address(display_name, local_part, domain)


class _UnknownCharset(AddressInvalid):
    """An encoded word in a character set other than UTF-8, ISO 8859-1 and US-ASCII."""


def _decoded_word(word: str) -> str | None:
    """The text of an encoded word (RFC 2047); None when ``word`` is not one and stands for itself."""
    match = _ENCODED_WORD.fullmatch(word)
    if match is None:
        return None
    charset, encoding, encoded = match.groups()
    try:
        raw = _decoded_q(encoded) if encoding in "qQ" else base64.b64decode(encoded, validate=True)
    except ValueError:
        return None
    match charset.lower():
        case "utf-8":
            return raw.decode("utf-8", "replace")
        case "iso-8859-1":
            return raw.decode("latin-1")
        case "us-ascii":
            return raw.decode("ascii", "replace")
    raise _UnknownCharset("the display name is in an unknown character set")


def _decoded_q(encoded: str) -> bytes:
    if not _Q_TEXT.fullmatch(encoded):
        raise ValueError("not Q encoding")
    head, *rest = encoded.replace("_", " ").split("=")
    return b"".join([head.encode(), *(bytes.fromhex(part[:2]) + part[2:].encode() for part in rest)])


class _Parser:
    """The slow path: net/mail's grammar over one text. Each method starts at ``at`` and moves it past what it took."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def addresses(self) -> list[Address]:
        """The address, or the members of the group, that the whole text is."""
        found = self.address(group_allowed=True)
        self.skip_comments()
        if self.at < len(self.text):
            raise AddressInvalid("there is something after the address; exactly one address is expected")
        return found

    def address(self, group_allowed: bool) -> list[Address]:
        self.skip_space()
        if self.at == len(self.text):
            raise AddressInvalid("there is no address")
        start = self.at
        try:
            local_content, domain = self.addr_spec()
        except AddressInvalid as error:
            self.at = start
            not_an_addr_spec = error
        else:
            self.skip_space()
            return [_mailbox(self.name_in_comment() if self.peek() == "(" else "", local_content, domain)]

        display_name = "" if self.peek() == "<" else self.phrase(not_an_addr_spec)
        self.skip_space()
        if group_allowed and self.take(":"):
            return self.group()
        if not self.take("<"):
            raise not_an_addr_spec
        local_content, domain = self.addr_spec()
        if not self.take(">"):
            raise AddressInvalid("the '<' before the address is not closed right after it")
        return [_mailbox(display_name, local_content, domain)]

    def group(self) -> list[Address]:
        members: list[Address] = []
        self.skip_space()
        if self.take(";"):
            return members
        while True:
            members += self.address(group_allowed=False)
            self.skip_comments()
            if self.take(";"):
                return members
            if not self.take(","):
                raise AddressInvalid("the group is not closed by ';'")

    def addr_spec(self) -> tuple[str, str]:
        """The local part without quotes, and the domain as it goes on the wire."""
        self.skip_space()
        local_content = self.quoted_string() if self.peek() == '"' else self.dot_atom("local part")
        if not local_content:
            raise AddressInvalid("the local part is empty")
        if not self.take("@"):
            raise AddressInvalid("an address must be 'local@domain' or 'Name <local@domain>'")
        self.skip_space()
        if self.peek() != "[":
            return local_content, normalised_domain(self.dot_atom("domain"))
        literal = _DOMAIN_LITERAL.match(self.text, self.at)
        if literal is None:
            raise AddressInvalid("the domain literal is not closed, or has a character that it must not have")
        self.at = literal.end()
        return local_content, _address_literal(literal[1])

    def phrase(self, not_an_addr_spec: AddressInvalid) -> str:
        """A display name. As in net/mail, what cannot be read after its first word only ends it."""
        words: list[str] = []
        encoded_run = ""  # adjacent encoded words are joined without the space between them
        while True:
            if words:
                self.skip_comments()
            self.skip_space()
            try:
                if self.at == len(self.text):
                    break
                if self.peek() == '"':
                    word, decoded = self.quoted_string(), None
                else:
                    word = self.atom()
                    decoded = _decoded_word(word)
            except AddressInvalid as error:
                if words or encoded_run:
                    break
                raise (error if isinstance(error, _UnknownCharset) else not_an_addr_spec) from None
            if decoded is not None:
                encoded_run += decoded
                continue
            if encoded_run:
                words.append(encoded_run)
                encoded_run = ""
            words.append(word)
        if encoded_run:
            words.append(encoded_run)
        return " ".join(words)

    def quoted_string(self) -> str:
        match = _QUOTED_STRING.match(self.text, self.at)
        if match is None:
            raise AddressInvalid("a quoted string is not closed, or has a control character")
        self.at = match.end()
        return _QUOTED_PAIR.sub(r"\1", match[1]) if "\\" in match[1] else match[1]

    def atom(self) -> str:
        match = _ATOM.match(self.text, self.at)
        if match is None:
            raise AddressInvalid("a word is missing, or starts with a character that it must not have")
        self.at = match.end()
        return match[0]

    def dot_atom(self, part: str) -> str:
        match = _ATOM.match(self.text, self.at)
        if match is None:
            raise AddressInvalid(f"the {part} is missing, or starts with a character that it must not have")
        if not _DOT_ATOM.fullmatch(match[0]):
            raise AddressInvalid(f"the {part} has a dot at its start, at its end or next to another")
        self.at = match.end()
        return match[0]

    def name_in_comment(self) -> str:
        words = re.split(r"[ \t]+", self.comment())
        decoded = (_decoded_word(word) for word in words if word)
        return " ".join(word if text is None else text for word, text in zip(filter(None, words), decoded, strict=True))

    def skip_comments(self) -> None:
        self.skip_space()
        while self.peek() == "(":
            self.comment()
            self.skip_space()

    def comment(self) -> str:
        """What stands between '(' and its ')', nested comments included."""
        parts: list[str] = []
        self.at += 1
        depth = 1
        while mark := _COMMENT_MARK.search(self.text, self.at):
            parts.append(self.text[self.at : mark.start()])
            self.at = mark.end()
            if mark[0] == "\\":
                parts.append(self.text[self.at : self.at + 1])
                self.at += 1
                continue
            depth += 1 if mark[0] == "(" else -1
            if not depth:
                return "".join(parts)
            parts.append(mark[0])
        raise AddressInvalid("a comment is not closed")

    def skip_space(self) -> None:
        if match := _SPACE.match(self.text, self.at):
            self.at = match.end()

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> bool:
        if self.peek() != character:
            return False
        self.at += 1
        return True
