"""``relayctl doctor``: finds the common faults and says what to do."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from relay.cli.running_relay import log_findings, not_running, pids_of, running_relay
from relay.cli.status_view import Snapshot, take_snapshot
from relay.cli.terminal import (
    LEVEL_STYLES,
    console,
    current_settings,
    current_supervision,
    json_option,
    leave,
    plain,
    print_json,
    settings_of_the_running_relay,
)
from relay.errors import EXIT_FAILED, EXIT_OK, RelayError
from relay.ops.arrangement import read_arrangement
from relay.ops.doctor.examination import Chapter, examine
from relay.ops.doctor.finding import Finding, failed, warning
from relay.ops.orders import read_settings
from relay.ops.supervision import Supervision, SupervisionError
from relay.settings import Settings, adopt, load_settings

LEVELS = list(LEVEL_STYLES)
WIDTH = 80
INDENT = 10


@click.command()
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Leave out what is well.")
@click.option(
    "--environment", is_flag=True, help="Ask with this environment's settings, before a `reload`, not with the relay's."
)
def doctor(as_json_: bool, quiet: bool, environment: bool) -> None:
    """Finds what is wrong with this relay, or with what it depends on, and says what to do.

    Asks everything that `relayctl check` asks and more, and looks at the programs and logs of the relay in the state
    directory, where one runs: with the settings that it was started with, whatever this environment says. Changes
    nothing, sends no mail, shows no secret; takes 20 s at most. Exits 1 when something failed; a warning is no failure.

    Example: relayctl doctor
    """
    chapters = []
    for chapter in _examination(is_from_here=environment):
        chapters.append(chapter)
        if not as_json_:
            _show(chapter, quiet)
    found = [finding for chapter in chapters for finding in chapter.findings]
    if as_json_:
        print_json(_as_json(chapters))
    else:
        _say_how_it_is(found)
    leave(EXIT_FAILED if any(finding.level == "failed" for finding in found) else EXIT_OK)


def _examination(*, is_from_here: bool) -> Iterator[Chapter]:
    supervision = current_supervision()
    try:
        settings = settings_of_the_running_relay()
    except SupervisionError:  # it hangs, as the first chapter will say
        settings = current_settings()
    snapshot, first = _look_at(supervision)
    if snapshot is not None and not is_from_here:
        try:
            settings = _as_the_workers_have_them(supervision)
        except (RelayError, OSError) as error:
            detail = f"those of the relay cannot be read: {error}"
            first.append(warning("settings", detail, "`relayctl reload` gives the workers this environment's"))
    if snapshot is not None:
        first += running_relay(snapshot, settings)
    if (supervision.state_dir / "log").is_dir():
        first += log_findings(supervision)
    yield Chapter("Relay", first)
    pids = {} if snapshot is None else pids_of(snapshot)
    yield from examine(settings, {pid: name for name, pid in pids.items()}, pids)


def _as_the_workers_have_them(supervision: Supervision) -> Settings:
    """The settings that the relay was given, which a shell at night does not have. Raises ``RelayError``, ``OSError``.

    From here on this process has them in place of its environment's, as the workers do.
    """
    arrangement = read_arrangement(supervision.state_dir)
    kept = next((Path(program.settings) for program in arrangement.programs.values() if program.settings), None)
    if kept is None:
        return settings_of_the_running_relay()
    values = read_settings(kept)
    os.chdir(arrangement.directory)  # what paths in settings mean is seen from there
    adopt(values)
    return load_settings().model_copy(update={"relay_state_dir": supervision.state_dir})


def _look_at(supervision: Supervision) -> tuple[Snapshot | None, list[Finding]]:
    try:
        return take_snapshot(supervision), []
    except SupervisionError as error:
        why = str(error)
    try:
        if not supervision.is_running():
            return None, [*not_running(supervision)]
    except SupervisionError as error:  # it hangs
        why = str(error)
    detail, _, remedy = why.rpartition("; ")
    return None, [failed("relay", detail, remedy)]


def _as_json(chapters: list[Chapter]) -> dict[str, Any]:
    found = [finding for chapter in chapters for finding in chapter.findings]
    return {
        **{level: sum(finding.level == level for finding in found) for level in LEVELS},
        "findings": [
            {
                "about": chapter.title,
                "what": finding.what,
                "level": finding.level,
                "detail": finding.detail,
                "remedy": finding.remedy,
            }
            for chapter in chapters
            for finding in chapter.findings
        ],
    }


def _show(chapter: Chapter, is_quiet: bool) -> None:
    """A heading, what is wrong with its remedy, then what is well."""
    shown = [finding for finding in chapter.findings if not (is_quiet and finding.ok)]
    if not shown:
        return
    out = console()
    width = out.width if out.is_terminal else WIDTH
    out.print(Text(chapter.title, style="bold"))
    for finding in sorted(shown, key=lambda each: LEVELS.index(each.level)):
        mark = Text(f"  {finding.level:<{INDENT - 2}}", style=LEVEL_STYLES[finding.level])
        if finding.ok:
            lines = _wrapped(f"{finding.what}: {finding.detail}", width)
            lines[0].stylize("bold", 0, len(finding.what))
        else:
            lines = [Text(finding.what, style="bold"), *_wrapped(finding.detail, width)]
        for line in lines:
            out.print(Text.assemble(mark, line), soft_wrap=True)
            mark = Text(" " * INDENT)
        arrow = Text(f"{'→ ':>{INDENT}}", style="bold")
        for line in _wrapped(finding.remedy, width):
            out.print(Text.assemble(arrow, line), soft_wrap=True)
            arrow = mark
    out.print()


def _wrapped(text: str, width: int) -> list[Text]:
    """In lines that fit beside the marks; a word that is longer, such as a path or a command, stays whole."""
    lines = textwrap.wrap(plain(text), max(30, width - INDENT), break_long_words=False, break_on_hyphens=False)
    return list(map(Text, lines))


def _say_how_it_is(found: list[Finding]) -> None:
    failures = sum(finding.level == "failed" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    if not failures and not warnings:
        click.echo(f"All is well ({len(found)} answers).")
        return
    parts = [_counted(failures, "problem"), _counted(warnings, "warning")]
    click.echo(", ".join(part for part in parts if part) + ".")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}" if count else ""
