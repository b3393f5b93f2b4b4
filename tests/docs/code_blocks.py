"""The fenced code of the README and of docs/: found, told apart, and run as it stands there.

Owns how a block is found and what is done with it by its language. Markdown is parsed by markdown-it-py, commands are
run by a bash of their own, so nothing of either is done here.

========================== ==========================================================================================
language                   what is done
========================== ==========================================================================================
``console``                each ``$ command`` is run; what it prints must be what stands there (``comparable``), a
                           line that is only ``…`` stands for any lines. The exit code must be 0 unless ``$ echo $?``
                           comes next.
``sh``                     run as one; every command must exit 0
``python``                 run
``json`` ``yaml`` ``toml`` parsed
``ini`` ``nats`` ``go``
``promql``
none, ``text``             a drawing or a sketch: must not look like something to run
========================== ==========================================================================================

All blocks of a page that are run share one shell and one directory, in their order. An HTML comment right before a
block says what the reader need not see: ``<!-- before: relayctl start --dev -->`` is run first, and with
``<!-- not run: why -->`` the block is not run at all.
"""

from __future__ import annotations

import configparser
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import yaml
from markdown_it import MarkdownIt

from tests.support.nats_server import BINARY, free_port
from tests.support.promtool import promtool
from tests.support.relay_process import clean_environment

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
COMMAND_SECONDS = 120.0

RUN = frozenset({"console", "sh", "python"})
PARSED = frozenset({"json", "yaml", "toml", "ini", "nats", "go", "promql"})
SKETCHES = frozenset({"", "text"})

RUNNABLE = frozenset(
    {".", "cat", "cd", "cp", "curl", "diff", "do", "done", "echo", "else", "env", "export", "fi", "for", "grep", "head"}
    | {"if", "kill", "ls", "mkdir", "mv", "nats", "openssl", "pip", "printf", "python", "python3", "relayctl", "rm"}
    | {
        "sed",
        "seq",
        "set",
        "sleep",
        "sort",
        "source",
        "tail",
        "test",
        "then",
        "timeout",
        "true",
        "unset",
        "wc",
        "while",
    }
)
"""What a block may begin a command with to be run here: what needs more than this says why it is not run."""


class Block(NamedTuple):
    """One fenced block."""

    page: str
    """Its path in the repository."""
    line: int
    language: str
    code: str
    before: str
    """Commands that the page has for it out of sight."""
    not_run: str
    """Why it is not run, or ''."""
    heading: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[tuple[str, str]]:
        """Commands with what the page says they print ('' of a ``sh`` block, which says nothing)."""
        if self.language == "sh":
            return [(self.code, "")]
        found: list[tuple[str, str]] = []
        for line in self.code.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif line.startswith("> ") and found and not found[-1][1]:
                found[-1] = (f"{found[-1][0]}\n{line[2:]}", "")
            elif found:
                found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        return found

    def command_lines(self) -> list[list[str]]:
        """Every simple command, as words: at the begin of a line, behind ``|``, ``&&``, ``;`` and ``$(``."""
        if self.language not in {"sh", "console"}:
            return []
        found = []
        for command, _ in self.commands():
            text = re.sub(r"<<-?\s*'?(\w+)'?.*?^\1$", "", command.replace("\\\n", " "), flags=re.M | re.S)
            text = re.sub(r"(?:^|(?<=\s))#.*", "", text, flags=re.M)
            lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;()\n")
            lexer.whitespace = " \t"
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "\n"]:
                if word and set(word) <= set("|&;()\n"):
                    while words and re.fullmatch(r"\w+=.*", words[0]):
                        words.pop(0)  # a variable for this command
                    if words:
                        found.append(words)
                    words = []
                else:
                    words.append(word)
        return found


def pages() -> list[Path]:
    """The README and all of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks_of(page: Path) -> Iterator[Block]:
    """The page's fenced blocks, in order."""
    comment, heading = "", ""
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    for token, next_token in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and next_token is not None:
            heading = next_token.content
        if token.type in {"fence", "code_block"}:  # an indented one has no language
            assert token.map is not None
            yield Block(
                page=str(page.relative_to(ROOT)),
                line=token.map[0] + 1,
                language=token.info.split(" ")[0],
                code=token.content,
                before=_said("before", comment),
                not_run=_said("not run", comment),
                heading=heading,
            )
        comment = token.content if token.type == "html_block" else ""


def _said(word: str, comment: str) -> str:
    found = re.search(rf"<!-- {word}: (.*?) -->", comment, re.S)
    return found[1].strip() if found else ""


def parse(block: Block) -> None:
    """Raises when the block is not what its language says."""
    if block.language == "json":
        for text in re.split(r"\n(?=\{)", block.code.strip()):
            json.loads(text)
    elif block.language == "yaml":
        list(yaml.safe_load_all(block.code))
    elif block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "ini":
        parser = configparser.RawConfigParser(strict=False, allow_no_value=True, delimiters=("=",))
        parser.read_string(block.code if "[" in block.code.lstrip()[:1] else f"[settings]\n{block.code}")
    elif block.language == "nats":
        with tempfile.TemporaryDirectory() as directory:
            config = Path(directory) / "nats.conf"
            config.write_text(block.code)
            _must_pass([str(BINARY), "-t", "-c", str(config)], directory)
    elif block.language == "promql":
        rules = [{"record": f"r{at}", "expr": line} for at, line in enumerate(block.code.splitlines()) if line.strip()]
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
            yaml.safe_dump({"groups": [{"name": "shown", "rules": rules}]}, file)
            file.flush()
            done = promtool("check", "rules", file.name)
        assert done.returncode == 0, done.stdout + done.stderr
    elif block.language == "go" and shutil.which("gofmt"):
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "main.go").write_text(block.code)
            _must_pass(["gofmt", "-e", "-l", "main.go"], directory)


def _must_pass(command: list[str], directory: str) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- running ----------------------------------------------------------------------------------------------------------
_VARIABLE = [
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "<uuid>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<hex>"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?"), "<time>"),
    (re.compile(r"\w{3}, \d\d? \w{3} \d{4} \d\d:\d\d:\d\d \+0000"), "<time>"),
    (re.compile(r"=_[0-9a-f]+"), "<boundary>"),
    (re.compile(r"\b\d+(\.\d+)? ?m?s\b"), "<seconds>"),
    (re.compile(r"\bsend-\d+"), "send-0"),  # whichever took it
    (re.compile(r"─{3,}"), "<line>"),
    (re.compile(r"[█░▏▎▍▌▋▊▉]+"), "<bar>"),
    (re.compile(r"(?<=cursor\": \")[\w-]+|(?<=cursor\":\")[\w-]+"), "<cursor>"),
]
_PROGRAM = re.compile(r"^(send-\d+|status|nats|catcher|engagement) ")


def comparable(text: str) -> list[str]:
    """The lines without what differs from one run to the next: ids, times, widths; of a program's row its numbers."""
    lines = []
    for line in text.splitlines():
        if line.startswith("waiting: "):
            continue  # what `relayctl start` says of a machine that is busy
        for pattern, name in _VARIABLE:
            line = pattern.sub(name, line)
        line = re.sub(r"\s+", " ", line).strip()
        lines.append(re.sub(r"(?<![-\w])\d+", "0", line) if _PROGRAM.match(line) else line)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def is_as_shown(shown: list[str], printed: list[str]) -> bool:
    """Whether what was printed is what is shown, where a line that is only ``…`` stands for any number of lines."""
    if not shown:
        return not printed
    if shown[0] == "…":
        return any(is_as_shown(shown[1:], printed[start:]) for start in range(len(printed) + 1))
    return bool(printed) and shown[0] == printed[0] and is_as_shown(shown[1:], printed[1:])


class Shell:
    """A bash in a directory of its own, in which ``relayctl start --dev`` takes free ports for its usual ones."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="relay-d-"))
        self.directory = self._root / "relay"
        self.directory.mkdir()
        nats, smtp, http = free_port(), free_port(), free_port()
        self._ports = {"4222": str(nats), "1025": str(smtp), "8080": str(http)}
        (self._root / "bin").mkdir()
        _stand_in_for_nats(self._root / "bin" / "nats")
        environment = clean_environment(
            {
                "PATH": f"{SCRIPTS}:{os.environ['PATH']}:{self._root / 'bin'}",
                "HOME": str(self._root),
                "NATS_URL": f"nats://127.0.0.1:{nats}",
                "SMTP_PORT": str(smtp),
                "PORT": str(http),
                "SOURCE": str(ROOT),
            }
        )
        environment.pop("VIRTUAL_ENV", None)
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=self.directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def run(self, command: str, *, stops_at_an_error: bool = False) -> tuple[str, int]:
        """What the command prints, with the usual ports and paths in the place of the real ones; its exit code."""
        for usual, real in self._ports.items():
            command = re.sub(rf"(?<=127\.0\.0\.1:){usual}\b|(?<=localhost:){usual}\b", real, command)
        if stops_at_an_error:
            command = f"set -e\n{command}\nset +e"
        assert self._process.stdin is not None
        end = f"end-{time.monotonic_ns()}"
        self._process.stdin.write(f"{{\n{command}\n}} </dev/null\ncode=$?\necho\necho {end} $code\n")
        self._process.stdin.flush()
        printed = []
        deadline = time.monotonic() + COMMAND_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{command!r} does not end; it printed {''.join(printed)}") from None
            if not line:
                return self._as_usual("".join(printed)), self._process.wait(10)
            if line.startswith(f"{end} "):
                return self._as_usual("".join(printed)).removesuffix("\n"), int(line.split()[1])
            printed.append(line)

    def _as_usual(self, text: str) -> str:
        for usual, real in self._ports.items():
            text = re.sub(rf"\b{real}\b", usual, text)
        return text.replace(str(self.directory), "/srv/relay").replace(str(self._root), "/srv")

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends what was started: a relay that still runs, the shell and whatever is of its session."""
        for state_dir in {path.parent for path in self._root.glob("**/started.json")}:
            subprocess.run(
                [str(SCRIPTS / "relayctl"), "stop", "--timeout", "60"],
                env=clean_environment({"RELAY_STATE_DIR": str(state_dir)}),
                capture_output=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        shutil.rmtree(self._root, ignore_errors=True)


def _stand_in_for_nats(path: Path) -> None:
    """``nats req``, where the real tool is not installed: the last of PATH, and nothing but that one command."""
    path.write_text(
        f"""#!{sys.executable}
import asyncio, os, sys
import nats

words = sys.argv[1:]
if "--timeout" in words:
    at = words.index("--timeout")
    del words[at : at + 2]
if len(words) != 3 or words[0] != "req":
    sys.exit("only `nats req SUBJECT PAYLOAD` can be run here")

async def main():
    nc = await nats.connect(os.environ["NATS_URL"])
    print((await nc.request(words[1], words[2].encode(), timeout=35)).data.decode())
    await nc.close()

asyncio.run(main())
"""
    )
    path.chmod(0o755)


def play(shell: Shell, block: Block) -> Iterator[tuple[str, str, str]]:
    """Runs the block: each command, what the page says it prints, what it printed. Raises where it failed."""
    if block.before:
        printed, code = shell.run(block.before, stops_at_an_error=True)
        assert code == 0, f"{block}: before it: exit code {code}\n{printed}"
    if block.language == "python":
        (shell.directory / "example.py").write_text(
            block.code.replace('"nats://127.0.0.1:4222"', '__import__("os").environ["NATS_URL"]')
        )
        printed, code = shell.run("python example.py")
        assert code == 0, f"{block}: exit code {code}\n{printed}"
        return
    commands = block.commands()
    code = 0
    for number, (command, shown) in enumerate(commands):
        if command == "echo $?":
            yield command, shown, f"{code}\n"
            continue
        printed, code = shell.run(command, stops_at_an_error=block.language == "sh")
        is_asked_for = number + 1 < len(commands) and commands[number + 1][0] == "echo $?"
        assert code == 0 or is_asked_for, f"{block}: exit code {code} of {command!r}\n{printed}"
        yield command, shown, printed
