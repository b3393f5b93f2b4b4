"""The demo: starts the development stack on free ports, sends three mails, shows what became of them.

Exits 0 when every step held, 1 otherwise; stops everything in any case. The caller here is a plain
NATS client: what it does is all that a service has to do to send mail.
"""

from __future__ import annotations

import asyncio
import email
import email.policy
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import nats
from rich.console import Console

from relay import contract
from relay.ops.catcher import CaughtMail, caught_mails

GROUP = "demo-newsletter"
RELAYCTL = str(Path(sysconfig.get_path("scripts")) / "relayctl")
LONG_LINE = "<p>" + "A long line, all five thousand characters of it. " * 102 + "</p>"

MAILS: list[dict[str, str]] = [
    {
        "to": "ada@example.com",
        "subject": "Plain words",
        "text": "Hello Ada,\nthis mail is plain ASCII.\n.\nThe dot above stands alone on its line.\n",
        "html": "<p>Hello Ada, this mail is plain ASCII.</p>",
    },
    {
        "to": "grace@example.com",
        "subject": "Grüße aus Zürich 🚀",
        "text": "Schöne Grüße! 🚀\n",
        "html": "<p>Schöne Grüße! 🚀</p>",
        "from_display_name": "Jürgen’s Newsletter",
    },
    {
        "to": "linus@example.com",
        "subject": "One very long line",
        "text": "The HTML part has a line of 5,000 characters.\n",
        "html": LONG_LINE,
    },
]

console = Console(highlight=False, emoji=False, width=min(120, Console().width) if sys.stdout.isatty() else 110)


class StepFailed(Exception):
    """A step of the demo did not hold."""


def expect(what: str, holds: bool) -> None:
    """Shows a step's result; raises ``StepFailed`` when it did not hold."""
    console.print(f"  [green]✓[/] {what}" if holds else f"  [red]✗ {what}[/]")
    if not holds:
        raise StepFailed(what)


def free_ports(count: int) -> list[int]:
    """TCP ports on loopback that nobody listens on right now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def is_open(port: int) -> bool:
    """Whether something listens on the port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def relayctl(environment: dict[str, str], *arguments: str) -> None:
    """Runs relayctl and shows its output; raises ``StepFailed`` when it fails."""
    console.print(f"\n[bold]$ relayctl {' '.join(arguments)}[/]")
    done = subprocess.run([RELAYCTL, *arguments], env=environment, timeout=120, check=False)
    if done.returncode:
        raise StepFailed(f"relayctl {arguments[0]} exited {done.returncode}")


async def converse(nats_url: str, caught: Path) -> None:
    """Sends the mails and asks about them, as a service would."""
    nc = await nats.connect(nats_url)
    try:
        replies = await send_all(nc)
        show_mails(list(caught_mails(caught)), replies)
        await show_records(nc, replies)
        await show_analytics(nc)
    finally:
        await nc.close()


async def ask(nc: nats.NATS, nats_subject: str, request: dict[str, str]) -> Any:
    """One request, one reply."""
    return json.loads((await nc.request(nats_subject, json.dumps(request).encode(), timeout=10)).data)


async def send_all(nc: nats.NATS) -> list[dict[str, str]]:
    """Sends every mail; the replies."""
    console.print(f"\n[bold]Requests on {contract.SEND_EMAIL}, and their replies[/]")
    replies = []
    for mail in MAILS:
        reply = await ask(nc, contract.SEND_EMAIL, {**mail, "group_id": GROUP})
        console.print(f"  {mail['subject']} → {json.dumps(reply)}", soft_wrap=True, markup=False)
        expect("the reply holds an email_id and the group", bool(reply.get("email_id")) and reply["group_id"] == GROUP)
        replies.append(reply)
    return replies


def show_mails(caught: list[CaughtMail], replies: list[dict[str, str]]) -> None:
    """Shows the mails as the SMTP server got them and compares them with what was sent."""
    console.print("\n[bold]The mails as the catcher got them[/]")
    expect("the catcher holds three mails", len(caught) == len(MAILS))
    for mail, reply in zip(MAILS, replies, strict=True):
        got = next(each for each in caught if reply["email_id"].encode() in each.content)
        show_head(got)
        parsed = email.message_from_bytes(got.content, policy=email.policy.default)
        assert isinstance(parsed, EmailMessage)
        expect("recipient and subject arrived as given",
               got.forward_paths == [mail["to"]] and parsed["Subject"] == mail["subject"])  # fmt: skip
        for kind in ("plain", "html"):
            part = parsed.get_body((kind,))
            assert part is not None
            given = mail["text" if kind == "plain" else "html"]
            arrived = part.get_content().replace("\r\n", "\n")
            expect(f"the {kind} part arrived as given", arrived.rstrip("\n") == given.rstrip("\n"))
        longest = max(len(line) for line in got.content.split(b"\r\n"))
        expect(f"no line is longer than 998 octets (the longest has {longest})", longest <= 998)


def show_head(mail: CaughtMail) -> None:
    """Prints the header section and the first lines of the body."""
    header, _, body = mail.content.decode("utf-8").partition("\r\n\r\n")
    console.print(f"\n  [dim]MAIL FROM:<{mail.reverse_path}> RCPT TO:<{', '.join(mail.forward_paths)}>[/]")
    for line in [*header.split("\r\n"), "", *body.split("\r\n")[:6], "…"]:
        console.print(f"  │ {line[:100]}", markup=False, soft_wrap=True)


async def show_records(nc: nats.NATS, replies: list[dict[str, str]]) -> None:
    """Asks for each record, and for the group's."""
    console.print(f"\n[bold]{contract.GET_EMAIL_STATUS}[/]")
    for mail, reply in zip(MAILS, replies, strict=True):
        record = await ask(nc, contract.GET_EMAIL_STATUS, {"email_id": reply["email_id"]})
        console.print(f"  {json.dumps(record, ensure_ascii=False)}", soft_wrap=True, markup=False)
        expect("it is the mail's", record.get("to") == mail["to"] and record.get("subject") == mail["subject"])
    group = await ask(nc, contract.GET_EMAIL_STATUS, {"group_id": GROUP})
    expect("the group has three records", isinstance(group, list) and len(group) == len(MAILS))


async def show_analytics(nc: nats.NATS) -> None:
    """Asks for the group's counts."""
    console.print(f"\n[bold]{contract.GET_EMAIL_ENGAGEMENT_ANALYTICS}[/]")
    counts = await ask(nc, contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, {"group_id": GROUP})
    console.print(f"  {json.dumps(counts)}", soft_wrap=True)
    expect("three were sent", counts.get("total_sent") == len(MAILS))


def main() -> int:
    """Runs the demo; the exit code."""
    state_dir = Path(tempfile.mkdtemp(prefix="relay-demo-"))
    nats_port, smtp_port, http_port = free_ports(3)
    nats_url = f"nats://127.0.0.1:{nats_port}"
    ours = ("RELAY_", "SMTP_", "SES_", "NATS_", "TRACKING_", "DEFAULT_SMTP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
        "NATS_URL": nats_url,
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": str(smtp_port),
        "PORT": str(http_port),
        "EMAIL_ENABLED": "true",
        "RELAY_STATE_DIR": str(state_dir),
    }
    failed = ""
    try:
        relayctl(environment, "start", "--dev")
        asyncio.run(converse(nats_url, state_dir / "caught"))
        relayctl(environment, "status")
    except KeyboardInterrupt:
        failed = "interrupted"
    except Exception as error:  # noqa: BLE001 - whatever a step met, everything is stopped and the step is named
        failed = f"{type(error).__name__}: {error}" if not isinstance(error, StepFailed) else str(error)
    try:
        relayctl(environment, "stop")
    except (StepFailed, subprocess.TimeoutExpired) as error:
        failed = failed or str(error)
    left = [port for port in (nats_port, smtp_port, http_port) if is_open(port)]
    failed = failed or (f"something still listens on {left}" if left else "")
    if failed:
        console.print(f"\n[red]The demo failed: {failed}[/]\nLogs are in {state_dir / 'log'}")
        return 1
    shutil.rmtree(state_dir, ignore_errors=True)
    console.print("\n[green]Every step held.[/] Everything was stopped again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
