"""relayctl as a user meets it: help, exit codes, one line for what went wrong."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from relay.cli.main import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    """Runs commands with a state directory of their own and no NATS."""
    monkeypatch.setenv("RELAY_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:9")
    return CliRunner()


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_an_example_and_a_place_in_the_readme(runner: CliRunner, name: str) -> None:
    shown = runner.invoke(cli, [name, "--help"])
    assert shown.exit_code == 0
    assert f"Example: relayctl {name}" in shown.output
    assert f"relayctl {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", cli.commands.values(), ids=lambda command: str(command.name))
def test_every_option_has_help(command: click.Command) -> None:
    for parameter in command.params:
        assert isinstance(parameter, click.Option)
        assert parameter.help, parameter.name


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
