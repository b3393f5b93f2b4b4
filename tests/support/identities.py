"""Keys for tests of NATS: certificates of a CA of our own, nkeys, and JWTs as an operator signs them."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import nkeys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NO_LIMIT = -1


# -- certificates ------------------------------------------------------------------------------------------------------
class Certificate(NamedTuple):
    """Two files in PEM."""

    cert: Path
    key: Path


class Authority:
    """A CA."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        cert = (
            self._builder(self._name, self._key.public_key(), days=1)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def issue(self, name: str, *hosts: str, days: int = 1, passphrase: bytes = b"") -> Certificate:
        """A certificate for these names and addresses; ``days`` below 0: it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names: list[x509.GeneralName] = [
            x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts
        ]
        builder = self._builder(subject, key.public_key(), days)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        files = Certificate(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        files.cert.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        files.key.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        )
        return files


# -- nkeys and JWTs ----------------------------------------------------------------------------------------------------
class Key(NamedTuple):
    """An nkey."""

    public: str
    seed: str


def new_key(prefix: int = nkeys.PREFIX_BYTE_USER, octets: bytes = b"") -> Key:
    """A new nkey; a user's unless another prefix is given. Always the same one where its 32 ``octets`` are given."""
    seed = nkeys.encode_seed(octets or os.urandom(32), prefix)
    return Key(nkeys.from_seed(bytearray(seed)).public_key.decode(), seed.decode())


def _encoded(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def signed_jwt(issuer: Key, subject: str, claims: dict[str, Any], *, expires_seconds: float = 0) -> str:
    """A JWT as nsc makes them (https://docs.nats.io/running-a-nats-service/configuration/securing_nats/jwt)."""
    now = time.time()
    body: dict[str, Any] = {
        "jti": _encoded(os.urandom(16)),
        "iat": int(now),
        "iss": issuer.public,
        "name": "test",
        "sub": subject,
        "nats": claims | {"version": 2},
    }
    if expires_seconds:
        body["exp"] = int(now + expires_seconds)
    head = _encoded(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    text = f"{head}.{_encoded(json.dumps(body).encode())}"
    return f"{text}.{_encoded(nkeys.from_seed(bytearray(issuer.seed.encode())).sign(text.encode()))}"


class Operator:
    """An operator with a system account and one for Relay, and a server's configuration that trusts them."""

    def __init__(self) -> None:
        self.key = new_key(nkeys.PREFIX_BYTE_OPERATOR)
        self.account = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
        self._system = new_key(nkeys.PREFIX_BYTE_ACCOUNT)

    def config(self, **revoked: int) -> str:
        """For nats-server; ``revoked``: users and until when their JWTs were issued."""
        operator = signed_jwt(self.key, self.key.public, {"type": "operator", "system_account": self._system.public})
        names = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
        limits: dict[str, Any] = dict.fromkeys(names, NO_LIMIT) | {"wildcards": True}
        stores = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), NO_LIMIT)
        relay = {"type": "account", "limits": limits | stores, "revocations": revoked}
        system = {"type": "account", "limits": limits}
        accounts = {
            self.account.public: signed_jwt(self.key, self.account.public, relay),
            self._system.public: signed_jwt(self.key, self._system.public, system),
        }
        preload = "\n".join(f"  {public}: {jwt}" for public, jwt in accounts.items())
        return (
            f"operator: {operator}\nsystem_account: {self._system.public}\nresolver: MEMORY\n"
            f"resolver_preload: {{\n{preload}\n}}\n"
        )

    def creds(self, user: Key, *, expires_seconds: float = 0, **permissions: Any) -> str:
        """A ``.creds`` file for a user of Relay's account; ``pub`` and ``sub`` as in a JWT."""
        claims = {"type": "user", "subs": NO_LIMIT, "data": NO_LIMIT, "payload": NO_LIMIT, "pub": {}, "sub": {}}
        jwt = signed_jwt(self.account, user.public, claims | permissions, expires_seconds=expires_seconds)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            "************************* IMPORTANT *************************\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
