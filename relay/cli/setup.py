"""``relayctl check``, ``settings`` and ``completion``: before it runs."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class
from rich.table import Table
from rich.text import Text

from relay.cli.settings_text import effective, markdown_table
from relay.cli.terminal import (
    LEVEL_STYLES,
    console,
    current_settings,
    json_option,
    leave,
    plain,
    print_json,
    settings_of_the_running_relay,
)
from relay.errors import EXIT_FAILED, EXIT_OK
from relay.ops.preflight import Finding, findings


@click.command()
@json_option
def check(as_json_: bool) -> None:
    """Asks NATS, JetStream, the smarthost and this host whether a relay could run; says what to do where not.

    Exits 1 when it could not. What it could run without is a warning. What this shell does not set is asked as the
    relay has it that runs in the state directory. Makes the buckets and the log when they are missing, as the first
    worker would.
    `relayctl doctor` asks more, changes nothing, and looks at a running relay too.

    Example: relayctl check
    """
    found: list[Finding] = []
    for finding in findings(settings_of_the_running_relay()):
        found.append(finding)
        if not as_json_:
            console().print(_line(finding))
    if as_json_:
        print_json([finding._asdict() for finding in found])
    leave(EXIT_FAILED if any(finding.level == "failed" for finding in found) else EXIT_OK)


@click.command()
@json_option
@click.option("--markdown", is_flag=True, help="Print every setting, its default and its meaning as Markdown.")
def settings(as_json_: bool, markdown: bool) -> None:
    """Shows every setting's value as it is for this shell, and where it comes from; secrets are masked.

    Example: relayctl settings
    """
    if markdown:
        click.echo(markdown_table(), nl=False)
        return
    rows = effective(current_settings())
    if as_json_:
        print_json([{"name": name, "value": value, "source": source} for name, value, source in rows])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("SETTING", "VALUE", "FROM"):
        table.add_column(heading, overflow="fold")
    for name, value, source in rows:
        table.add_row(name, Text(value), Text(source, style="dim" if source == "default" else "green"))
    console().print(table)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Prints the script that completes relayctl's commands and options in SHELL.

    Example: relayctl completion bash > /etc/bash_completion.d/relayctl
    """
    from relay.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "relayctl", "_RELAYCTL_COMPLETE").source())


def _line(finding: Finding) -> Text:
    told = f"{finding.detail}; {finding.remedy}" if finding.remedy else finding.detail
    mark = (f"{finding.level:<8}", LEVEL_STYLES[finding.level])
    return Text.assemble(mark, (f"{finding.what:<15} ", "bold"), plain(told))
