"""Header and command injection: whatever stands in a request, the smarthost sees one mail, to whom it was meant.

10,000 requests with hostile text in every field take the whole way: decoding, policy, composing, SMTP over TCP,
tracking. What counts is what the server saw. The requests come from a seeded generator, so that every run has the same.
"""

from __future__ import annotations

import email
import email.policy
import email.utils
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from email.message import EmailMessage
from typing import Any, Final, NamedTuple

import gevent
import pytest
from gevent.pool import Pool

from relay import contract
from relay.bus.jetstream import JetStream
from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.smarthost import Smarthost
from relay.sending import Sending
from relay.submission.policy import Policy
from relay.tracking.storage import StorageConfig
from relay.tracking.tracker import Tracker
from tests.support.scripted_smtp import ReceivedMail, ScriptedSmtp
from tests.support.sending import ask, extras_for

REQUESTS: Final = 10_000
SENDING_SECONDS: Final = 20.0
SEED: Final = "an injection"
DEFAULT_SENDER: Final = "noreply@example.org"

# -- hostile text ------------------------------------------------------------------------------------------------------

LINE_ENDS = ["\r", "\n", "\r\n", "\n\r", "\r\n ", "\r\n\t", "\r\n\r\n", "\n\n", "\r\r", " \r\n", "\x0b", "\x0c", "\x85"]
# U+010A, U+010D and U+560A, U+560D lose all but the octets of CR and LF where somebody cuts characters to bytes.
ODD_CHARACTERS = ["\0", "\x01", "\x08", "\x1b[31m", "\x1f", "\x7f", "\x9f", "\u2028", "\u2029", "\u010a", "\u010d"]
ODD_CHARACTERS += ["\u560a", "\u560d", "\u200b", "\u202e", "\u2066", "\ufeff", "\xad", "\xa0", "\u3000", "\ufffd"]
ODD_CHARACTERS += ["\ud800", "\udfff", "\ud83d", "\udc00\ud800", "\U0010ffff", "é", "e\u0301", "東京", "🙂", "\u0661"]
LOOKALIKES = ["\uff20", "\uff0e", "\u3002", "\uff1c", "\uff1e", "\uff1a", "\uff0d", "\uff08", "\uff09", "\u2024"]
ENCODED = [
    "=0D=0A",
    "=0d=0aBcc: evil@attacker.test",
    "%0d%0a",
    "&#13;&#10;",
    "\\r\\n",
    "\\u000d\\u000a",
    "=\r\n",
    "=20",
]
ENCODED += ["=?", "?=", "=?utf-8?q?", "=?utf-8?q?a", "=?utf-8?q??=", "=?utf-8?q?=0D=0ABcc:_evil=40attacker.test?="]
ENCODED += ["=?utf-8?b?DQpCY2M6IGV2aWxAYXR0YWNrZXIudGVzdA0K?=", "=?iso-8859-1?q?=0A=0D=00?=", "=?us-ascii?q?=0A?="]
ENCODED += ["=?utf-8?q?=22?=", "=?utf-8?q?=3Cevil=40attacker.test=3E?=", "=?utf-8?q?=E2=80=A8?=", "=?utf-7?q?+AAo-?="]
ENCODED += ["=?utf-8?q?=2C?=", "=?utf-8?b?" + "QUFB" * 30 + "?=", "=?UTF-8?Q?a?==?UTF-8?Q?b?="]
FIELDS = ["Bcc: evil@attacker.test", "To: evil@attacker.test", "From: evil@attacker.test", "Subject: evil"]
FIELDS += [
    "X-SES-CONFIGURATION-SET: evil",
    "X-SES-SOURCE-ARN: evil",
    "X-LFX-TRACKING-ID: evil/evil",
    "MIME-Version: 1.0",
]
FIELDS += [
    "Content-Type: text/html",
    "Content-Transfer-Encoding: binary",
    "DKIM-Signature: v=1",
    "--=_",
    "--",
    "From me",
]
COMMANDS = [
    "MAIL FROM:<evil@attacker.test>",
    "RCPT TO:<victim@example.com>",
    "DATA",
    "RSET",
    "QUIT",
    ".",
    "..",
    "BDAT 9",
]
COMMANDS += ["> SIZE=1", "> BODY=8BITMIME", "> NOTIFY=NEVER", "> SMTPUTF8", "> ORCPT=rfc822;evil@attacker.test"]
ADDRESSES = ['"', "'", "\\", '\\"', '""', "<", ">", "<>", "<<", ">>", "<evil@attacker.test>", "evil@attacker.test", "@"]
ADDRESSES += [
    ", evil@attacker.test",
    ",",
    "; evil@attacker.test",
    ":",
    ";",
    "a:",
    "a: evil@attacker.test;",
    "a:;",
    "@@",
]
ADDRESSES += ["(", ")", "()", "(a)", "(<evil@attacker.test>)", "((a)b)", ") evil@attacker.test (", "(\\)", '("', '")']
ADDRESSES += ["<@attacker.test:", "@attacker.test,@b.test:", "a%attacker.test", "attacker.test!a", "a@attacker.test>"]
ADDRESSES += [
    "[127.0.0.1]",
    "[IPv6:::1]",
    "[",
    "]",
    "[\r\n]",
    ".",
    "..",
    " ",
    "\t",
    "  ",
    "+",
    "/",
    "|",
    "`",
    "$(a)",
    "-",
]
ADDRESSES += ["xn--", "xn--a", "xn--bcher-kva.test", "bücher.test", "\\\r\n", '"\r\n', '" <evil@attacker.test> "']
LONG = ["A" * 70, "A" * 255, "A" * 997, "A" * 998, "A" * 999, "A" * 3000, "é" * 500, " " * 1000, "A " * 600, "🙂" * 300]
LONG += ['"' * 300, "(" * 300, "\\" * 301, "x@" * 200, "<" * 200, "." * 1000, "=?utf-8?q?a?= " * 100, "\r\n" * 300]
HARMLESS = ["Ada", "Lovelace", "Ada Lovelace", "Grüße", "Hello", "a.b", "1"]
FRAGMENTS = [LINE_ENDS, ODD_CHARACTERS, LOOKALIKES, ENCODED, FIELDS, COMMANDS, ADDRESSES, HARMLESS]


def hostile(chance: random.Random) -> str:
    """A few fragments in a row, now and then a long one."""
    if chance.random() < 0.05:
        return chance.choice(LONG) + chance.choice(chance.choice(FRAGMENTS))
    pieces = [chance.choice(chance.choice(FRAGMENTS)) for _ in range(chance.randint(1, 4))]
    if chance.random() < 0.2:  # the classic one
        pieces[1:1] = [chance.choice(LINE_ENDS), chance.choice(FIELDS + COMMANDS), chance.choice(LINE_ENDS)]
    return "".join(pieces)


def address(chance: random.Random, mailbox: str) -> tuple[str, bool]:
    """Hostile text around ``mailbox``, or in it; and whether it can only mean ``mailbox``, if anything."""
    local_part, domain = mailbox.split("@")
    text = hostile(chance)
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    name = re.sub(r"[^ \w]", "", text)
    forms = [
        (mailbox, True),
        (f"<{mailbox}>", True),
        (f"{text} <{mailbox}>", True),
        (f'"{quoted}" <{mailbox}>', True),
        (f"{name} =?utf-8?q?=0D=0A{name}?= <{mailbox}>", True),
        (f"{name} ({name}) <{mailbox}>", True),
        (f"{mailbox} ({text})", True),
        (f"<{mailbox}> ({text})", True),
        (f"Ada ({text}) <{mailbox}>", True),
        (f"friends: {mailbox} ({text});", True),
        (f"({text}) {mailbox}", True),
        (f"{name}: {mailbox};", True),
        (f"{text}: {mailbox};", True),
        (f"{mailbox}{text}", False),
        (f"{text}{mailbox}", False),
        (f"{chance.choice(ENCODED)}{mailbox}", False),
        (f"{local_part}{text}@{domain}", False),
        (f'"{local_part}{quoted}"@{domain}', False),
        (f"{local_part}@{text}.{domain}", False),
        (f"{local_part}@{domain}.{text}", False),
    ]
    return chance.choice(forms)


class Attempt(NamedTuple):
    """A request, and what may become of it."""

    fields: dict[str, str]
    payload: bytes
    forward_path: str
    """Where it goes if it goes anywhere; '' where only the syntax says."""
    reverse_path: str

    @property
    def hostile_fields(self) -> set[str]:
        """The fields that are given and not what an ordinary caller would give."""
        plain = re.compile(r"(?:user|sender|reply)\d+@example\.(?:com|org)")
        return {name for name, value in self.fields.items() if value not in HARMLESS and not plain.fullmatch(value)}


def attempt(number: int) -> Attempt:
    """Request ``number``: always the same."""
    chance = random.Random(f"{SEED} {number}")
    recipient, sender = f"user{number}@example.com", f"sender{number}@example.org"
    to, is_recipient_certain = address(chance, recipient) if chance.random() < 0.5 else (recipient, True)
    fields = {"to": to, "subject": hostile(chance), "text": hostile(chance), "html": hostile(chance)}
    reverse_path = DEFAULT_SENDER
    if chance.random() < 0.25:
        fields["from"], is_sender_certain = address(chance, sender)
        reverse_path = sender if is_sender_certain else ""
    if chance.random() < 0.25:
        fields["reply_to"], _ = address(chance, f"reply{number}@example.org")
    if chance.random() < 0.6:
        fields["from_display_name"] = hostile(chance)
    if chance.random() < 0.6:
        fields["group_id"] = hostile(chance)
    if chance.random() < 0.1:
        fields[chance.choice(["Resent-Bcc", "x-bcc", "envelope", "raw", "sender", hostile(chance)])] = hostile(chance)
    if chance.random() < 0.1:
        # Not escaped: halves of surrogate pairs become octets that are no UTF-8.
        payload = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
    else:
        payload = json.dumps(fields).encode()
    # Halves of surrogate pairs, and octets that are no UTF-8, are read as U+FFFD, one each.
    read = json.loads(payload.decode("utf-8", "surrogateescape"))
    fields = {name: re.sub("[\ud800-\udfff]", "\ufffd", value) for name, value in read.items()}
    return Attempt(fields, payload, recipient if is_recipient_certain else "", reverse_path)


# -- what the server may see -------------------------------------------------------------------------------------------

_ATEXT: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-\xa0-\u2027\u202a-\ud7ff\ue000-\U0010ffff]"
_QTEXT: Final = r"(?:[ !#-\[\]-~\xa0-\u2027\u202a-\ud7ff\ue000-\U0010ffff]|\\[ -~])"
_DOMAIN: Final = r"(?:[A-Za-z0-9_!#$%&'*+/=?^`{|}~\-]+(?:\.[A-Za-z0-9_!#$%&'*+/=?^`{|}~\-]+)*|\[[0-9A-Za-z.:]+\])"
MAILBOX: Final = rf'(?:{_ATEXT}+(?:\.{_ATEXT}+)*|"{_QTEXT}*")@{_DOMAIN}'
COMMAND: Final = re.compile(
    rf"EHLO relay\.example\.org|MAIL FROM:<{MAILBOX}>(?: SIZE=\d+)?(?: BODY=8BITMIME)?(?: SMTPUTF8)?"
    rf"|RCPT TO:<{MAILBOX}>|DATA|RSET|QUIT"
)
FIELD_LINE: Final = re.compile(rb"([A-Za-z][A-Za-z-]*): [^\r\n]*")
FOLDED_LINE: Final = re.compile(rb"[ \t]+[^ \t\r\n][^\r\n]*")
STRAY_LINE_END: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n")
CONTROL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
LINE_LIMIT_BYTES: Final = 998


class SeenMail(NamedTuple):
    """A mail as the server took it, with the commands that brought it."""

    mail: ReceivedMail
    commands: tuple[str, ...]


def seen_mails(server: ScriptedSmtp) -> Iterator[SeenMail]:
    """Every mail that the server took. Fails for a command that has no business there."""
    for number, commands in enumerate(server.connections):
        for command in commands:
            assert COMMAND.fullmatch(command), command
        rest = [command for command in commands if not command.startswith(("EHLO", "QUIT"))]
        mails = [mail for mail in server.mails if mail.connection == number]
        assert [command.split(":")[0] for command in rest] == ["MAIL FROM", "RCPT TO", "DATA"] * len(mails)
        for index, mail in enumerate(mails):
            yield SeenMail(mail, tuple(rest[3 * index : 3 * index + 3]))


def expect_envelope(seen: SeenMail, made: Attempt) -> None:
    """One recipient, the one that was meant; and the sender that was."""
    assert len(seen.mail.forward_paths) == 1
    if made.forward_path:
        assert seen.mail.forward_paths == (made.forward_path,)
    if made.reverse_path:
        assert seen.mail.reverse_path == made.reverse_path
    assert seen.mail.reverse_path.endswith("@example.org")


def expect_header(content: bytes, is_smtputf8: bool, made: Attempt) -> None:
    """The fields that a mail has, each once, for somebody who just looks at the lines."""
    section, _, _ = content.partition(b"\r\n\r\n")
    names = []
    for line in section.split(b"\r\n"):
        if line[:1] in (b" ", b"\t"):
            assert FOLDED_LINE.fullmatch(line), "a line of blanks is the end of the header for some"
            continue
        field = FIELD_LINE.fullmatch(line)
        assert field, line
        names.append(field[1].decode())
    assert names == field_names(made)
    assert is_smtputf8 or section.isascii()
    assert not re.search("[\x80-\x9f\u2028\u2029]", section.decode())


def field_names(made: Attempt) -> list[str]:
    """The names of the fields, in order."""
    reply_to = ["Reply-To"] if made.fields.get("reply_to") else []
    return [
        "From",
        "To",
        *reply_to,
        "Subject",
        "Date",
        "Message-ID",
        contract.TRACKING_HEADER,
        "MIME-Version",
        "Content-Type",
    ]


def expect_lines(content: bytes) -> None:
    """Lines that every server takes."""
    assert not STRAY_LINE_END.search(content)
    assert content.endswith(b"\r\n")
    assert max(map(len, content.split(b"\r\n"))) <= LINE_LIMIT_BYTES
    section, _, body = content.partition(b"\r\n\r\n")
    assert not CONTROL.search(section)
    assert b"\0" not in body
    assert body.isascii()


def expect_message(content: bytes, made: Attempt) -> None:
    """The same fields for Python's parser, one address where there is to be one, and the bodies as they were."""
    message = email.message_from_bytes(content, policy=email.policy.default)
    assert message.keys() == field_names(made)
    assert not message.defects
    assert domains(message, "From") <= {"example.org"}
    if made.fields.get("reply_to"):
        assert all(f".{domain}".endswith(".example.org") for domain in domains(message, "Reply-To"))
    if made.forward_path:
        assert domains(message, "To") == {"example.com"}
    assert not re.search(r"[\r\n\0]", message["Subject"])
    parts = list(message.iter_parts())
    assert [part.get_content_type() for part in parts] == ["text/plain", "text/html"]
    for part, name in zip(parts, ("text", "html"), strict=True):
        assert part.get_payload(decode=True) == as_sent(made.fields[name])


def domains(message: EmailMessage, name: str) -> set[str]:
    """The domains of all the addresses that Python finds in a field, in lower case."""
    try:
        found = [address.domain for address in message[name].addresses]
    except AttributeError:
        # CPython 3.11 breaks over a display name of nothing but dots; its older parser does not.
        values = [str(value) for key, value in message.raw_items() if key == name]
        found = [address.rpartition("@")[2] for _, address in email.utils.getaddresses(values)]
    assert len(found) == 1
    # None where an encoded quotation mark in the local part, which Python decodes, hides it.
    return {domain.lower() for domain in found if domain}


def as_sent(text: str) -> bytes:
    """A body as it should arrive: CRLF for every line end."""
    return re.sub("\r\n|\r|\n", "\r\n", text).encode()


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[("PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 0"), ()], ids=["all extensions", "no extension"])
def smtp(request: pytest.FixtureRequest) -> Iterator[ScriptedSmtp]:
    """An SMTP server that takes everything."""
    with ScriptedSmtp(extensions=request.param) as server:
        yield server


@pytest.fixture
def tracker(jetstream: JetStream) -> Tracker:
    """Writes records and facts to a real server."""
    tracker = Tracker(jetstream, StorageConfig(), 1.0, on_change=lambda _: None)
    tracker.start()
    return tracker


@pytest.fixture
def sending(smtp: ScriptedSmtp, tracker: Tracker) -> Iterator[Sending]:
    """The job with all its real parts."""
    config = SmarthostConfig(
        (Host("127.0.0.1", smtp.port),), tls="off", helo_name="relay.example.org", pool_size=10, max_messages=REQUESTS
    )
    smarthost = Smarthost(config, default_sender=DEFAULT_SENDER)
    policy = Policy(
        email_enabled=True,
        default_from=DEFAULT_SENDER,
        default_from_display_name="Relay",
        allowed_from_domains=("example.org",),
        allowed_reply_to_domains=("example.org",),
        allowed_recipient_domains=(),
    )
    yield Sending(
        policy=policy,
        smarthost=smarthost,
        tracker=tracker,
        configuration_set="",
        extras=extras_for(tracker._jetstream, 10),
    )
    smarthost.close(time.monotonic() + 1)


def test_nothing_gets_through(
    smtp: ScriptedSmtp, sending: Sending, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "relay.sending")  # A warning for each that is not relayed.
    relayed: dict[str, Attempt] = {}
    ended: Counter[str] = Counter()

    def send(number: int) -> None:
        made = attempt(number)
        reply: dict[str, Any] = ask(sending, made.payload, 10)
        ended[reply.get("outcome", "relayed")] += 1
        if "error" not in reply:
            relayed[reply["email_id"]] = made

    # The odd ones to one server, the even ones to the other.
    numbers = range(1 if smtp.extensions else 0, REQUESTS, 2)
    with gevent.Timeout(SENDING_SECONDS, AssertionError("not finished in time")):
        callers = Pool(50)
        for number in numbers:
            callers.spawn(send, number)
        callers.join(raise_error=True)
    hostile_fields = Counter(field for made in relayed.values() for field in made.hostile_fields)
    shares = {field: hostile_fields[field] for field in contract.SEND_EMAIL_FIELDS}
    print(f"{dict(ended)}, {len(smtp.connections)} connections; relayed with hostile text in {shares}")

    # Hostile is not wrong: most of it is a mail like any other. None is left in the air, and each has its record.
    assert set(ended) <= {"relayed", "refused", "failed"}
    assert ended["relayed"] >= len(numbers) / 2
    assert ended["refused"] >= 100
    assert min(shares.values()) >= 100
    assert len(smtp.mails) == len(relayed) == ended["relayed"]
    assert (tracker.tracked, tracker.lost) == (ended["relayed"], 0)
    for seen in seen_mails(smtp):
        content = seen.mail.content
        section, _, _ = content.partition(b"\r\n\r\n")
        (tracking_id,) = re.findall(rb"^X-LFX-TRACKING-ID: ([^\r\n]*)\r$", section, re.MULTILINE)
        made = relayed.pop(tracking_id.decode().rpartition("/")[2])
        expect_envelope(seen, made)
        expect_lines(content)
        expect_header(content, seen.commands[0].endswith(" SMTPUTF8"), made)
        expect_message(content, made)
    assert not relayed, "these mails were said to be relayed"
