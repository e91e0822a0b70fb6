"""Test servers with a bank's settings: Kafka with SASL_SSL, SCRAM and ACLs, PostgreSQL with TLS.

``secured_kafka()`` and ``secured_postgres()`` start one each. Every change (of a password, an
ACL, a certificate, a rule of pg_hba.conf) is in force when the call returns. Both trust the same
kind of private authority: ``ca_file`` is for clients.
"""

import os
import secrets
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)
from psycopg import sql

from pipeline.sandbox.servers.postgres import PostgresServer, free_port
from tests import waiting
from tests.servers.certificates import KINDS, Certificates, Kind
from tests.servers.kafka import ADMIN_SECONDS_MAX, KafkaServer

HOST = "localhost"
"""The host names of the certificates, beside ``127.0.0.1``."""
POSTGRES_WITH_TLS = 15
"""The wheel's PostgreSQL is built without OpenSSL; this server comes from the system."""

Mechanism = Literal["SCRAM-SHA-512", "SCRAM-SHA-256"]
_MECHANISMS: Mapping[Mechanism, ScramMechanism] = {
    "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512,
    "SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256,
}
NETWORK_THREADS = 3
"""Threads of each listener; Kafka's own default."""
CLUSTER = "kafka-cluster"
RELOAD_SECONDS_MAX = 15.0


# -------------------------------------------------------------------------------------------- Kafka


class SecuredKafka(KafkaServer):
    """One Kafka node that allows only what an ACL allows.

    ``bootstrap_servers`` and ``admin`` are the superuser's: a listener without TLS or login, for
    the test itself. The product connects to ``servers()``: a listener for each kind of
    certificate, with TLS and a login by SCRAM.

    Args:
        settings: Anything for ``server.properties``, above our own.

    Attributes:
        ca_file: The authority that clients must trust.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._certificates = Certificates(self.directory)
        self.ca_file = self._certificates.ca_file
        self._ports = {kind: free_port() for kind in KINDS}
        self._passwords: dict[str, tuple[str, Mechanism]] = {}
        # More iterations each time, so that the broker's answer shows which password it has.
        self._iterations = count(4096)
        self._settings |= self._security() | dict(settings or {})

    def servers(self, certificate: Kind = "good") -> str:
        """The address of the listener that presents this kind of certificate."""
        return f"{HOST}:{self._ports[certificate]}"

    def password(self, user: str) -> str:
        """The current password of a user."""
        return self._passwords[user][0]

    def environment(self, user: str, certificate: Kind = "good") -> dict[str, str]:
        """The environment with which ``pipeline`` logs in as a user."""
        password, mechanism = self._passwords[user]
        return {
            "PIPELINE_KAFKA_BOOTSTRAP_SERVERS": self.servers(certificate),
            "PIPELINE_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "PIPELINE_KAFKA_SASL_MECHANISM": mechanism,
            "PIPELINE_KAFKA_USERNAME": user,
            "PIPELINE_KAFKA_PASSWORD": password,
            "PIPELINE_KAFKA_OPTIONS": f"ssl.ca.location={self.ca_file}",
        }

    def client(self, user: str, certificate: Kind = "good") -> dict[str, str | int | float | bool]:
        """The same for a client of librdkafka."""
        password, mechanism = self._passwords[user]
        return {
            "bootstrap.servers": self.servers(certificate),
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": mechanism,
            "sasl.username": user,
            "sasl.password": password,
            "ssl.ca.location": str(self.ca_file),
            "log_level": 0,
        }

    # ------------------------------------------------------------------------ users and rights

    def add_user(
        self, user: str, password: str | None = None, *, mechanism: Mechanism = "SCRAM-SHA-512"
    ) -> str:
        """Make a user without any right, with this or a random password; returns the password."""
        password = password or secrets.token_urlsafe(16)
        self._passwords[user] = password, mechanism
        iterations = next(self._iterations)
        info = ScramCredentialInfo(_MECHANISMS[mechanism], iterations)
        wanted = UserScramCredentialUpsertion(user, info, password.encode())
        self._done(self.admin.alter_user_scram_credentials([wanted]))
        self._until(lambda: iterations in self._known_iterations(user), f"{user} may log in")
        return password

    def set_password(self, user: str, password: str | None = None) -> str:
        """Change a user's password; open connections continue. Returns it."""
        return self.add_user(user, password, mechanism=self._passwords[user][1])

    def remove_user(self, user: str) -> None:
        """Remove a user's login; open connections continue."""
        _, mechanism = self._passwords.pop(user)
        gone = UserScramCredentialDeletion(user, _MECHANISMS[mechanism])
        self._done(self.admin.alter_user_scram_credentials([gone]))
        self._until(lambda: not self._known_iterations(user), f"{user} may not log in")

    def add_acl(
        self,
        user: str,
        *operations: str,
        topic: str | None = None,
        group: str | None = None,
        cluster: bool = False,
        prefixed: bool = False,
        deny: bool = False,
    ) -> None:
        """Allow a user something: ``add_acl("acme", "READ", "DESCRIBE", topic="Notifications")``.

        Args:
            user: Without ``User:``.
            operations: Kafka's names: READ, WRITE, DESCRIBE, CREATE …
            topic: The topic's name, or ``*``. One of topic, group and cluster is named.
            group: The group's name, or ``*``.
            cluster: The whole cluster.
            prefixed: The name is a prefix of names.
            deny: Forbid it instead.
        """
        for acl in _acls(user, operations, topic, group, cluster, prefixed, deny, AclBinding):
            self._done(self.admin.create_acls([acl]))
            self._until(lambda acl=acl: self._holds(acl), f"in force: {acl}")  # type: ignore[misc]

    def remove_acl(
        self,
        user: str,
        *operations: str,
        topic: str | None = None,
        group: str | None = None,
        cluster: bool = False,
        prefixed: bool = False,
        deny: bool = False,
    ) -> None:
        """Remove the right that ``add_acl`` gave with the same arguments."""
        for acl in _acls(user, operations, topic, group, cluster, prefixed, deny, AclBindingFilter):
            self._done(self.admin.delete_acls([acl]))
            self._until(lambda acl=acl: not self._found(acl), f"gone: {acl}")  # type: ignore[misc]

    def remove_acls_of(self, user: str) -> None:
        """Remove every right of a user."""
        everything = _filter_of(user)
        self._done(self.admin.delete_acls([everything]))
        self._until(lambda: not self._found(everything), f"{user} has no right")

    def _known_iterations(self, user: str) -> list[int]:
        answers: Any = self.admin.describe_user_scram_credentials([user])
        try:
            described = answers[user].result(ADMIN_SECONDS_MAX)
        except KafkaException:
            return []  # Kafka's answer for an unknown user
        return [info.iterations for info in described.scram_credential_infos]

    def _holds(self, acl: AclBinding) -> bool:
        return bool(
            self._found(
                AclBindingFilter(
                    *(acl.restype, acl.name, acl.resource_pattern_type, acl.principal, acl.host),
                    *(acl.operation, acl.permission_type),
                )
            )
        )

    def _found(self, wanted: AclBindingFilter) -> Sequence[Any]:
        return list(self.admin.describe_acls(wanted).result(ADMIN_SECONDS_MAX))

    # ------------------------------------------------------------------------ certificates

    def present(self, certificate: Kind) -> None:
        """Let the good listener present another certificate to new connections.

        A restart of the node presents the good one again, until this is called.
        """
        name = "listener.name.good.ssl.keystore.location"
        broker = ConfigResource(
            ConfigResource.Type.BROKER,
            "1",
            incremental_configs=[
                ConfigEntry(
                    name,
                    str(self._keystore(certificate)),
                    incremental_operation=AlterConfigOpType.SET,
                )
            ],
        )
        self._done(self.admin.incremental_alter_configs([broker]))
        wanted = ssl.PEM_cert_to_DER_cert(
            self._certificates.of(certificate).certificate.read_text()
        )
        # Each network thread of the broker loads it separately, and connections are distributed.
        turns = range(2 * NETWORK_THREADS)
        self._until(
            lambda: all(self._presented() == wanted for _ in turns),
            f"presents the {certificate} certificate",
        )

    def _presented(self) -> bytes | None:
        blind = ssl.create_default_context()
        blind.check_hostname = False
        blind.verify_mode = ssl.CERT_NONE
        with (
            socket.create_connection((HOST, self._ports["good"]), timeout=5) as plain,
            blind.wrap_socket(plain) as wrapped,
        ):
            return wrapped.getpeercert(binary_form=True)

    def _keystore(self, kind: Kind) -> Path:
        path = self.directory / f"{kind}.keystore.pem"
        path.write_text(self._certificates.of(kind).both)
        return path

    def _security(self) -> dict[str, str]:
        plain = ("PLAINTEXT", "CONTROLLER")
        wrapped = {kind: f"{kind.upper()}://{HOST}:{port}" for kind, port in self._ports.items()}
        protocols = [f"{name}:PLAINTEXT" for name in plain]
        protocols += [f"{kind.upper()}:SASL_SSL" for kind in KINDS]
        settings = {
            "listeners": ",".join([self._settings["listeners"], *wrapped.values()]),
            "advertised.listeners": ",".join(
                [self._settings["advertised.listeners"], *wrapped.values()]
            ),
            "listener.security.protocol.map": ",".join(protocols),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",  # clients of the listeners without login
            "sasl.enabled.mechanisms": ",".join(_MECHANISMS),
            # So that ``present`` may change the names in the certificate.
            "ssl.allow.dn.changes": "true",
            "ssl.allow.san.changes": "true",
        }
        for kind in KINDS:
            listener = f"listener.name.{kind}"
            settings |= {
                f"{listener}.ssl.keystore.type": "PEM",
                f"{listener}.ssl.keystore.location": str(self._keystore(kind)),
            }
            for mechanism in _MECHANISMS:
                settings[f"{listener}.{mechanism.lower()}.sasl.jaas.config"] = (
                    "org.apache.kafka.common.security.scram.ScramLoginModule required;"
                )
        return settings


def _acls(
    user: str,
    operations: Sequence[str],
    topic: str | None,
    group: str | None,
    cluster: bool,
    prefixed: bool,
    deny: bool,
    make: type[AclBinding],
) -> list[Any]:
    resources = [
        (ResourceType.TOPIC, topic),
        (ResourceType.GROUP, group),
        (ResourceType.BROKER, CLUSTER if cluster else None),
    ]
    [(kind, name)] = [(kind, name) for kind, name in resources if name is not None]
    return [
        make(
            kind,
            name,
            ResourcePatternType.PREFIXED if prefixed else ResourcePatternType.LITERAL,
            f"User:{user}",
            "*",
            AclOperation[operation],
            AclPermissionType.DENY if deny else AclPermissionType.ALLOW,
        )
        for operation in operations
    ]


def _filter_of(user: str) -> AclBindingFilter:
    anything: Any = None  # the client's types do not allow it, Kafka does
    return AclBindingFilter(
        *(ResourceType.ANY, anything, ResourcePatternType.ANY, f"User:{user}", anything),
        *(AclOperation.ANY, AclPermissionType.ANY),
    )


@contextmanager
def secured_kafka(settings: Mapping[str, str] | None = None) -> Iterator[SecuredKafka]:
    """A secured Kafka for the length of the block.

    Args:
        settings: Anything for ``server.properties``, above our own; for example
            ``connections.max.reauth.ms``, so that a changed password ends open connections.

    Raises:
        BrokerMissingError: No Java, or no jars.
    """
    with SecuredKafka(settings) as server:
        yield server


# --------------------------------------------------------------------------------------- PostgreSQL

_SUPERUSER = "host all postgres 127.0.0.1/32 scram-sha-256"
_TLS_ONLY = "hostssl all all 127.0.0.1/32 scram-sha-256"


class SecuredPostgres:
    """A PostgreSQL that requires TLS and a password, except for the superuser.

    ``server`` is the superuser's, for the test itself: ``server.dsn()``, ``server.url()``. The
    product connects with ``url(user, …)``.

    Attributes:
        server: The server; it may be stopped, killed and started.
        ca_file: The authority that clients must trust.
    """

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self._data = server.directory / "data"
        self._certificates = Certificates(server.directory)
        self.ca_file = self._certificates.ca_file
        self.ca_file.chmod(0o644)
        self._passwords: dict[str, str] = {}
        self._alter("ssl_cert_file", "presented.pem")
        self._alter("ssl_key_file", "presented.key")
        self._alter("ssl", "on")
        self._write_certificate("good")
        self.set_rules()

    def dsn(self, user: str, database: str = "postgres", **options: str) -> str:
        """The URL of a user, for libpq, psql and ``PIPELINE_DATABASE_URL``.

        Args:
            user: A user that ``add_user`` made.
            database: The database's name.
            options: libpq's, above the verification of the certificate: ``sslmode="require"``.
        """
        # libpq uses TCP for a host without a slash; the certificate has this name.
        verified = {"sslmode": "verify-full", "sslrootcert": str(self.ca_file), **options}
        query = "&".join(f"{name}={value}" for name, value in verified.items())
        login = f"{user}:{self._passwords[user]}"
        return f"postgresql://{login}@{HOST}:{self.server.port}/{database}?{query}"

    def password(self, user: str) -> str:
        """The current password of a user."""
        return self._passwords[user]

    def add_user(self, user: str, password: str | None = None) -> str:
        """Make a login without any right, with this or a random password; returns the password."""
        self.execute("CREATE ROLE {} LOGIN", sql.Identifier(user))
        return self.set_password(user, password)

    def set_password(self, user: str, password: str | None = None) -> str:
        """Change a user's password; open connections continue. Returns it."""
        password = password or secrets.token_urlsafe(16)
        self._passwords[user] = password
        self.execute("ALTER ROLE {} PASSWORD {}", sql.Identifier(user), sql.Literal(password))
        return password

    def end_connections(self, user: str) -> None:
        """End every session of a user."""
        self.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = {}",
            sql.Literal(user),
        )

    def set_rules(self, *rules: str) -> None:
        """Set the rules of pg_hba.conf after the superuser's rule; without arguments, TLS for all.

        For example ``"hostssl all app 127.0.0.1/32 reject"``. Open connections continue.
        """
        lines = [_SUPERUSER, *(rules or [_TLS_ONLY])]
        (self._data / "pg_hba.conf").write_text("\n".join(lines) + "\n")
        self._reload()

    def present(self, certificate: Kind) -> None:
        """Present another certificate to new connections."""
        self._write_certificate(certificate)
        self._reload()

    def _write_certificate(self, kind: Kind) -> None:
        made = self._certificates.of(kind)
        owner = self._data.stat()
        for source, name in ((made.certificate, "presented.pem"), (made.key, "presented.key")):
            path = self._data / name
            path.touch(mode=0o600)
            path.write_text(source.read_text())
            if path.stat().st_uid != owner.st_uid:
                # PostgreSQL refuses a key file of another owner.
                os.chown(path, owner.st_uid, owner.st_gid)

    def _reload(self) -> None:
        before = self._loaded_at()
        self.execute("SELECT pg_reload_conf()")
        waiting.until(
            lambda: self._loaded_at() > before,
            "PostgreSQL has read its configuration",
            seconds_max=RELOAD_SECONDS_MAX,
        )

    def _loaded_at(self) -> Any:
        # A new connection each time: it has the configuration of the postmaster.
        with psycopg.connect(self.server.dsn()) as connection:
            row = connection.execute("SELECT pg_conf_load_time()").fetchone()
        return row and row[0]

    def _alter(self, name: str, value: str) -> None:
        self.execute("ALTER SYSTEM SET {} = {}", sql.Identifier(name), sql.Literal(value))

    def execute(self, statement: str, *parts: sql.Composable) -> None:
        """Run a statement as the superuser; ``{}`` stands for each part."""
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*parts))


@contextmanager
def secured_postgres(settings: Mapping[str, str] | None = None) -> Iterator[SecuredPostgres]:
    """A PostgreSQL with TLS for the length of the block.

    Args:
        settings: Anything for ``postgresql.conf``.

    Raises:
        BinariesMissingError: The system has no PostgreSQL with TLS.
    """
    with PostgresServer(POSTGRES_WITH_TLS, settings=settings) as server:
        yield SecuredPostgres(server)
