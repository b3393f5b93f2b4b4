"""Credentials and certificates for NATS, read from their files whenever a connection is made.

So they may be replaced while Relay runs: the next connection has the new ones. Whatever a file holds, no error says it.

Sources: NATS ADR-14 (JWT and nkeys; the file of user and seed), nkeys' own description of seeds; RFC 6125 for the
server's name, as Python's ``ssl`` checks it.
"""

from __future__ import annotations

import base64
import os
import re
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from relay.bus.config import BusConfig
from relay.errors import ConfigError

if TYPE_CHECKING:
    import nkeys

MAX_FILE_BYTES = 1_000_000

_JWT = re.compile(r"-{3,} *BEGIN NATS USER JWT *-{3,}\s+([\w.=-]+)\s+-{3,} *END", re.ASCII)
_SEED = re.compile(r"-{3,} *BEGIN USER NKEY SEED *-{3,}\s+(\w+)\s+-{3,} *END", re.ASCII)
_IS_CONTENT = re.compile(r"\s*(?:S[A-Z][A-Z2-7]{16,}|eyJ[\w-]{16}.*|.*BEGIN [A-Z ]+.*)\s*", re.DOTALL)
"""What belongs into a file, and somebody gave in place of the file's name; a seed also when it is not whole."""
_IS_PATH = re.compile(r"(?:[/~]|\.\.?/)[\w./ ~@+:-]*|[\w-]+(?:[/.][\w-]+)*\.[a-z]{2,8}", re.ASCII)


class Signature(NamedTuple):
    """The proof that we hold a seed."""

    public_key: str
    base64: bytes


class Credentials(NamedTuple):
    """What a ``.creds`` file holds."""

    jwt: str
    seed: str


class Access:
    """What a connection presents. Every method reads its files anew; ``ConfigError`` when one is unusable."""

    def __init__(self, config: BusConfig) -> None:
        self.config = config

    def jwt(self) -> bytes:
        """The user's JWT."""
        return read_creds(self.config.creds_file).jwt.encode()

    def sign(self, nonce: str) -> Signature:
        """Signs what the server has sent, with the seed of the JWT's user or of the nkey."""
        if self.config.creds_file:
            return _signed(read_creds(self.config.creds_file).seed, nonce)
        return _signed(read_seed(self.config.nkey_seed_file), nonce)

    def password(self) -> str:
        """The password, wherever it is."""
        return read_line(self.config.password_file) if self.config.password_file else self.config.password

    def token(self) -> str:
        """The token."""
        return read_line(self.config.token_file)

    def tls_context(self) -> ssl.SSLContext:
        """Verifies the server's certificate and name; presents our own certificate where there is one."""
        return tls_context(self.config.ca_file, self.config.cert_file, self.config.key_file)

    def why_refused(self) -> str:
        """What may be wrong with the credentials that the server has just refused, and what to do."""
        config = self.config
        if not config.login:
            return "it wants credentials, and none are set; set NATS_CREDS, NATS_NKEY_SEED_FILE or NATS_USER"
        if config.creds_file:
            try:
                wrong = _wrong_with(read_creds(config.creds_file))
            except ConfigError as error:
                wrong = str(error)
            if wrong:
                return f"it refuses the credentials of {config.login}: {wrong}; put new ones there"
        if config.user or config.login == "NATS_URL":
            return f"user name or password was refused; check {config.login}"
        return f"it refuses what we log in with; check {config.login}"


def shown_path(path: str) -> str:
    """A path for people; of what neither is there nor looks like one the beginning alone: it may be a secret."""
    is_path = os.path.exists(path) or (_IS_PATH.fullmatch(path) and not _IS_CONTENT.fullmatch(path))
    return path[:200] if is_path else f"what begins with {path[:3]!r}"


def read_text(path: str) -> str:
    """A file's text. Raises ``ConfigError`` that names the path."""
    if _IS_CONTENT.fullmatch(path):
        raise ConfigError("must be the path of a file, not what belongs into the file")
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES)
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{shown_path(path)} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{shown_path(path)} cannot be read: it is no text") from error


def read_line(path: str) -> str:
    """The one line of a file."""
    line = read_text(path).removesuffix("\n").removesuffix("\r")
    if not line or "\n" in line:
        raise ConfigError(f"{path} must hold one line with the secret")
    return line


def read_seed(path: str) -> str:
    """The seed of a user's nkey, in a file of its own: among comments, or in a ``.creds`` file."""
    text = read_text(path)
    found = _SEED.search(text)
    lines = [found[1]] if found else [line.strip() for line in text.splitlines() if line.strip()[:2] == "SU"]
    if len(lines) != 1:
        raise ConfigError(f"{path} must hold the seed of one user's nkey, which begins with SU")
    _key_pair(lines[0], path)
    return lines[0]


def read_creds(path: str) -> Credentials:
    """What a ``.creds`` file holds, as nsc writes it."""
    text = read_text(path)
    jwt, seed = _JWT.search(text), _SEED.search(text)
    if jwt is None or seed is None:
        raise ConfigError(f"{path} must hold a user's JWT and its seed, as `nsc generate creds` writes them")
    _claims(jwt[1], path)
    _key_pair(seed[1], path)
    return Credentials(jwt[1], seed[1])


def tls_context(ca_file: str, cert_file: str, key_file: str) -> ssl.SSLContext:
    """For connections to a server whose certificate a CA of ``ca_file`` has signed; '': the system's CAs."""
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"NATS_CA {shown_path(ca_file)} cannot be used as CA certificates in PEM: {_ssl_words(error)}"
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file:
        try:
            # Without a function OpenSSL would ask for a passphrase on the terminal.
            context.load_cert_chain(cert_file, key_file or None, password=_no_passphrase)
        except _Encrypted as error:
            raise ConfigError(
                f"NATS_KEY {shown_path(key_file)} is encrypted; give the key without a passphrase"
            ) from error
        except (OSError, ValueError) as error:
            files = f"NATS_CERT {shown_path(cert_file)} and NATS_KEY {shown_path(key_file)}"
            raise ConfigError(f"{files} cannot be used: {_ssl_words(error)}") from error
    return context


class _Encrypted(Exception):
    """The key's file wants a passphrase."""


def _no_passphrase() -> str:
    raise _Encrypted


def _ssl_words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        reason = str(error.reason or "").replace("_", " ").lower()
        return "the key is not that of the certificate" if "mismatch" in reason else reason or "it is no PEM"
    return error.strerror or "it cannot be read" if isinstance(error, OSError) else "it is no path"


def _key_pair(seed: str, path: str) -> nkeys.KeyPair:
    """Raises ``ConfigError`` without a cause: its text may hold the seed."""
    import nkeys  # here, since it brings libsodium, and most do without

    encoded = seed.encode()
    try:
        prefix, raw = nkeys.decode_seed(encoded)
        is_whole = nkeys.encode_seed(raw, prefix) == encoded  # the library does not look at the checksum
    except (nkeys.NkeysError, IndexError, ValueError):
        prefix, is_whole = 0, False
    if not is_whole:
        raise ConfigError(f"{path} holds a seed that is damaged") from None
    if prefix != nkeys.PREFIX_BYTE_USER:
        raise ConfigError(f"{path} must hold a user's seed, which begins with SU, not an account's or operator's")
    return nkeys.from_seed(bytearray(encoded))


def _signed(seed: str, nonce: str) -> Signature:
    key_pair = _key_pair(seed, "it")
    public_key = key_pair.public_key.decode()
    return Signature(public_key, base64.b64encode(key_pair.sign(nonce.encode())))


def _claims(jwt: str, path: str) -> dict[str, Any]:
    try:
        encoded = jwt.split(".")[1]
        claims = orjson.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (IndexError, ValueError):  # no base64, no JSON
        claims = None
    if not isinstance(claims, dict):
        raise ConfigError(f"{path} holds a JWT that is damaged")
    return claims


def _wrong_with(credentials: Credentials, now: Callable[[], float] = time.time) -> str:
    claims = _claims(credentials.jwt, "it")
    expires = claims.get("exp")
    if isinstance(expires, int) and 0 < expires <= now():
        return f"its JWT expired at {datetime.fromtimestamp(expires, UTC):%Y-%m-%dT%H:%M:%SZ}"
    if claims.get("sub") != _signed(credentials.seed, "").public_key:
        return "its JWT and its seed are not the same user's"
    return ""
