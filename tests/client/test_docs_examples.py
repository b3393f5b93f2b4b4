"""docs/client.md, and the README's Python: the examples run as they stand there, against a started relay."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js.api import ObjectStoreConfig

from relay import client, contract
from relay.client.errors import RelayClientError
from tests.client.test_callers import EXAMPLE
from tests.docs.markdown import blocks, page
from tests.support.caller import ask, with_nats
from tests.support.relay_process import CatchingServer, RelayProcess

PAGE = "client.md"
NATS_GO = "github.com/nats-io/nats.go@v1.55.0"
GO = shutil.which("go")
PROGRAMS = [code for code in blocks(PAGE, "python") if "NATS_URL" in code]


def run(code: str, url: str) -> list[str]:
    """What the program prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NATS_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def program_with(what: str) -> str:
    (found,) = (code for code in PROGRAMS if what in code)
    return found


def test_with_asyncio(relay: RelayProcess) -> None:
    sent, delivered, number, *mails = run(program_with("get_analytics"), relay.nats_url)
    assert re.fullmatch(r"sent: [0-9a-f-]{36}", sent)
    assert delivered == "delivered: False"
    assert number == f"mails in the group: {len(mails)}"
    assert mails[-1].startswith(sent.removeprefix("sent: "))


def test_blocking(relay: RelayProcess) -> None:
    (sent,) = run(program_with("BlockingRelayClient"), relay.nats_url)
    assert re.fullmatch(r"sent: [0-9a-f-]{36}", sent)


def test_many(relay: RelayProcess, smtp: CatchingServer) -> None:
    before = smtp.count()
    assert run(program_with("send_many"), relay.nats_url) == ["failed: 0"]
    assert smtp.count() - before == 200


def test_attachments(relay: RelayProcess) -> None:
    async def make_bucket(nc: nats.NATS) -> None:
        await nc.jetstream().create_object_store("attachments", config=ObjectStoreConfig(bucket="attachments"))

    with_nats(relay.nats_url, make_bucket)
    (sent,) = run(program_with("put_object"), relay.nats_url)
    assert re.fullmatch(r"sent: [0-9a-f-]{36}", sent)


def test_the_readme(relay: RelayProcess, smtp: CatchingServer) -> None:
    first, many = (code.replace("nats://127.0.0.1:4222", relay.nats_url) for code in blocks("../README.md", "python"))
    (sent,) = run(first, relay.nats_url)
    assert re.fullmatch(r"sent: [0-9a-f-]{36}", sent)
    before = smtp.count()
    assert run(many, relay.nats_url) == []
    assert smtp.count() - before == 100


def test_the_other_python_is_python() -> None:
    assert len(PROGRAMS) == 4
    for code in blocks(PAGE, "python"):
        ast.parse(code)
        names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
        assert all(
            hasattr(client, alias.name) for node in names if node.module == "relay.client" for alias in node.names
        )


def test_the_command_line(relay: RelayProcess) -> None:
    (shell,) = blocks(PAGE, "sh")
    subjects = []
    for line in shell.splitlines():
        *_, nats_subject, payload = shlex.split(line)
        subjects.append(nats_subject)
        assert isinstance(json.loads(payload), dict)
        reply: Any = ask(relay.nats_url, nats_subject, payload.encode())
        if nats_subject == contract.SEND_EMAIL:
            assert reply["email_id"]
    assert subjects == [contract.SEND_EMAIL, contract.GET_EMAIL_STATUS, contract.GET_EMAIL_ENGAGEMENT_ANALYTICS]


def test_go(relay: RelayProcess, tmp_path: Path) -> None:
    if GO is None:
        pytest.skip("go is not installed")
    (code,) = blocks(PAGE, "go")
    (tmp_path / "go.mod").write_text("module example\n\ngo 1.21\n")
    (tmp_path / "main.go").write_text(code)
    got = subprocess.run([GO, "get", NATS_GO], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    if got.returncode != 0:
        pytest.skip(f"{NATS_GO} cannot be had here: {got.stderr.strip()[-200:]}")
    for command in (["vet", "."], ["build", "-o", "caller", "."]):
        done = subprocess.run([GO, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [str(tmp_path / "caller")],
        env={**os.environ, "NATS_URL": relay.nats_url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"sent: [0-9a-f-]{36}\n", done.stdout)


def test_the_table_of_errors_names_them_all() -> None:
    """But for those of objects, and those that only are the root of others."""
    named = set(re.findall(r"`(\w+)`", page(PAGE)))
    errors = {name for name in client.__all__ if isinstance(getattr(client, name), type)}
    errors = {name for name in errors if issubclass(getattr(client, name), RelayClientError)}
    assert errors - named <= {"ObjectFailed", "NotHandedOver"}
    for row in re.findall(r"^\| (`.*?) \| `(\w+)` \|", page(PAGE), re.M):
        for name in re.findall(r"`(\w+)`", row[0]):
            assert getattr(client, name).outcome_as_a_class == row[1], name


def test_the_page_on_callers_speaks_of_the_example() -> None:
    text = page("callers.md")
    (user,) = re.findall(r"^\{\n  user: billing.*?^\}$", text, re.M | re.S)
    squeezed = re.sub(r"\s+|#.*", "", user)
    assert squeezed in re.sub(r"\s+", "", re.sub(r"#.*", "", EXAMPLE.read_text()))
    (header,) = blocks("callers.md", "json")
    fields = set(json.loads(header))
    table = text.partition("| Field | Who says it |")[2].partition("\n\n")[0]
    assert fields <= set(re.findall(r"`(\w+)`", table)), "each field of it is spoken of"
