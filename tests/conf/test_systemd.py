"""The systemd unit: as systemd itself reads it, and against what Relay does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from relay.cli.lifecycle import STOP_MARGIN_SECONDS
from relay.cli.main import cli
from relay.errors import EXIT_CONFIG
from relay.settings import Settings
from tests.conf.tools import CONF, run, tool
from tests.support.relay_process import RELAYCTL

UNIT = (CONF / "systemd" / "relay.service").read_text()
MOST_EXPOSURE = 1.5
"""Of 10; a service without any of these options has 9.6."""


def option(name: str) -> str:
    """The value of an option that is given once."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


def as_installed(directory: Path) -> Path:
    """The unit with a relayctl that exists."""
    path = directory / "relay.service"
    path.write_text(UNIT.replace("/opt/relay/bin/relayctl", str(RELAYCTL)))
    return path


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    program = tool("systemd-analyze", "systemd")
    done = run(program, "verify", str(as_installed(tmp_path)))
    assert (done.returncode, done.stderr) == (0, "")
    # It does find what is wrong
    path = as_installed(tmp_path)
    path.write_text(path.read_text().replace("[Install]", "Nonsense=1\n[Install]"))
    assert "Nonsense" in run(program, "verify", str(path)).stderr


def test_the_lines_that_one_may_uncomment(tmp_path: Path) -> None:
    path = as_installed(tmp_path)
    path.write_text(re.sub(r"^#(?=\w+=)", "", path.read_text(), flags=re.MULTILINE))
    assert "\nLoadCredential=smtp-password:" in path.read_text()
    assert "\nEnvironment=SMTP_PASSWORD_FILE=%d/smtp-password\n" in path.read_text()
    done = run(tool("systemd-analyze", "systemd"), "verify", str(path))
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_exposed_to_little(tmp_path: Path) -> None:
    done = run(tool("systemd-analyze", "systemd"), "security", "--offline=true", str(as_installed(tmp_path)))
    (exposure,) = re.findall(r"Overall exposure level for relay.service: ([0-9.]+)", done.stdout)
    assert float(exposure) <= MOST_EXPOSURE, done.stdout


def test_commands_are_those_of_relayctl() -> None:
    for name in ("ExecStart", "ExecReload"):
        program, command, *options = shlex.split(option(name))
        assert program == "/opt/relay/bin/relayctl"
        known = {each for parameter in cli.commands[command].params for each in parameter.opts}
        assert set(options) <= known
    assert "--foreground" in option("ExecStart")


def test_wrong_settings_end_it() -> None:
    assert int(option("RestartPreventExitStatus")) == EXIT_CONFIG


def test_it_is_given_time_to_drain() -> None:
    assert float(option("TimeoutStopSec")) >= Settings.model_fields["drain_seconds"].default + STOP_MARGIN_SECONDS
    # A worker's second SIGTERM means: now
    assert option("KillMode") == "mixed"


def test_the_state_directory_is_systemd_s() -> None:
    assert f"RELAY_STATE_DIR=/var/lib/{option('StateDirectory')}" in UNIT
    assert option("WorkingDirectory") == f"/var/lib/{option('StateDirectory')}"
