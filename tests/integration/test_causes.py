"""Each reason for which a server does not serve us is named, and decides what a command does."""

import os
import re
from contextlib import contextmanager
from functools import partial
from urllib.parse import quote

import psycopg
import pytest
from confluent_kafka import KafkaError
from psycopg import sql
from sqlalchemy import text

from pipeline import causes
from pipeline.causes import Verdict
from pipeline.db import address, open_engine, transaction
from pipeline.errors import (
    ConfigurationError,
    ExitCode,
    InvariantError,
    PipelineError,
    PoisonRecordError,
    TransientError,
    from_sqlstate,
)
from pipeline.handshakes import sqlstates_of_refusal
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


def test_an_unknown_code_of_kafka_is_an_outage_and_is_not_called_busy():
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


def test_every_class_of_sqlstate_is_classified():
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


@pytest.mark.faults
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

        output = result.out + result.err
        assert result.code == code, output
        assert words in output
        assert login in output
        assert re.search(r"(127\.0\.0\.1|localhost|no-such-host\.invalid):\d+/", output), output
        assert "Traceback" not in output
        assert secured_postgres.password(login) not in output
        assert "not-the-password" not in output


def _may_not_log_in(server, user):
    server.execute("ALTER ROLE {} NOLOGIN", sql.Identifier(user))
    return server.dsn(user)


def _password_has_expired(server, user):
    server.execute("ALTER ROLE {} VALID UNTIL '2020-01-01'", sql.Identifier(user))
    return server.dsn(user)


def _no_connection_is_left(server, user):
    server.execute("ALTER ROLE {} CONNECTION LIMIT 0", sql.Identifier(user))
    return server.dsn(user)


def _no_right_to_connect(server, user):
    server.execute("CREATE DATABASE {}", sql.Identifier(user))
    server.execute("REVOKE CONNECT ON DATABASE {} FROM PUBLIC", sql.Identifier(user))
    return server.dsn(user, user)


def _library_is_missing(server, user):
    server.execute("ALTER ROLE {} SET session_preload_libraries = 'nope'", sql.Identifier(user))
    return server.dsn(user)


def _with(setting):
    def dsn(server, user):
        return server.dsn(user, options=f"-c%20{quote(setting)}")

    return dsn


REFUSED_LOGINS = [
    (_with("work_mem=much"), causes.POSTGRES_SESSION_SETTING, "22023"),
    (_with("not_there=1"), causes.POSTGRES_SESSION_SETTING, "42704"),
    (_with("shared_buffers=1GB"), causes.POSTGRES_SESSION_SETTING, "55P02"),
    (_wrong_password, causes.POSTGRES_LOGIN, "28P01"),
    (_password_has_expired, causes.POSTGRES_LOGIN, "28P01"),
    (_rejected, causes.POSTGRES_RULE, "28000"),
    (_no_rule, causes.POSTGRES_RULE, "28000"),
    (_may_not_log_in, causes.POSTGRES_NO_ROLE, "28000"),
    (_no_database, causes.POSTGRES_NO_DATABASE, "3D000"),
    (_no_right_to_connect, causes.POSTGRES_NO_DATABASE, "42501"),
    (_no_connection_is_left, causes.POSTGRES_FULL_OF_SESSIONS, "53300"),
    (_library_is_missing, causes.POSTGRES_LIBRARY, "58P01"),
]


@pytest.mark.postgres
@pytest.mark.parametrize(("broken", "cause", "code"), REFUSED_LOGINS)
def test_a_refused_login_is_recognised_in_every_language_of_the_server(
    secured_postgres, login, broken, cause, code, monkeypatch
):
    """``lc_messages`` of a German server is German, and libpq shows only the words."""
    dsn = broken(secured_postgres, login)
    with pytest.raises(PipelineError) as in_english:
        _connect(dsn)
    assert cause.what in str(in_english.value)

    monkeypatch.setattr(causes, "LIBPQ_WORDS", ())  # as if nobody could read it
    with pytest.raises(PipelineError) as unread:
        _connect(dsn)

    assert sqlstates_of_refusal(dsn) == [code]
    expected = causes.of_login([code])
    assert expected.what in str(unread.value)
    assert expected.verdict is cause.verdict
    assert type(unread.value) is type(in_english.value)
    assert expected is (causes.POSTGRES_LOGIN_RULE if code == "28000" else cause)


def _connect(dsn):
    with transaction(open_engine(dsn, application="tests")):
        pass


@pytest.mark.postgres
def test_the_code_of_the_same_refusal_is_requested_once(secured_postgres, login, monkeypatch):
    """It takes an attempt to log in, and accounts are locked after too many."""
    requests = []

    def nothing(conninfo):
        requests.append(conninfo)
        return []

    monkeypatch.setattr(causes, "LIBPQ_WORDS", ())
    monkeypatch.setattr(address, "sqlstates_of_refusal", nothing)
    engine = open_engine(_no_database(secured_postgres, login), application="tests")

    for _ in range(3):
        with pytest.raises(TransientError), transaction(engine):
            pass

    assert len(requests) == 1


@pytest.mark.postgres
def test_a_setting_that_the_login_may_not_have_is_named(secured_postgres, login):
    dsn = _with("session_replication_role=replica")(secured_postgres, login)

    with pytest.raises(ConfigurationError, match="refuses a setting for our session") as refused:
        _connect(dsn)

    assert '"session_replication_role"' in str(refused.value)


@pytest.mark.parametrize("name", ["pg-standby.bank.de", "recovery", "read-only", "timeout"])
def test_a_name_is_not_taken_for_a_cause(name):
    words = f'connection to server at "{name}" (10.0.0.1), port 5432 failed: '

    assert causes.of_libpq(words + "Connection refused") is causes.REFUSED_PORT
    assert (
        causes.of_libpq(words + f'FATAL:  database "{name}" does not exist')
        is causes.POSTGRES_NO_DATABASE
    )


@pytest.mark.postgres
def test_an_error_of_a_login_trigger_is_attributed_to_the_trigger(postgres_server_18, database):
    """Whatever its words are: PostgreSQL 17 and newer."""
    with database.connect() as owner:
        owner.execute("""
            CREATE FUNCTION public.office_hours() RETURNS event_trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF session_user <> 'postgres' THEN RAISE EXCEPTION 'password timeout'; END IF;
            END $$""")
        owner.execute(
            "CREATE EVENT TRIGGER office_hours ON login EXECUTE FUNCTION public.office_hours()"
        )
        user = f"u{os.urandom(4).hex()}"
        owner.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(user)))
    host = database.dsn.split("@")[1]

    with pytest.raises(ConfigurationError, match="code of somebody else"):
        _connect(f"postgresql://{user}:x@{host}")

    with database.connect() as owner:
        owner.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(user)))


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


@pytest.mark.faults
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

            output = result.out + result.err
            assert result.code == code, output
            assert words in output, output
            assert user in output
            assert re.search(r"(127\.0\.0\.1|localhost|no-such-host\.invalid):\d+", output), output
            assert "Traceback" not in output
            assert secured_kafka.password(user) not in output


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
