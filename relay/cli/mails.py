"""``relayctl send``, ``track``, ``analytics`` and ``inbox``: mails, and what became of them."""

from __future__ import annotations

import base64
import email
import email.policy
import mimetypes
import sys
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import click
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from relay import contract
from relay.cli.request import ask, escaped_html, text_or_file
from relay.cli.terminal import console, current_settings, fail, json_option, nats_config, plain, print_json
from relay.errors import EXIT_FAILED, RelayError
from relay.ops.catcher import CaughtMail, caught_mails

QUESTION_SECONDS = 10.0
BAR_WIDTH = 40


@click.command()
@click.option("--to", multiple=True, required=True, help="Recipient's address; may be repeated.")
@click.option("--cc", multiple=True, help="Address of one who gets a copy, seen by all; may be repeated.")
@click.option("--bcc", multiple=True, help="Address of one who gets a copy, seen by nobody; may be repeated.")
@click.option("--subject", required=True, help="Subject line.")
@click.option("--text", required=True, help="Plain-text body; @FILE reads it from a file.")
@click.option("--html", default="", help="HTML body; @FILE reads it from a file. Default: the text, escaped.")
@click.option("--attach", "files", metavar="FILE", multiple=True, help="File to attach; may be repeated.")
@click.option(
    "--header",
    "headers",
    metavar="'NAME: VALUE'",
    multiple=True,
    callback=lambda _context, _parameter, lines: _headers(lines),
    help="Header field of your own, of those that SMTP_ALLOWED_HEADERS lets through; may be repeated.",
)
@click.option("--from", "from_", default="", help="Sender's address; its domain must be allowed.")
@click.option("--from-display-name", default="", help="Sender's name.")
@click.option("--reply-to", default="", help="Reply-To address; its domain must be allowed.")
@click.option("--group", "group_id", default="", help="Group id, for analytics.")
@click.option(
    "--request-id", default="", help="Send it once under this id; the same command again shows the same reply."
)
@click.option("--timeout", default=95.0, show_default=True, help="Seconds to wait for the reply.")
@json_option
def send(
    timeout: float,
    as_json_: bool,
    text: str,
    html: str,
    to: tuple[str, ...],
    cc: tuple[str, ...],
    bcc: tuple[str, ...],
    files: tuple[str, ...],
    headers: dict[str, list[str]],
    **fields: str,
) -> None:
    """Sends one mail through NATS, as any caller would, and shows the reply.

    Exits 1 when the reply is an error. Without a reply in time the mail may have been sent all the same; with
    --request-id the same command may be given again without the risk of a second copy. Files go along in the request
    itself, so they may be as large as one message of NATS (max_payload, 1 MiB) lets them in base64.

    Example: relayctl send --to user@example.com --subject Hello --text 'It works.' --attach report.pdf
    """
    body = text_or_file(text)
    request: dict[str, Any] = {"text": body, "html": text_or_file(html) if html else escaped_html(body)}
    request |= {name.rstrip("_"): value for name, value in fields.items() if value}
    request["to"] = to[0] if len(to) == 1 else to  # one is the contract's own field, a string
    request |= {name: value for name, value in (("cc", cc), ("bcc", bcc), ("headers", headers)) if value}
    if files:
        request["attachments"] = [_attachment(file) for file in files]
    reply = _ask(contract.SEND_EMAIL, request, timeout)
    if as_json_:
        print_json(reply)
    else:
        _show_fields(reply)
    if reply.get("email_id") == "":
        click.echo("nothing was sent: EMAIL_ENABLED is false, or SMTP_ALLOWED_RECIPIENT_DOMAINS filters it", err=True)
    _exit_on_error(reply)


def _headers(lines: tuple[str, ...]) -> dict[str, list[str]]:
    """As the request has them: by name, each with its values."""
    headers: dict[str, list[str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or not value.strip():
            raise click.BadParameter(f"{line!r} is not 'NAME: VALUE'")
        headers.setdefault(name.strip(), []).append(value.strip())
    return headers


def _attachment(file: str) -> dict[str, str]:
    path = Path(file)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise click.ClickException(f"cannot read {file}: {error.strerror}") from error
    content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return {"filename": path.name, "content_type": content_type, "content": base64.b64encode(content).decode()}


@click.command()
@click.argument("email_id", required=False)
@click.option("--group", "group_id", default="", help="Show every mail of this group instead.")
@json_option
def track(email_id: str | None, group_id: str, as_json_: bool) -> None:
    """Shows what became of the mail EMAIL_ID, or of every mail of a group.

    Exits 1 when it is not found.

    Example: relayctl track 550e8400-e29b-41d4-a716-446655440000
    """
    if bool(email_id) == bool(group_id):
        raise click.UsageError("give either EMAIL_ID or --group")
    question = {"email_id": email_id} if email_id else {"group_id": group_id}
    answer = _ask(contract.GET_EMAIL_STATUS, question, QUESTION_SECONDS)
    if as_json_:
        print_json(answer)
    elif isinstance(answer, list):
        console().print(_records_table(answer))
    elif "error" in answer:
        click.echo(f"relayctl: mail {plain(email_id)}: {answer['error']}", err=True)
    else:
        _show_record(answer)
    _exit_on_error(answer)


@click.command()
@click.argument("group_id", metavar="GROUP")
@json_option
def analytics(group_id: str, as_json_: bool) -> None:
    """Shows a GROUP's funnel: sent, delivered, opened, failed.

    Exits 1 when it is not found.

    Example: relayctl analytics invite-batch-abc123
    """
    counts = _ask(contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, {"group_id": group_id}, QUESTION_SECONDS)
    if as_json_:
        print_json(counts)
    elif "error" in counts:
        click.echo(f"relayctl: group {plain(group_id)}: {counts['error']}", err=True)
    else:
        console().print(_funnel(counts))
    _exit_on_error(counts)


@click.command()
@click.argument("number", required=False, type=int)
@click.option("--raw", is_flag=True, help="Print the mail byte for byte.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False), help="Save the HTML part to this file.")
@json_option
def inbox(number: int | None, raw: bool, html_file: str | None, as_json_: bool) -> None:
    """Lists what the development stack has caught, or shows the mail NUMBER.

    Example: relayctl inbox 1 --raw
    """
    directory = current_settings().relay_state_dir / "caught"
    mails = list(caught_mails(directory))
    if number is None:
        if raw or html_file:
            raise click.UsageError("say which mail: relayctl inbox NUMBER")
        _list_mails(mails, as_json_)
        return
    mail = next((each for each in mails if each.number == number), None)
    if mail is None:
        raise click.ClickException(f"there is no mail {number} in {directory}; `relayctl inbox` lists what there is")
    if raw:
        sys.stdout.buffer.write(mail.content)
        return
    parsed = email.message_from_bytes(mail.content, policy=email.policy.default)
    assert isinstance(parsed, EmailMessage)
    if html_file:
        _save_html(_part(parsed, "html"), html_file)
    elif as_json_:
        print_json(_mail_fields(mail) | {"text": _part(parsed, "plain"), "html": _part(parsed, "html")})
    else:
        _show_mail(mail, parsed)


def _save_html(html: str, path: str) -> None:
    if not html:
        raise click.ClickException("that mail has no HTML part")
    try:
        Path(path).write_text(html, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"saved to {path}")


def _ask(nats_subject: str, request: dict[str, Any], timeout_seconds: float) -> Any:
    try:
        return ask(nats_config(current_settings()), nats_subject, request, timeout_seconds)
    except RelayError as error:
        fail(error)


def _exit_on_error(answer: Any) -> None:
    if isinstance(answer, dict) and "error" in answer:
        sys.exit(EXIT_FAILED)


def _show_fields(fields: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in fields.items():
        shown = _recipients(value) if name == "recipients" and isinstance(value, list) else plain(value)
        table.add_row(Text(name, style="bold"), Text(shown, style="red" if name == "error" else ""))
    console().print(table)


def _recipients(recipients: list[Any]) -> str:
    """A line each: address, outcome, and what the smarthost said in figures."""
    names = ("address", "outcome", "reply_code", "enhanced_code")
    lines = [[str(each.get(name) or "") for name in names] for each in recipients if isinstance(each, dict)]
    return "\n".join(" ".join(filter(None, map(plain, line))) for line in lines)


def _show_record(record: dict[str, Any]) -> None:
    """The mail's own data, then what happened, in order of time."""
    names = ("email_id", "group_id", "to", "subject", "remote_id", "caller", "recipients")
    _show_fields({name: record[name] for name in names if name in record})
    happened = [(record.get("sent_at", ""), "in doubt" if record.get("outcome") == "in_doubt" else "relayed")]
    happened += [(record[f"{what}_at"], what) for what in ("delivered", "failed") if record.get(f"{what}_at")]
    happened += [(each.get("opened_at", ""), "opened") for each in record.get("opened_at_list") or []]
    table = Table.grid(padding=(0, 2))
    for at, what in sorted(happened):
        table.add_row(Text(at, style="dim"), Text(what, style="red" if what == "failed" else "green"))
    console().print(Text(), table)


def _records_table(records: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("EMAIL ID", "TO", "SENT", "DELIVERED", "OPENED", "FAILED", "SUBJECT"):
        table.add_column(heading, no_wrap=heading != "SUBJECT")
    for record in records:
        opened = int(record.get("open_count") or 0)
        cells = [record.get("email_id"), record.get("to"), record.get("sent_at"), _yes(record.get("delivered"))]
        cells += [str(opened or ""), _yes(record.get("failed")), record.get("subject")]
        table.add_row(*(Text(plain(cell or "")) for cell in cells))
    return table


def _yes(value: object) -> str:
    return "yes" if value else ""


def _funnel(counts: dict[str, Any]) -> Table:
    total = int(counts.get("total_sent", 0))
    table = Table(
        box=None,
        pad_edge=False,
        show_header=False,
        title=Text(plain(f"group {counts['group_id'][:80]}")),
        title_justify="left",
    )
    steps = (("total_sent", "sent", "blue"), ("delivered", "delivered", "green"), ("unique_opened", "opened", "cyan"),
             ("failed", "failed", "red"))  # fmt: skip
    for field, word, colour in steps:
        count = int(counts.get(field, 0))
        share = count / total if total else 0.0
        bar = Text("█" * round(share * BAR_WIDTH), style=colour) + Text(
            "░" * (BAR_WIDTH - round(share * BAR_WIDTH)), style="dim"
        )
        table.add_row(Text(word, style="bold"), f"{count:,}", f"{share:.1%}", bar)
    table.add_row(Text("opens", style="bold"), f"{int(counts.get('opened', 0)):,}", "", Text("in all", style="dim"))
    return table


def _mail_fields(mail: CaughtMail) -> dict[str, Any]:
    parsed = email.message_from_bytes(mail.content, policy=email.policy.default)
    return {
        "number": mail.number,
        "caught_at": datetime.fromtimestamp(mail.caught_at, UTC).isoformat(timespec="seconds"),
        "reverse_path": mail.reverse_path,
        "forward_paths": mail.forward_paths,
        "subject": str(parsed["Subject"]),
        "size_bytes": len(mail.content),
    }


def _list_mails(mails: list[CaughtMail], as_json_: bool) -> None:
    rows = [_mail_fields(mail) for mail in mails]
    if as_json_:
        print_json(rows)
        return
    if not rows:
        click.echo("nothing has been caught yet")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NO", "CAUGHT", "TO", "BYTES", "SUBJECT"):
        table.add_column(heading)
    for row in rows:
        to = ", ".join(row["forward_paths"])
        cells = (row["number"], row["caught_at"], to, row["size_bytes"], row["subject"])
        table.add_row(*(Text(plain(cell)) for cell in cells))
    console().print(table)


def _part(parsed: EmailMessage, kind: str) -> str:
    part = parsed.get_body((kind,))
    return str(part.get_content()).replace("\r\n", "\n") if part is not None else ""


def _show_mail(mail: CaughtMail, parsed: EmailMessage) -> None:
    _show_fields({"envelope": f"{mail.reverse_path} → {', '.join(mail.forward_paths)}"} | dict(parsed.items()))
    console().print(Panel(Text(plain(_part(parsed, "plain").rstrip())), title="text", title_align="left"))
    html = _part(parsed, "html")
    if html:
        click.echo(
            f"there is an HTML part of {len(html.encode())} bytes: relayctl inbox {mail.number} --html FILE saves it"
        )
