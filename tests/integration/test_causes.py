"""Each reason for which a server does not serve us is named, and decides what a command does."""

import os
import re
from contextlib import contextmanager
from functools import partial

import psycopg
import pytest
from confluent_kafka import KafkaError
from sqlalchemy import text

from pipeline import causes
from pipeline.causes import Verdict
from pipeline.db import open_engine, transaction
from pipeline.errors import (
    ConfigurationError,
    ExitCode,
    InvariantError,
    PoisonRecordError,
    from_sqlstate,
)
from pipeline.sandbox.servers.postgres import free_port
from tests.commands import Commands

pytestmark = pytest.mark.timeout(300)
CONFIGURATION, UNAVAILABLE = ExitCode.CONFIGURATION, ExitCode.UNAVAILABLE


# ---------------------------------------------------------------------------------------- complete


def test_every_error_of_kafka_that_is_a_wrong_right_or_login_is_no_outage():
    names = [name for name in dir(KafkaError) if re.fullmatch(r"_?[A-Z][A-Z_]+", name)]
    assert len(names) > 150

    denied = [name for name in names if re.search("AUTHENTICATION|AUTHORIZATION|CREDENTIAL", name)]

    assert len(denied) >= 6
    for name in denied:
        assert causes.of_kafka(name, "").verdict is Verdict.MISCONFIGURED, name
    assert set(causes.KAFKA_CODES) <= set(names), "the table names codes that do not exist"


def test_a_code_of_kafka_that_no_entry_names_is_waited_for_and_not_called_busy():
    """It is named, so that somebody can look it up."""
    assert causes.of_kafka("INVALID_REQUEST", "Broker: Invalid request") is causes.KAFKA_UNEXPECTED
    assert causes.of_kafka("A_CODE_TO_COME", "") is causes.KAFKA_UNEXPECTED


@pytest.mark.parametrize(
    "words",
    [
        'definition of service "nosuch" not found',
        'invalid sslmode value: "verify-fulll"',
        'invalid port number: "99999"',
        "bad value for connect_timeout: 'abc'",
    ],
)
def test_a_parameter_that_libpq_refuses_is_no_outage(words):
    assert causes.of_libpq(words) is causes.POSTGRES_PARAMETER


def test_a_url_with_a_wrong_parameter_is_named_by_it():
    commands = Commands(database_url="postgresql://me:secret@127.0.0.1:1/x?connect_timeout=abc")

    result = commands.run("gaps", "list")

    assert result.code == CONFIGURATION
    assert "bad value for connect_timeout: 'abc'" in result.err
    assert "secret" not in result.err


@pytest.mark.parametrize("of", [partial(causes.of_kafka, "_SSL"), causes.of_libpq])
@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("tlsv13 alert certificate required: SSL alert number 116", causes.WANTS_OUR_CERTIFICATE),
        ("sslv3 alert bad certificate", causes.WANTS_OUR_CERTIFICATE),
        ("tlsv1 alert unknown ca", causes.WANTS_OUR_CERTIFICATE),
        ("tlsv1 alert protocol version", causes.NO_COMMON_TLS),
        ("sslv3 alert handshake failure", causes.NO_COMMON_TLS),
    ],
)
def test_an_alert_about_our_side_of_tls_is_not_taken_for_a_wrong_certificate_of_the_server(
    of, words, cause
):
    """OpenSSL's words: ``ssl/ssl_stat.c``."""
    assert of(f"SSL handshake failed: error:0A000412:SSL routines::{words}") is cause


def test_every_class_of_sqlstate_is_sorted():
    """By psycopg's list, which is PostgreSQL's appendix A."""
    codes = {
        error.sqlstate
        for error in vars(psycopg.errors).values()
        if isinstance(error, type) and issubclass(error, psycopg.Error) and error.sqlstate
    }
    assert len(codes) > 200

    for code in sorted(codes):
        cause = causes.of_sqlstate(code)
        error = from_sqlstate(code, "a text")
        if cause is None:
            assert isinstance(error, InvariantError | PoisonRecordError) or code == "55P03", code
        if code == "57P04":  # database_dropped: it does not come back
            assert cause is causes.POSTGRES_NO_DATABASE
        elif code[:2] in {"08", "53", "57", "58"}:
            assert cause is not None
            assert cause.verdict is Verdict.OUTAGE, code
        if code[:2] == "28":
            assert cause is not None
            assert cause.verdict is Verdict.MISCONFIGURED, code


# -------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def login(secured_postgres):
    """A login of this test's own."""
    user = f"u{os.urandom(4).hex()}"
    secured_postgres.add_user(user)
    yield user
    secured_postgres.set_rules()
    secured_postgres.present("good")


def _wrong_password(server, user):
    return server.dsn(user).replace(server.password(user), "not-the-password")


def _rejected(server, user):
    server.set_rules(f"hostssl all {user} 127.0.0.1/32 reject")
    return server.dsn(user)


def _no_rule(server, user):
    server.set_rules("hostssl all somebody_else 127.0.0.1/32 scram-sha-256")
    return server.dsn(user)


def _no_database(server, user):
    return server.dsn(user, "not_there")


def _without_tls(server, user):
    return server.dsn(user, sslmode="disable")


def _presents(certificate):
    def url(server, user):
        server.present(certificate)
        return server.dsn(user)

    return url


def _no_ca_file(server, user):
    return server.dsn(user, sslrootcert="/not/there.pem")


def _no_listener(server, user):
    return server.dsn(user).replace(f":{server.server.port}/", f":{free_port()}/")


def _unknown_host(server, user):
    return server.dsn(user, sslmode="require").replace("@localhost:", "@no-such-host.invalid:")


POSTGRES = [
    (_wrong_password, CONFIGURATION, "refused the login"),
    (_rejected, CONFIGURATION, "pg_hba.conf"),
    (_no_rule, CONFIGURATION, "pg_hba.conf"),
    (_no_database, CONFIGURATION, "no such database"),
    (_without_tls, CONFIGURATION, "pg_hba.conf"),
    (_presents("expired"), CONFIGURATION, "has expired"),
    (_presents("other_host"), CONFIGURATION, "another host name"),
    (_presents("unknown_ca"), CONFIGURATION, "an authority that this program does not trust"),
    (_no_ca_file, CONFIGURATION, "cannot be read here"),
    (_no_listener, UNAVAILABLE, "refuses connections"),
    (_unknown_host, UNAVAILABLE, "cannot be resolved"),
]


@pytest.mark.postgres
@pytest.mark.parametrize(("broken", "code", "words"), POSTGRES)
def test_a_connection_to_postgresql_that_fails_is_named(
    secured_postgres, login, broken, code, words
):
    """With host, port and user, and no password."""
    url = broken(secured_postgres, login)
    commands = Commands(
        database_url=url,
        kafka_bootstrap_servers="127.0.0.1:1",
        kafka_security_protocol="PLAINTEXT",
    )

    # The others open their database in the same way; `check` also waits for Kafka, so it is one.
    for arguments in (["status"], ["check"])[: 2 if broken is _wrong_password else 1]:
        result = commands.run(*arguments)

        said = result.out + result.err
        assert result.code == code, said
        assert words in said
        assert login in said
        assert re.search(r"(127\.0\.0\.1|localhost|no-such-host\.invalid):\d+/", said), said
        assert "Traceback" not in said
        assert secured_postgres.password(login) not in said
        assert "not-the-password" not in said


# ------------------------------------------------------------------------------------------- Kafka


@pytest.fixture
def acme(secured_kafka):
    """A user of this test's own, with all rights that a worker needs."""
    user = f"acme-{os.urandom(4).hex()}"
    topic, group = f"notifications-{user}", f"group-{user}"
    secured_kafka.add_user(user)
    secured_kafka.create_topic(topic, partitions=2)
    secured_kafka.add_acl(user, "READ", "DESCRIBE", topic=topic)
    secured_kafka.add_acl(user, "READ", group=group)
    yield user, topic, group
    secured_kafka.remove_acls_of(user)


@contextmanager
def _changed(kafka, user, how):
    environment = kafka.environment(user)
    match how:
        case "password":
            environment["PIPELINE_KAFKA_PASSWORD"] = "not-the-password"
        case "mechanism":
            environment["PIPELINE_KAFKA_SASL_MECHANISM"] = "PLAIN"
        case "no tls":
            environment["PIPELINE_KAFKA_SECURITY_PROTOCOL"] = "SASL_PLAINTEXT"
        case "no ca":
            environment["PIPELINE_KAFKA_OPTIONS"] = ""
        case "group":
            kafka.remove_acl(user, "READ", group=f"group-{user}")
        case "port":
            environment["PIPELINE_KAFKA_BOOTSTRAP_SERVERS"] = f"127.0.0.1:{free_port()}"
        case "host":
            environment["PIPELINE_KAFKA_BOOTSTRAP_SERVERS"] = "no-such-host.invalid:9093"
        case certificate:
            environment = kafka.environment(user, certificate)
    yield {name.removeprefix("PIPELINE_").lower(): value for name, value in environment.items()}


KAFKA = [
    ("password", CONFIGURATION, "refused the login"),
    ("mechanism", CONFIGURATION, "SASL mechanism"),
    ("no tls", CONFIGURATION, "requires TLS on this port"),
    ("no ca", CONFIGURATION, "an authority that this program does not trust"),
    ("expired", CONFIGURATION, "has expired"),
    ("other_host", CONFIGURATION, "another host name"),
    ("unknown_ca", CONFIGURATION, "an authority that this program does not trust"),
    ("group", CONFIGURATION, "consumer group 'group-acme"),
    ("port", UNAVAILABLE, "refuses connections"),
    ("host", UNAVAILABLE, "cannot be resolved"),
]


@pytest.mark.kafka
@pytest.mark.parametrize(("how", "code", "words"), KAFKA)
def test_a_connection_to_kafka_that_fails_is_named(secured_kafka, acme, database, how, code, words):
    """By `check`, and by ingest where it does not wait for an outage."""
    user, topic, group = acme
    with _changed(secured_kafka, user, how) as settings:
        commands = Commands(database_url=database.url, topics=topic, group_id=group, **settings)
        for arguments in (["check"], ["ingest", "--until-end"]):
            if code is UNAVAILABLE and arguments == ["ingest", "--until-end"]:
                continue  # waits a minute; the wait is tested with PostgreSQL
            result = commands.run(*arguments)

            said = result.out + result.err
            assert result.code == code, said
            assert words in said, said
            assert user in said
            assert re.search(r"(127\.0\.0\.1|localhost|no-such-host\.invalid):\d+", said), said
            assert "Traceback" not in said
            assert secured_kafka.password(user) not in said


def test_a_broker_that_ends_within_a_handshake_is_an_outage():
    """As in a restart: nothing is configured wrongly, and a worker must not end with 78."""
    for words in (
        "Disconnected: SSL connection closed by peer (after 0ms in state SSL_HANDSHAKE)",
        "Disconnected while requesting ApiVersion: might be caused by incorrect security.protocol "
        "configuration (connecting to a SSL listener?) or broker version is < 0.10",
    ):
        assert causes.of_kafka("_TRANSPORT", words).verdict is Verdict.OUTAGE


@pytest.mark.postgres
def test_the_message_of_a_foreign_trigger_is_not_repeated(database):
    """It may raise any code, with a value of the row."""
    engine = open_engine(database.url, application="test")
    raising = "DO $$ BEGIN RAISE 'DE00 canary 0000' USING ERRCODE = '42501'; END $$"

    with pytest.raises(ConfigurationError) as refused, transaction(engine) as db:
        db.execute(text(raising))

    engine.dispose()
    assert "42501" in str(refused.value)
    assert "canary" not in str(refused.value)
