"""The reference part of ``docs/cli.md``, made from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click


def reference(group: click.Group) -> str:
    """Every command with its help, arguments and options, as Markdown."""
    parts = ["Before the command:", "", "| Option | Meaning | Default |", "|---|---|---|"]
    parts += [_row(option) for option in group.params if isinstance(option, click.Option)]
    parts.append("")
    for name, command in _commands(group):
        usage = " ".join(command.collect_usage_pieces(click.Context(command)))
        about, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
        parts += [f"### relayctl {name}", "", about.strip(), "", f"```sh\n{example.strip()}\n```", ""]
        parts += [f"Usage: `relayctl {name} {usage}`", "", "| Option | Meaning | Default |", "|---|---|---|"]
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        parts += [_row(option) for option in options]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command, those of a group of commands under its name and theirs."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    default = "required" if option.required else ""
    if option.show_default and option.default is not None:
        default = f"`{option.default}`"
    return f"| {names} | {option.help} | {default} |"
