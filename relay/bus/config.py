"""Where NATS is and how to log in there: one value, made from the settings in ``ops.parts``. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BusConfig:
    """Settings NATS_*. At most one way to log in is set; files are named here and read at every connection."""

    url: str
    """One server, or several separated by commas; may hold ``user:password@``."""
    creds_file: str = ""
    nkey_seed_file: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    token_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    tls_first: bool = False
    inbox_prefix: str = "_INBOX"
    """Answers to what is asked arrive beneath; only this user should be allowed to listen there."""

    @property
    def servers(self) -> list[str]:
        """The URLs one by one."""
        return [part.strip() for part in self.url.split(",") if part.strip()]

    @property
    def shown(self) -> str:
        """The URLs for people: without user and password."""
        return without_password(self.url)

    @property
    def requires_tls(self) -> bool:
        """Whether nothing may be said in clear: one sign of TLS in the settings is enough for all servers."""
        is_in_url = any(server.lower().startswith("tls://") for server in self.servers)
        return is_in_url or self.tls_first or bool(self.ca_file or self.cert_file)

    @property
    def login(self) -> str:
        """How it logs in, as the settings that say so; '' when nothing is said."""
        for name, value in (
            ("NATS_CREDS", self.creds_file),
            ("NATS_NKEY_SEED_FILE", self.nkey_seed_file),
            ("NATS_TOKEN_FILE", self.token_file),
        ):
            if value:
                return f"{name} {value}"
        if self.user:
            return (
                f"NATS_USER and {f'NATS_PASSWORD_FILE {self.password_file}' if self.password_file else 'NATS_PASSWORD'}"
            )
        if self.cert_file and "@" not in self.url:
            return f"NATS_CERT {self.cert_file}"
        return "NATS_URL" if "@" in self.url else ""

    def __repr__(self) -> str:
        return f"BusConfig({self.shown!r}, login={self.login!r})"


def without_password(url: str) -> str:
    """The URL, or several separated by commas, as it may be shown: user and password left out, whatever they hold."""
    return ",".join(re.sub(r"//.*@", "//", part) for part in url.split(","))
