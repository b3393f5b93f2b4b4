"""The examples of docs/contract.md, made by a started relay.

``<!-- asks: send_email -->`` above a JSON block: it is sent to that subject, and the next JSON block is the reply.
``<!-- told: Delivery Open -->``: Amazon SES tells this of the first mail. What differs from run to run (ids, times,
cursors) is replaced by samples, which requests may name.

``python -m tests.docs.contract_examples`` writes the page's replies anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.engagement import Engagement, EngagementConfig
from tests.docs.markdown import DOCS
from tests.support.caller import ask
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import RelayProcess
from tests.support.ses_events import enveloped, notification, ses_event

PAGE = DOCS / "contract.md"
SUBJECT_PREFIX = "lfx.email-service."
GROUP = "invite-batch-abc123"
FIRST = "EMAIL-1"

_EXAMPLE = re.compile(
    r"(?P<told><!-- told: (?P<events>[\w ]+) -->\n)?"
    r"<!-- asks: (?P<subject>\w+)(?P<silent> of the relay that sends nothing)? -->\n"
    r"```json\n(?P<request>.*?)```\n\n```json\n(?P<reply>.*?)```\n",
    re.S,
)
_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_VARIABLE: list[tuple[str, Callable[[int], str]]] = [
    (_ID, lambda n: str(uuid.UUID(hashlib.md5(b"id %d" % n).hexdigest(), version=4))),
    (r"(?<=<)[0-9a-f]{32}(?=@)", lambda n: hashlib.md5(b"message %d" % n).hexdigest()),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z", lambda n: f"2026-01-15T10:30:{n:02d}.120Z"),
    (r'(?<="cursor": ")[\w-]+', lambda n: f"AgAAAGV4YW1wbGUgY3Vyc29y{n}"),
]


class SmarthostOfExamples:
    """Takes every mail, but for those to the recipients that the page tells of."""

    def __init__(self) -> None:
        self.port = free_port()
        self._taken = 0
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port)

    async def handle_RCPT(self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _: Any) -> str:
        """aiosmtpd's hook."""
        if address.startswith("nobody@"):
            return "550 5.1.1 No such user here"
        if address.startswith("greylisted@"):
            return "451 4.7.1 Greylisted, please try again later"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        """aiosmtpd's hook."""
        if envelope.rcpt_tos[0].startswith("slow@"):
            await asyncio.sleep(5)
        self._taken += 1
        return f"250 2.0.0 Ok: queued as {self._taken:06d}"

    def __enter__(self) -> SmarthostOfExamples:
        self._controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()


class Samples:
    """What stands on the page in the place of ids, times and cursors, each the same wherever it comes again."""

    def __init__(self) -> None:
        self._by_real: dict[str, str] = {}
        self._numbers = [0] * len(_VARIABLE)

    def shown(self, text: str) -> str:
        """With samples in the place of what is real."""
        for kind, (pattern, sample) in enumerate(_VARIABLE):
            for real in re.findall(pattern, text):
                if real not in self._by_real and real not in self._by_real.values():
                    self._numbers[kind] += 1
                    self._by_real[real] = sample(self._numbers[kind])
        for real, sample_ in self._by_real.items():
            text = text.replace(real, sample_)
        return text

    def real(self, text: str) -> str:
        """The other way round."""
        for real, sample in self._by_real.items():
            text = text.replace(sample, real)
        return text


@contextmanager
def relays() -> Iterator[tuple[RelayProcess, RelayProcess]]:
    """One that sends, and one that does not, each with a NATS server of its own."""
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    made: list[RelayProcess] = []
    servers: list[NatsServer] = []
    with SmarthostOfExamples() as smarthost:
        try:
            for name, settings in (("a", {}), ("b", {"EMAIL_ENABLED": "false"})):
                server = NatsServer(directory / f"nats-{name}").start()
                servers.append(server)
                relay = RelayProcess(directory / name, server.url, smarthost.port, RELAY_SEND_WORKERS="1", **settings)
                made.append(relay)
                relay.start()
            yield made[0], made[1]
        finally:
            for relay in made:
                relay.stop()
            for server in servers:
                server.stop()
            shutil.rmtree(directory, ignore_errors=True)


def tell(nats_url: str, email_id: str, kinds: list[str]) -> None:
    """Folds events into the record, as the engagement worker does."""
    bus = Bus(nats_url, "examples")
    bus.start()
    try:
        assert bus.wait_connected(5), bus.last_error
        engagement = Engagement(JetStream(bus), EngagementConfig(60.0))
        engagement.prepare()
        for number, kind in enumerate(kinds):
            event = ses_event(kind, email_id, group_id=GROUP, at=time.time() + number + 1)
            engagement.handle([notification(enveloped(event, str(uuid.uuid4())))], 5.0)
            time.sleep(0.002)  # no two are folded in one millisecond: equal times would be one sample
    finally:
        bus.close()


def remade(page: str) -> str:
    """The page with the replies that a relay gives now."""
    samples = Samples()
    with relays() as (sending, silent):
        first = ""
        begun = 0
        parts = []
        for found in _EXAMPLE.finditer(page):
            if found["events"]:
                tell(sending.nats_url, first, found["events"].split())
            relay = silent if found["silent"] else sending
            asked = json.loads(samples.real(found["request"]).replace(FIRST, first or FIRST))
            reply = ask(relay.nats_url, SUBJECT_PREFIX + found["subject"], asked)
            if not first:
                first = reply["email_id"]
            parts.append(page[begun : found.start("request")])
            parts.append(samples.shown(found["request"].replace(FIRST, first)))
            parts.append(page[found.end("request") : found.start("reply")])
            parts.append(samples.shown(_written(reply)))
            begun = found.end("reply")
    return "".join([*parts, page[begun:]])


def _written(reply: Any) -> str:
    """JSON for reading: what is short stays on one line."""
    text = json.dumps(reply, ensure_ascii=False, indent=2)
    text = re.sub(r"\{\s+([^{}\[\]]{,150}?)\s+\}", lambda found: "{" + re.sub(r"\n\s+", " ", found[1]) + "}", text)
    return text + "\n"


if __name__ == "__main__":
    PAGE.write_text(remade(PAGE.read_text()))
