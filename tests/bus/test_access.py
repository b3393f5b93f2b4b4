"""Logging in to a real nats-server: nkeys, JWTs, passwords, tokens, TLS; and what is said when it fails."""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import nkeys
import pytest

from relay.bus.access import Access, read_creds, read_line, read_seed, tls_context
from relay.bus.client import Bus, BusConfig, Msg, Publication
from relay.errors import ConfigError
from tests.support.identities import Authority, Certificate, Operator, new_key
from tests.support.nats_server import NatsServer

NewServer = Callable[..., NatsServer]
Connect = Callable[..., Bus]
CONF = Path(__file__).parents[2] / "conf" / "nats"


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Buses by their configuration, one at a time; connected, unless ``fails`` is what they should say."""
    made: list[Bus] = []

    def make(url: str, *, fails: str = "", told: list[tuple[bool, str]] | None = None, **config: object) -> Bus:
        on_change = None if told is None else (lambda is_connected, why: told.append((is_connected, why)))
        for each in made:
            each.close()
        bus = Bus(BusConfig(url, **config), "test", on_change)  # type: ignore[arg-type]
        made.append(bus)
        bus.start()
        if fails:
            wait_until(lambda: fails in bus.last_error, lambda: bus.last_error)
            assert not bus.is_connected
        else:
            assert bus.wait_connected(5), bus.last_error
        return bus

    yield make
    for bus in made:
        bus.close()


def wait_until(is_so: Callable[[], bool], told: Callable[[], object] = str, seconds: float = 8) -> None:
    """Returns when it is so."""
    with gevent.Timeout(seconds, False):
        while not is_so():
            gevent.sleep(0.02)
    assert is_so(), told()


def written(path: Path, text: str) -> str:
    """The path of a file with that text, which only its owner may read."""
    path.write_text(text)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    return str(path)


def echoes(bus: Bus, size_bytes: int = 4) -> None:
    """What is asked is answered, whole."""
    token = bus.subscribe("access.echo", "q", lambda msg: bus.publish(Publication(msg.reply_subject, msg.payload)))
    payload = os.urandom(size_bytes)
    assert bus.request(Publication("access.echo", payload), 5).payload == payload
    bus.unsubscribe(token)


# -- nkeys -------------------------------------------------------------------------------------------------------------
def test_an_nkey(new_nats_server: NewServer, connect: Connect, tmp_path: Path) -> None:
    ours, other = new_key(), new_key()
    server = new_nats_server(config=f"authorization {{ users: [ {{ nkey: {ours.public} }} ] }}")
    file = tmp_path / "seed.nk"
    bus = connect(server.url, nkey_seed_file=written(file, f"# relay\n{ours.seed}\n"))
    echoes(bus)
    refused = connect(
        server.url, nkey_seed_file=written(tmp_path / "other.nk", other.seed), fails="it refuses what we log in with"
    )
    assert refused.last_error.endswith(f"check NATS_NKEY_SEED_FILE {tmp_path / 'other.nk'}")
    connect(server.url, fails="it wants credentials, and none are set; set NATS_CREDS")


def test_another_seed_is_used_at_the_next_connection(
    new_nats_server: NewServer, connect: Connect, tmp_path: Path
) -> None:
    before, after = new_key(), new_key()
    server = new_nats_server(config=f"authorization {{ users: [ {{ nkey: {before.public} }} ] }}")
    file = tmp_path / "seed.nk"
    bus = connect(server.url, nkey_seed_file=written(file, before.seed))
    config = tmp_path / "nats0" / "nats.conf"
    config.write_text(config.read_text().replace(before.public, after.public))
    server.stop()
    server.start()
    wait_until(lambda: "refuses" in bus.last_error, lambda: bus.last_error)
    file.unlink()
    wait_until(lambda: "cannot be read" in bus.last_error, lambda: bus.last_error)
    written(file, after.seed)
    wait_until(lambda: bus.is_connected, lambda: bus.last_error)
    echoes(bus)


def test_the_shipped_nkeys(new_nats_server: NewServer, connect: Connect, tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("RELAY", "OPERATOR", "BILLING")}
    for name, key in keys.items():
        os.environ[f"{name}_NKEY"] = key.public
    try:
        server = new_nats_server(config=f'include "{os.path.relpath(CONF / "nkeys.conf", tmp_path / "nats0")}"')
    finally:
        for name in keys:
            del os.environ[f"{name}_NKEY"]
    seed = written(tmp_path / "relay.nk", keys["RELAY"].seed)
    told: list[tuple[bool, str]] = []
    bus = connect(server.url, nkey_seed_file=seed, inbox_prefix="_INBOX.relay", told=told)
    assert b'"type"' in bus.request(Publication("$JS.API.STREAM.INFO.EMAIL_LOG", b""), 5).payload
    assert all(is_connected for is_connected, _ in told)


# -- JWTs --------------------------------------------------------------------------------------------------------------
def test_creds_that_expire_are_replaced_while_it_runs(
    new_nats_server: NewServer, connect: Connect, tmp_path: Path
) -> None:
    operator, user = Operator(), new_key()
    server = new_nats_server(config=operator.config())
    file = tmp_path / "relay.creds"
    told: list[tuple[bool, str]] = []
    bus = connect(server.url, creds_file=written(file, operator.creds(user, expires_seconds=3)), told=told)
    echoes(bus)
    # In the second in which it expires the server may let it in once more, for a moment.
    said = f"it refuses the credentials of NATS_CREDS {file}: its JWT expired at "
    wait_until(lambda: any(not is_connected and said in why for is_connected, why in told), lambda: told)
    written(file, operator.creds(user))
    wait_until(lambda: bus.is_connected, lambda: bus.last_error)
    echoes(bus)


def test_creds_of_others(new_nats_server: NewServer, connect: Connect, tmp_path: Path) -> None:
    operator, user, other = Operator(), new_key(), new_key()
    server = new_nats_server(config=operator.config())
    mixed = operator.creds(user).replace(user.seed, other.seed)
    connect(server.url, creds_file=written(tmp_path / "mixed.creds", mixed), fails="are not the same user's")
    stranger = Operator().creds(user)
    connect(server.url, creds_file=written(tmp_path / "other.creds", stranger), fails="it refuses what we log in with")


def test_a_revoked_user(new_nats_server: NewServer, connect: Connect, tmp_path: Path) -> None:
    operator, user = Operator(), new_key()
    server = new_nats_server(config=operator.config())
    bus = connect(server.url, creds_file=written(tmp_path / "relay.creds", operator.creds(user)))
    config = tmp_path / "nats0" / "nats.conf"
    rest = config.read_text()
    rest = rest[: rest.index("operator:")] + "\n" + rest[rest.index("jetstream {") :]
    config.write_text(rest + operator.config(**{user.public: 4_000_000_000}))
    server.stop()
    server.start()
    wait_until(lambda: "it refuses what we log in with" in bus.last_error, lambda: bus.last_error)


def test_permissions_of_a_jwt_are_told(new_nats_server: NewServer, connect: Connect, tmp_path: Path) -> None:
    operator, user = Operator(), new_key()
    server = new_nats_server(config=operator.config())
    creds = operator.creds(user, sub={"allow": ["_INBOX.relay.>"]}, pub={"allow": ["a.>"]})
    file = written(tmp_path / "relay.creds", creds)
    bus = connect(server.url, creds_file=file, inbox_prefix="_INBOX.relay")
    assert bus.inbox_prefix.startswith("_INBOX.relay.")
    told: list[tuple[bool, str]] = []
    deaf = connect(server.url, creds_file=file, told=told)
    wait_until(lambda: told[-1][0] is False, lambda: told)
    assert (
        told[-1][1]
        == "this user may not subscribe to _INBOX.>, so no answer arrives; grant it, or set NATS_INBOX_PREFIX"
    )
    with pytest.raises(Exception, match="NATS_INBOX_PREFIX"):
        deaf.request(Publication("a.b", b""), 5)


# -- passwords and tokens ----------------------------------------------------------------------------------------------
def test_a_password_from_a_file_may_change(new_nats_server: NewServer, connect: Connect, tmp_path: Path) -> None:
    server = new_nats_server(config='authorization { user: "relay", password: "first" }')
    file = tmp_path / "password"
    bus = connect(server.url, user="relay", password_file=written(file, "first\n"))
    echoes(bus)
    config = tmp_path / "nats0" / "nats.conf"
    config.write_text(config.read_text().replace("first", "second"))
    server.stop()
    server.start()
    wait_until(lambda: "password was refused" in bus.last_error, lambda: bus.last_error)
    assert bus.last_error.endswith(f"check NATS_USER and NATS_PASSWORD_FILE {file}")
    written(file, "second")
    wait_until(lambda: bus.is_connected, lambda: bus.last_error)


def test_a_password_and_a_token(new_nats_server: NewServer, connect: Connect, tmp_path: Path) -> None:
    server = new_nats_server(config='authorization { user: "relay", password: "right" }')
    echoes(connect(server.url, user="relay", password="right"))
    echoes(connect(server.url.replace("//", "//relay:right@")))
    wrong = connect(server.url, user="relay", password="wr0ng-secret", fails="password was refused; check NATS_USER")
    assert "secret" not in wrong.last_error
    server = new_nats_server(config='authorization { token: "the-token" }')
    echoes(connect(server.url, token_file=written(tmp_path / "token", "the-token\n")))


# -- TLS ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody else knows."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    """The server's."""
    return authority.issue("server", "localhost", "127.0.0.1")


def tls(certificate: Certificate, *more: str) -> str:
    """A server's configuration."""
    files = (f'cert_file: "{certificate.cert}"', f'key_file: "{certificate.key}"', "timeout: 5")
    return "tls {\n" + "\n".join((*files, *more)) + "\n}\n"


@pytest.mark.parametrize("scheme", ["tls", "nats"])
@pytest.mark.parametrize("more", [(), ("handshake_first: true",)], ids=["upgraded", "first"])
def test_tls_carries_load_and_large_messages_over_reconnects(
    new_nats_server: NewServer,
    connect: Connect,
    authority: Authority,
    certificate: Certificate,
    caplog: pytest.LogCaptureFixture,
    scheme: str,
    more: tuple[str, ...],
) -> None:
    server = new_nats_server(config=tls(certificate, *more))
    url = server.url.replace("nats:", f"{scheme}:")
    bus = connect(url, ca_file=str(authority.file), tls_first=bool(more))
    assert bus._nc._transport._io_writer.get_extra_info("ssl_object") is not None
    bus.subscribe("access.load", "q", lambda msg: bus.publish(Publication(msg.reply_subject, msg.payload)))
    for _ in range(3):
        mails = [Publication("access.load", os.urandom(4000)) for _ in range(2000)]
        answers = bus.request_all(mails, 20)
        assert [each.payload if isinstance(each, Msg) else each for each in answers] == [each.payload for each in mails]
        echoes(bus, 1_000_000)
        server.stop()
        wait_until(lambda: not bus.is_connected)
        server.start()
        assert bus.wait_connected(8), bus.last_error
    assert "asyncio" not in {record.name for record in caplog.records if record.levelno >= logging.WARNING}


def test_a_certificate_that_is_not_trusted(
    new_nats_server: NewServer, connect: Connect, authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    server = new_nats_server(config=tls(certificate))
    url = server.url.replace("nats:", "tls:")
    connect(url, fails="its certificate is not trusted: ")
    connect(server.url, fails="its certificate is not trusted: ")
    stranger = connect(url, ca_file=str(Authority(tmp_path, "stranger").file), fails="its certificate is not trusted: ")
    assert stranger.last_error.endswith("; set NATS_CA to a file with the CA that signed it")
    elsewhere = new_nats_server(config=tls(authority.issue("elsewhere", "nats.example.com")))
    connect(
        elsewhere.url.replace("nats:", "tls:"), ca_file=str(authority.file), fails="its certificate is another host's: "
    )
    old = new_nats_server(config=tls(authority.issue("old", "127.0.0.1", days=-1)))
    connect(old.url.replace("nats:", "tls:"), ca_file=str(authority.file), fails="its certificate is not valid now: ")


def test_certificates_on_both_sides_with_the_shipped_file(
    new_nats_server: NewServer, connect: Connect, authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    given = {"CERT": certificate.cert, "KEY": certificate.key, "CA": authority.file}
    for name, path in given.items():
        os.environ[f"NATS_SERVER_{name}"] = str(path)
    try:
        server = new_nats_server(config=f'include "{os.path.relpath(CONF / "tls.conf", tmp_path / "nats0")}"')
    finally:
        for name in given:
            del os.environ[f"NATS_SERVER_{name}"]
    url = server.url.replace("nats:", "tls:")
    ours = authority.issue("relay")
    ca = str(authority.file)
    echoes(connect(url, ca_file=ca, cert_file=str(ours.cert), key_file=str(ours.key)))
    connect(url, ca_file=ca, fails="it does not accept our certificate")
    strange = Authority(tmp_path, "stranger").issue("strange")
    connect(
        url,
        ca_file=ca,
        cert_file=str(strange.cert),
        key_file=str(strange.key),
        fails="it does not accept our certificate",
    )


def test_a_certificate_that_is_the_login(
    new_nats_server: NewServer, connect: Connect, authority: Authority, certificate: Certificate
) -> None:
    mapped = tls(certificate, f'ca_file: "{authority.file}"', "verify_and_map: true")
    server = new_nats_server(config=mapped + 'authorization { users: [ { user: "relay.example.com" } ] }')
    ca = str(authority.file)
    ours, other = authority.issue("mapped", "relay.example.com"), authority.issue("unmapped", "other.example.com")
    echoes(connect(server.url, ca_file=ca, cert_file=str(ours.cert), key_file=str(ours.key)))
    refused = connect(
        server.url, ca_file=ca, cert_file=str(other.cert), key_file=str(other.key), fails="it refuses what we log in"
    )
    assert refused.last_error.endswith(f"check NATS_CERT {other.cert}")


def test_a_server_that_waits_for_tls_says_nothing(
    new_nats_server: NewServer, connect: Connect, authority: Authority, certificate: Certificate
) -> None:
    config = tls(certificate, "handshake_first: true").replace("timeout: 5", "timeout: 1")
    connect(new_nats_server(config=config).url, ca_file=str(authority.file), fails="set NATS_TLS_FIRST")


def test_a_certificate_is_renewed_while_it_runs(
    new_nats_server: NewServer, connect: Connect, certificate: Certificate, authority: Authority, tmp_path: Path
) -> None:
    """The server's CA changes: what NATS_CA names is read again."""
    server = new_nats_server(config=tls(certificate))
    ca = tmp_path / "ca.pem"
    ca.write_bytes(Authority(tmp_path, "old").file.read_bytes())
    bus = connect(server.url, ca_file=str(ca), fails="not trusted")
    ca.write_bytes(authority.file.read_bytes())
    wait_until(lambda: bus.is_connected, lambda: bus.last_error)


def test_a_server_that_offers_tls_beside_clear_text(
    new_nats_server: NewServer, connect: Connect, authority: Authority, certificate: Certificate
) -> None:
    server = new_nats_server(config=tls(certificate) + "allow_non_tls: true\n")
    bus = connect(server.url.replace("nats:", "tls:"), ca_file=str(authority.file))
    assert bus._nc._transport._io_writer.get_extra_info("ssl_object") is not None


@pytest.mark.parametrize(("scheme", "ca"), [("tls", False), ("nats", True)])
def test_nothing_is_said_in_clear_when_tls_is_asked_for(
    connect: Connect, authority: Authority, scheme: str, ca: bool
) -> None:
    """Somebody in between who leaves ``tls_required`` out gets no password."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def pose() -> None:
            for _ in range(2):
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(
                        b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576,"auth_required":true}\r\n'
                    )
                    connection.settimeout(5)
                    heard.append(connection.recv(4096))

        posing = threading.Thread(target=pose, daemon=True)
        posing.start()
        connect(
            f"{scheme}://relay:secret@127.0.0.1:{port}",
            ca_file=str(authority.file) if ca else "",
            fails="it offers no TLS, which our settings ask for; nothing was said to it",
        )
        wait_until(lambda: not posing.is_alive())
    assert heard == [b"", b""]


def test_tls_first_where_the_server_speaks_first(
    nats_server: NatsServer, connect: Connect, authority: Authority
) -> None:
    connect(nats_server.url, ca_file=str(authority.file), tls_first=True, fails="it does not begin with TLS")


# -- files -------------------------------------------------------------------------------------------------------------
# The same in each of pytest's processes, which must agree on the names of tests.
USER, ACCOUNT = new_key(octets=bytes(range(32))), new_key(nkeys.PREFIX_BYTE_ACCOUNT, octets=bytes(range(1, 33)))
SECRET = USER.seed
DAMAGED = SECRET[:20] + ("A" if SECRET[20] != "A" else "B") + SECRET[21:]
WHOLE = Operator().creds(USER)


@pytest.mark.parametrize(
    ("read", "text", "told"),
    [
        (read_seed, "", "must hold the seed of one user's nkey"),
        (read_seed, "SU", "damaged"),
        (read_seed, DAMAGED, "damaged"),
        (read_seed, ACCOUNT.seed, "must hold the seed of one user's nkey"),
        (read_seed, f"{SECRET}\n{SECRET}", "one user's"),
        (read_creds, SECRET, "as `nsc generate creds` writes them"),
        (read_creds, WHOLE.replace(SECRET, DAMAGED), "damaged"),
        (read_creds, WHOLE.replace(SECRET, ACCOUNT.seed), "must hold a user's seed"),
        (read_creds, WHOLE.partition("eyJ")[0] + "xx.yy.zz" + "\n" + "-----END NATS USER JWT-----" + WHOLE, "damaged"),
        (
            read_creds,
            WHOLE.replace("eyJ", "ey\N{LATIN SMALL LETTER E WITH ACUTE}", 1),
            "as `nsc generate creds` writes them",
        ),
        (read_line, "", "must hold one line"),
        (read_line, "hush-hush\nhush-hush\n", "must hold one line"),
    ],
    ids=map(str, range(11)),
)
def test_a_file_that_is_not_what_it_should_be(
    read: Callable[[str], object], text: str, told: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "given", text)
    with pytest.raises(ConfigError) as raised:
        read(path)
    assert told in str(raised.value)
    assert path in str(raised.value)
    assert "hush" not in str(raised.value)
    assert not any(part in str(raised.value) for part in (SECRET[4:12], DAMAGED[18:24], ACCOUNT.seed[4:12]))
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("read", [read_seed, read_creds, read_line])
def test_a_file_that_cannot_be_read(read: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is no text"):
        read(str(tmp_path / "binary"))


@pytest.mark.parametrize(
    "content",
    [SECRET, f" {SECRET}\n", WHOLE, "eyJ0eXAiOiJKV1QiLCJhbGciOiJlZDI1NTE5", SECRET[:-1], SECRET[:20], f"{SECRET}A"],
    ids=["seed", "line", "creds", "jwt", "short seed", "part of a seed", "long seed"],
)
def test_what_belongs_into_a_file_is_not_told_when_it_stands_in_its_place(content: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_creds(content)
    assert str(raised.value) == "must be the path of a file, not what belongs into the file"


@pytest.mark.parametrize("read", [read_seed, read_creds, read_line])
@pytest.mark.parametrize(
    "value",
    [SECRET[3:], SECRET[:12], SECRET.lower(), f"x{SECRET}", "hush-hush", "hush/hush=", "hush.hush hush", "hush\0"],
)
def test_of_what_does_not_look_like_a_path_the_beginning_alone_is_told(
    read: Callable[[str], object], value: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        read(value)
    assert value[:3] in str(raised.value)
    assert value[3:9] not in str(raised.value)


@pytest.mark.parametrize("path", ["/run/secrets/nats", "./nats", "~/nats", "nats.creds", "conf/nats-1/relay.creds"])
def test_a_path_is_told(path: str) -> None:
    with pytest.raises(ConfigError, match=f"^{path} cannot be read: No such file"):
        read_creds(path)


def test_a_key_in_place_of_its_file_is_not_told() -> None:
    with pytest.raises(ConfigError) as raised:
        tls_context("", "cert.pem", "-----BEGIN PRIVATE KEY-----\nhush")
    assert "cert.pem" in str(raised.value)
    assert "hush" not in str(raised.value)


def test_files_of_certificates_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    whole, other = authority.issue("whole"), authority.issue("other")
    locked = authority.issue("locked", passphrase=b"secret")
    (tmp_path / "empty").write_bytes(b"")
    for files, told in (
        ((str(tmp_path / "missing"), "", ""), "NATS_CA .*missing cannot be used"),
        ((str(tmp_path / "empty"), "", ""), "NATS_CA .*empty cannot be used"),
        (("", str(whole.cert), str(other.key)), "the key is not that of the certificate"),
        (("", str(whole.cert), str(tmp_path / "missing")), "cannot be used: No such file"),
        (("", str(locked.cert), str(locked.key)), "is encrypted; give the key without a passphrase"),
    ):
        with pytest.raises(ConfigError, match=told):
            tls_context(*files)
    assert tls_context(str(authority.file), str(whole.cert), str(whole.key)).check_hostname


def test_no_secret_is_in_what_is_shown(caplog: pytest.LogCaptureFixture, connect: Connect) -> None:
    config = BusConfig("nats://u:secret@127.0.0.1:1", user="u", password="secret")
    assert "secret" not in f"{config!r} {config} {config.shown} {config.login} {Access(config).why_refused()}"
    with caplog.at_level(logging.DEBUG):
        connect("nats://u:secret@127.0.0.1:1", fails="connection refused")
    assert "secret" not in caplog.text
