"""relayctl as a user meets it: help, exit codes, one line for what went wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from relay.cli.documentation import reference
from relay.cli.main import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[CliRunner]:
    """Runs commands with a state directory of their own and no NATS; what a settings file sets ends with the test."""
    before = dict(os.environ)
    os.environ.update(RELAY_STATE_DIR=str(tmp_path), NATS_URL="nats://127.0.0.1:9")
    yield CliRunner()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_and_an_example(runner: CliRunner, name: str) -> None:
    shown = runner.invoke(cli, [name, "--help"])
    assert shown.exit_code == 0
    assert f"Example: relayctl {name}" in shown.output


@pytest.mark.parametrize("command", cli.commands.values(), ids=lambda command: str(command.name))
def test_every_option_has_help(command: click.Command) -> None:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


SHOWING = ["status", "send", "track", "analytics", "inbox", "check", "doctor", "settings", "logs", "events"]


@pytest.mark.parametrize("name", [*SHOWING, "buckets", "repair", "erase"])
def test_every_command_that_shows_something_can_show_json(name: str) -> None:
    assert any("--json" in parameter.opts for parameter in cli.commands[name].params)


def test_the_reference_in_the_docs_is_this_one() -> None:
    assert (ROOT / "docs" / "cli.md").read_text().endswith(reference(cli)), (
        "put the output of `python -c 'from relay.cli.documentation import *; from relay.cli.main import cli;"
        " print(reference(cli))'` at the end of docs/cli.md"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(runner: CliRunner, shell: str) -> None:
    shown = runner.invoke(cli, ["completion", shell])
    assert shown.exit_code == 0
    assert "_RELAYCTL_COMPLETE" in shown.output


def test_version(runner: CliRunner) -> None:
    assert runner.invoke(cli, ["--version"]).output.startswith("relayctl, version ")


def test_a_mistyped_option_exits_2(runner: CliRunner) -> None:
    assert runner.invoke(cli, ["start", "--no-such-option"]).exit_code == 2


@pytest.mark.parametrize("name", ["status", "stop"])
def test_nothing_runs(runner: CliRunner, name: str) -> None:
    shown = runner.invoke(cli, [name])
    assert shown.exit_code == 1
    assert "no relay runs in" in shown.stderr


def test_bad_settings_exit_78(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "http")
    shown = runner.invoke(cli, ["status"])
    assert shown.exit_code == 78
    assert "PORT" in shown.stderr


def test_sending_without_nats(runner: CliRunner) -> None:
    shown = runner.invoke(cli, ["send", "--to", "a@example.com", "--subject", "s", "--text", "t"])
    assert shown.exit_code == 1
    assert "cannot be reached (connection refused)" in shown.stderr
    assert "NATS_URL" in shown.stderr


def test_a_body_from_a_file_that_is_not_there(runner: CliRunner) -> None:
    shown = runner.invoke(cli, ["send", "--to", "a@example.com", "--subject", "s", "--text", "@/no/such/file"])
    assert shown.exit_code == 1
    assert "cannot read /no/such/file" in shown.stderr


# -- settings ------------------------------------------------------------------------------------


def test_settings_say_where_they_come_from_and_mask_secrets(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "relay.env"
    file.write_text("SMTP_HOST=smtp.example.com\nSMTP_PASSWORD=hunter2\nNATS_URL=nats://overridden.example.com\n")
    shown = runner.invoke(cli, ["--env-file", str(file), "settings", "--json"])
    assert shown.exit_code == 0
    rows = {row["name"]: (row["value"], row["source"]) for row in json.loads(shown.stdout)}
    assert rows["SMTP_HOST"] == ("smtp.example.com", str(file))
    assert rows["SMTP_PASSWORD"] == ("********", str(file))
    assert rows["NATS_URL"] == ("nats://127.0.0.1:9", "environment"), "the environment outranks the file"
    assert rows["SMTP_PORT"] == ("587", "default")
    assert "hunter2" not in shown.stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_settings_mask_who_logs_in_with_a_url(runner: CliRunner, tmp_path: Path, as_json: bool) -> None:
    file = tmp_path / "relay.env"
    file.write_text(
        "OTEL_EXPORTER_OTLP_ENDPOINT=http://me:Sec,ret@collector.example.com:4318\n"
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=me:Sec,ret@collector.example.com:4318/v1/traces\n"
        "SES_ENGAGEMENT_SQS_QUEUE_URL=https://me:Sec,ret@sqs.eu-west-1.amazonaws.com/1/events\n"
    )
    shown = runner.invoke(cli, ["--env-file", str(file), "settings", *(["--json"] if as_json else [])])
    assert shown.exit_code == 0
    assert "ret@" not in shown.stdout
    assert "Sec" not in shown.stdout
    if as_json:
        rows = {row["name"]: row["value"] for row in json.loads(shown.stdout)}
        assert rows["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.example.com:4318"
        assert rows["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] == "collector.example.com:4318/v1/traces"
        assert rows["SES_ENGAGEMENT_SQS_QUEUE_URL"] == "https://sqs.eu-west-1.amazonaws.com/1/events"


def test_settings_as_markdown(runner: CliRunner) -> None:
    assert runner.invoke(cli, ["settings", "--markdown"]).stdout in (ROOT / "README.md").read_text()


def test_a_settings_file_with_a_broken_line(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "relay.env"
    file.write_text("# a comment\nSMTP_HOST=a.example.com\nRELAY_STATE_DIR /tmp/x\n")
    shown = runner.invoke(cli, ["--env-file", str(file), "settings"])
    assert shown.exit_code == 78
    assert "line 3 is not NAME=value: 'RELAY_STATE_DIR /tmp/x'" in shown.stderr


def test_a_settings_file_that_is_not_there(runner: CliRunner) -> None:
    shown = runner.invoke(cli, ["--env-file", "/no/such/file", "settings"])
    assert shown.exit_code == 78
    assert "/no/such/file cannot be read" in shown.stderr


# -- logs ----------------------------------------------------------------------------------------


def test_logs_of_no_relay(runner: CliRunner) -> None:
    shown = runner.invoke(cli, ["logs"])
    assert shown.exit_code == 1
    assert "there is no log" in shown.stderr


def test_logs_are_merged_by_time_and_shown_as_text(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    line = '{"time":"2026-01-01T00:00:0%d.000+00:00","level":"info","program":"%s","msg":"m%d","email_id":"e%d"}\n'
    (tmp_path / "log" / "send-1.log").write_text(line % (1, "send-1", 1, 1) + line % (3, "send-1", 3, 3))
    (tmp_path / "log" / "send-2.log").write_text(line % (2, "send-2", 2, 2) + "no JSON\n")
    shown = runner.invoke(cli, ["logs"]).stdout.splitlines()
    assert shown[0] == "send-2     no JSON"
    assert [text.split()[4] for text in shown[1:]] == ["m1", "m2", "m3"]
    assert shown[1] == "2026-01-01 00:00:01.000 send-1     info  m1 email_id=e1"
    assert len(runner.invoke(cli, ["logs", "send-1", "-n", "1"]).stdout.splitlines()) == 1
    assert runner.invoke(cli, ["logs", "send-1", "--json"]).stdout.startswith('{"time"')
    assert "there are: send-1, send-2" in runner.invoke(cli, ["logs", "send-9"]).stderr
