"""Every code block of the README and of docs/ is run, parsed, or says why it is not run; none is anything else.

What a page's console sessions show is written anew, where it differs, by
``python -m tests.docs.test_code_blocks docs/getting-started.md``.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import click
import pytest

from relay.cli.main import cli
from tests.conftest import require
from tests.docs.code_blocks import (
    PARSED,
    ROOT,
    RUN,
    RUNNABLE,
    SKETCHES,
    Block,
    Shell,
    blocks_of,
    comparable,
    is_as_shown,
    pages,
    parse,
    play,
)
from tests.support.nats_server import BINARY

ELSEWHERE = {
    ("README.md", "python"): "tests/client/test_docs_examples.py",
    ("docs/client.md", "python"): "tests/client/test_docs_examples.py",
    ("docs/client.md", "sh"): "tests/client/test_docs_examples.py",
    ("docs/events.md", "sh"): "tests/docs/test_events_examples.py",
    ("docs/log.md", "python"): "tests/docs/test_log_examples.py",
    ("docs/log.md", "sh"): "tests/docs/test_log_examples.py",
}
"""Blocks that a test of their page runs, with servers that suit them."""

COMMAND_REFERENCE = "docs/cli.md"
"""Its blocks are single command lines, made from the commands' help: they are understood, not run."""

BLOCKS = [block for page in pages() for block in blocks_of(page)]
SESSIONS = {
    page: [
        block
        for block in BLOCKS
        if block.page == page
        and block.language in RUN
        and not block.not_run
        and (page, block.language) not in ELSEWHERE
        and page != COMMAND_REFERENCE
    ]
    for page in dict.fromkeys(block.page for block in BLOCKS)
}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def is_like_code(block: Block) -> bool:
    """Whether a block without a language is something that a reader would type, or put into a file."""
    words = "|".join((RUNNABLE - {".", "for", "if", "set", "test", "then", "true"}) | {"docker", "make", "sudo"})
    return re.search(rf"^(\$ |[A-Z_]+=\S|({words}) \S)| --?[a-z][\w-]+ |\\$", block.code, re.M) is not None


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_it_is_run_or_parsed_or_says_why_not(block: Block) -> None:
    assert block.language in RUN | PARSED | SKETCHES or block.not_run, (
        f"{block}: nothing is known of the language {block.language!r}; write <!-- not run: why --> above it"
    )
    if block.language in SKETCHES:
        assert not is_like_code(block), f"{block}: it has commands; say sh or console"
    if block.language == "python":
        compile(block.code, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if block.language in PARSED and not block.not_run:
        if block.language == "nats":
            require(BINARY.exists(), "nats-server")
        parse(block)


@pytest.mark.parametrize("block", [each for page in SESSIONS.values() for each in page], ids=str)
def test_it_needs_no_more_than_there_is(block: Block) -> None:
    for words in block.command_lines():
        assert words[0] in RUNNABLE, f"{block}: {words[0]} is not run here; write <!-- not run: why --> above it"
    if block.language == "console":
        assert block.commands(), f"{block}: a console session begins with '$ '"


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if any(words[0] in {"relayctl", "make"} for words in block.command_lines())],
    ids=str,
)
def test_what_relayctl_and_make_are_told_is_understood(block: Block) -> None:
    """Also where it is not run: the command exists, and takes these options."""
    for words in block.command_lines():
        if words[0] == "make":
            assert {word for word in words[1:2] if "=" not in word} <= TARGETS, f"{block}: {words}"
        elif words[0] == "relayctl":
            understand(words[1:])


def understand(words: list[str]) -> None:
    """Raises what click says of a command line, which is not invoked."""
    words = words[: next((at for at, word in enumerate(words) if word.startswith((">", "2>", "<"))), len(words))]
    group: click.Group = cli
    with click.Context(group, info_name="relayctl") as context:
        while True:
            try:
                made = group.make_context("relayctl", list(words), parent=context)
            except click.exceptions.Exit:
                return  # --help, --version
            name, command, words = group.resolve_command(made, [*made._protected_args, *made.args])
            assert command is not None
            if not isinstance(command, click.Group):
                break
            group = command
        try:
            command.make_context(name or "", list(words), parent=context)
        except click.exceptions.Exit:
            return


@pytest.mark.parametrize(("page", "language"), ELSEWHERE)
def test_the_other_tests_read_these_blocks(page: str, language: str) -> None:
    source = (ROOT / ELSEWHERE[page, language]).read_text()
    assert f'"{Path(page).name}"' in source or f'"../{page}"' in source
    assert f'"{language}"' in source
    assert any(block.page == page and block.language == language for block in BLOCKS)


@pytest.mark.parametrize("page", [page for page, blocks in SESSIONS.items() if blocks])
def test_the_page_does_what_it_shows(page: str) -> None:
    require(BINARY.exists(), "nats-server")
    with Shell() as shell:
        for block in SESSIONS[page]:
            for command, shown, printed in play(shell, block):
                if block.language == "console":
                    assert is_as_shown(comparable(shown), comparable(printed)), (
                        f"{block}: {command!r} printed\n{printed}\nand the page shows\n{shown}"
                    )


# -- writing what is shown --------------------------------------------------------------------------------------------
def rewritten(page: str) -> str:
    """The page with what its commands print now, all of it, where any of that is not what it shows."""
    text = (ROOT / page).read_text()
    is_as_it_was = True
    played: list[tuple[Block, str]] = []
    with Shell() as shell:
        for block in SESSIONS[page]:
            now = ""
            for command, shown, printed in play(shell, block):
                is_same = is_as_shown(comparable(shown), comparable(printed))
                is_as_it_was = is_as_it_was and (is_same or block.language != "console")
                is_abridged = is_same and "…\n" in shown
                now += "$ " + command.replace("\n", "\n> ") + "\n" + (shown if is_abridged else _as_shown(printed))
            played.append((block, now))
    for block, now in played:
        if block.language == "console" and not is_as_it_was:
            text = text.replace(f"```console\n{block.code}```", f"```console\n{now}```", 1)
    return text


def _as_shown(printed: str) -> str:
    lines = [line.rstrip() for line in printed.rstrip().splitlines() if not line.startswith("waiting: ")]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        (ROOT / name).write_text(rewritten(name))
