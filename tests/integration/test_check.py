"""What `pipeline check` finds, on real servers, with something wrong on purpose."""

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline import catalogue
from pipeline.db import open_engine
from pipeline.health.check import Promise, PromiseState, promise_statuses, run_checks
from pipeline.health.check.database import _server, _session, check_database, is_loopback
from pipeline.health.check.kafka import kafka_tls
from pipeline.health.check.promises import NOT_OF_AN_INSTALLATION
from pipeline.projectors.orders import orders
from pipeline.sandbox.servers.postgres import PostgresServer, free_port
from pipeline.schema.migrate import migrate
from pipeline.schema.roles import ROLES
from pipeline.settings import Settings
from tests.commands import Commands, InProcess, on_mock
from tests.conftest import OLDEST
from tests.given import order_event

TOPIC = "Notifications"


def found(url, servers, topic=TOPIC, **settings):
    """The results of a check of both sides."""
    chosen = Settings(
        database_url=url,
        kafka_bootstrap_servers=servers,
        kafka_security_protocol="PLAINTEXT",
        topics=topic,
        **settings,
    )
    return list(run_checks(chosen, catalogue.load()))


def found_in(url):
    """The results of a check of the database."""
    engine = open_engine(url, application="test")
    try:
        return list(check_database(engine, catalogue.load()))
    finally:
        engine.dispose()


def of(results, level):
    return [str(result) for result in results if result.level == level]


def status_of(results, promise):
    """The state of a promise by these results."""
    return next(status for status in promise_statuses(results) if status.promise is promise)


def contains(texts, part):
    return any(part in text for text in texts)


@pytest.fixture
def broker(mock_broker):
    mock_broker.create_topic(TOPIC, 2)
    return mock_broker


@pytest.fixture
def check(given, broker):
    """Check this test's database against its broker."""
    return lambda **settings: found(given.database.dsn, broker.bootstrap_servers, **settings)


# ----------------------------------------------------------------------------------------- all well


@pytest.mark.both_postgres
def test_an_intact_installation_has_no_problem(given, kafka, topic):
    name = topic(3, config={"retention.ms": str(7 * 86_400_000)})

    results = found(given.database.dsn, kafka.bootstrap_servers, topic=name)

    assert of(results, "error") == []
    well = of(results, "ok")
    assert contains(well, "PostgreSQL 1")
    assert contains(well, "schema is current")
    assert contains(well, "append-only triggers on the log and its 0 segments")
    assert contains(well, "refilled after TRUNCATE")
    assert contains(well, f"topic {name}: has 3 partitions")
    assert contains(well, f"topic {name}: keeps its records for 7 days")
    assert contains(well, "group pipeline may be used")
    assert {status.promise for status in promise_statuses(results)} == set(
        Promise
    ) - NOT_OF_AN_INSTALLATION
    assert {status.state for status in promise_statuses(results)} <= {
        PromiseState.HOLDS,
        PromiseState.AT_RISK,
    }


def test_a_setting_that_a_broker_does_not_report_is_no_error_and_no_guarantee(given, check):
    given([order_event("NEW", at=1)])
    given.execute("UPDATE pipeline.consumer_offsets SET next_offset = 0, topic_id = NULL")

    results = check()

    assert of(results, "error") == []
    unreported = of(results, "unknown")
    for thing in ("retention.ms", "cleanup.policy", "max.message.bytes", "topic ids"):
        assert contains(unreported, thing)
    memory = status_of(results, Promise.BOUNDED_MEMORY)
    assert memory.state is PromiseState.NOT_KNOWN
    [reason] = memory.reasons
    assert reason.startswith(f"topic {TOPIC}: ")
    assert "max.message.bytes" in reason


# ----------------------------------------------------------------------------------------- database


@pytest.mark.both_postgres
@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        ("ALTER TABLE pipeline.events DISABLE TRIGGER append_only", "pipeline.events can be"),
        ("DROP TRIGGER append_only ON pipeline_segments.{segment}", "{segment} can be changed"),
        (
            "DROP TRIGGER refill_after_truncate ON upvest.orders",
            "orders: table upvest.orders is not refilled",
        ),
        (
            "UPDATE pipeline.projectors SET state = 'broken', problem = 'x' "
            "WHERE projector = 'orders'",
            "orders: broken, so it is halted: x",
        ),
    ],
    ids=["parent", "segment", "truncate", "broken"],
)
def test_a_missing_safeguard_is_an_error(given, harm, expected):
    given([order_event("NEW", at=1)]).project(*catalogue.load().models)
    segment = given.scalar("SELECT segment FROM pipeline.segments")
    given.execute(harm.format(segment=segment))

    [wrong] = of(found_in(given.database.url), "error")

    assert expected.format(segment=segment) in wrong


def test_a_read_model_of_another_definition_is_a_warning(given):
    given([order_event("NEW", at=1)]).project(*catalogue.load().models)
    given.execute("UPDATE pipeline.projectors SET fingerprint = 'x' WHERE projector = 'orders'")

    results = found_in(given.database.url)

    assert contains(of(results, "warning"), "orders: stale: its definition has changed")
    assert status_of(results, Promise.CONVERGENCE).state is PromiseState.AT_RISK


@pytest.fixture
def role(given) -> Iterator[tuple[str, str]]:
    """The prefix of this database's roles, and the URL of a login that may ingest and project."""
    prefix = f"c{secrets.token_hex(4)}_"
    migrate(given.database.url, with_roles=True, role_prefix=prefix)
    given.execute(f"CREATE ROLE {prefix}login LOGIN PASSWORD 'x'")
    given.execute(f"GRANT {prefix}ingest, {prefix}project TO {prefix}login")
    host = given.database.dsn.rpartition("@")[2]
    yield prefix, f"postgresql+psycopg://{prefix}login:x@{host}"
    for name in (*ROLES, "login"):
        given.execute(f"DROP OWNED BY {prefix}{name}")
    for name in (*ROLES, "login"):
        given.execute(f"DROP ROLE {prefix}{name}")


def test_a_role_with_just_enough_rights_cannot_change_the_log(role):
    results = found_in(role[1])

    assert of(results, "error") == []
    assert contains(of(results, "ok"), "append-only for this role")


def test_rights_that_are_missing_are_named(given, role):
    prefix, url = role
    given.execute(f"REVOKE INSERT ON pipeline.events FROM {prefix}ingest")
    given.execute(f"REVOKE DELETE ON upvest.orders FROM {prefix}project")
    given.execute(f"REVOKE EXECUTE ON FUNCTION pipeline.make_segment FROM {prefix}ingest")

    missing = of(found_in(url), "error")

    assert missing == [
        "database: this role lacks rights to ingest: INSERT on pipeline.events",
        "database: this role lacks rights to ingest: EXECUTE on pipeline.make_segment",
        "database: this role lacks rights to project: DELETE on upvest.orders",
    ]


def test_a_login_that_may_only_read_has_no_purpose(given, role):
    prefix, url = role
    given.execute(f"REVOKE {prefix}ingest, {prefix}project FROM {prefix}login")
    given.execute(f"GRANT USAGE ON SCHEMA pipeline TO {prefix}login")
    given.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA pipeline TO {prefix}login")

    assert of(found_in(url), "error") == [
        "database: this role has neither the rights to ingest nor the rights to project"
    ]


def test_an_analyst_without_limits_is_a_warning(given, check, role):
    """Settings of a role are not inherited by the logins that have it."""
    prefix, _ = role
    given.execute(f"GRANT {prefix}personal_data TO {prefix}login")
    given.execute(f"ALTER ROLE {prefix}login SET statement_timeout = '5min'")

    [warning] = [text for text in of(check(), "warning") if "may block others" in text]

    assert f"{prefix}login" in warning
    assert "default_transaction_read_only, idle_in_transaction_session_timeout" in warning
    for name in ("default_transaction_read_only = on", "idle_in_transaction_session_timeout = 1"):
        given.execute(f"ALTER ROLE {prefix}login SET {name}")
    assert not contains(of(check(), "warning"), "may block others")


@pytest.mark.parametrize(
    ("host", "near"),
    [
        *(("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True)),
        *(("/run/postgresql", True), ("", True), ("10.0.0.1", False), ("db.example", False)),
    ],
)
def test_a_host_is_local_only_if_the_connection_does_not_leave_the_machine(host, near):
    assert is_loopback(host) is near


@pytest.mark.parametrize(
    ("servers", "protocol", "level"),
    [
        ("localhost:9092,127.0.0.1:9093", "PLAINTEXT", "ok"),
        ("localhost:9092,kafka.example:9092", "PLAINTEXT", "warning"),
        ("kafka.example:9092", "SASL_PLAINTEXT", "warning"),
        ("kafka.example:9092", "SASL_SSL", "ok"),
    ],
)
def test_kafka_without_tls_over_the_network_is_a_warning(servers, protocol, level):
    assert kafka_tls(servers, protocol).level == level


# -------------------------------------------------------------------------------------------- kafka


def test_a_missing_topic_is_an_error_and_the_existing_topics_are_named(check):
    [result] = [result for result in check(topic="Nonsense") if result.level == "error"]

    assert "Kafka has no topic Nonsense" in result.problem.what
    assert TOPIC in result.problem.fix
    assert result.exit_code == 78


def test_a_missing_topic_puts_no_guarantee_about_memory_at_risk(check):
    results = check(topic=f"{TOPIC},Nonsense")

    reasons = status_of(results, Promise.BOUNDED_MEMORY).reasons
    assert contains(status_of(results, Promise.NO_SILENT_LOSS).reasons, "Nonsense")
    assert not contains(reasons, "Nonsense")


def test_dead_letters_and_bad_records_are_warnings_with_the_commands_that_show_them(given, check):
    broken = order_event("NEW", at=1, order="bad", cash_amount="12,5")
    given([broken, b"{", b"{", b"\xff"]).project(orders)

    problems = [result.problem for result in check() if result.level == "warning"]

    [letters] = [problem for problem in problems if "dead-letters list" in problem.fix]
    [bad] = [problem for problem in problems if problem.fix == "run `pipeline events --bad`"]
    assert (letters.subject, bad.subject) == ("orders", f"topic {TOPIC}")
    assert letters.what.startswith("it has 1 dead letter: ")
    assert bad.what.startswith("3 records of the last hour could not be decoded: 2 not JSON, ")


def test_the_text_of_an_unavailable_database_is_shown_once(broker, pipeline):
    port = free_port()
    commands = Commands(
        database_url=f"postgresql://nobody@127.0.0.1:{port}/none",
        kafka_bootstrap_servers=broker.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
        topics=TOPIC,
    )

    result = pipeline(commands, "check")

    assert result.code == 69
    assert result.out.count(f"127.0.0.1:{port}") == 1
    assert "The log is faithful: the database does not answer, see above" in result.out
    assert "1 error. Guarantees: " in result.err


def test_short_retention_and_compaction_are_warnings(given, kafka, topic):
    name = topic(config={"retention.ms": "3600000", "cleanup.policy": "compact,delete"})

    warnings = of(found(given.database.dsn, kafka.bootstrap_servers, topic=name), "warning")

    assert contains(warnings, "for 1 hour, but PIPELINE_LONGEST_OUTAGE_HOURS is 3 days")
    assert contains(warnings, "is compacted")


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ("cluster_id = 'another'", "read from Kafka cluster another"),
        (
            "next_offset = 99, first_offset = 0",
            "expected to continue at offset 99, found a topic that ends at 0",
        ),
    ],
)
def test_another_cluster_or_topic_than_was_read_is_an_error(given, check, recorded, expected):
    given([order_event("NEW", at=1)])
    given.execute(f"UPDATE pipeline.consumer_offsets SET {recorded}")

    wrong = of(check(), "error")

    assert contains(wrong, expected)


def test_records_that_kafka_has_deleted_unread_are_an_error(given, check, broker):
    given([order_event("NEW", at=1)])
    _produce(broker, 10)
    broker.delete_records(TOPIC, 0, 7)

    [deleted] = errors_of(check())
    given.execute("UPDATE pipeline.consumer_offsets SET problem = 'a gap', problem_fix = 'accept'")
    [halted] = errors_of(check())

    what = "Kafka's retention has deleted 6 offsets from 1 on before they were read"
    assert deleted.what == halted.what == what
    assert (deleted.subject, halted.subject) == ("Notifications:0", "Notifications:0")
    assert deleted.fix.startswith("start `pipeline run`")
    assert halted.fix.endswith("to continue without them: `pipeline gaps accept Notifications:0`")


def errors_of(results):
    return [result.problem for result in results if result.level == "error"]


def _produce(broker, records):
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
    for _ in range(records):
        producer.produce(TOPIC, b"{}", partition=0)
    producer.flush()


def test_a_recreated_topic_is_recognised_by_its_id(given, kafka, topic):
    name = topic()
    given([order_event("NEW", at=1)], topic=name)
    given.execute("UPDATE pipeline.consumer_offsets SET topic_id = 'older', next_offset = 0")

    wrong = of(found(given.database.dsn, kafka.bootstrap_servers, topic=name), "error")

    [problem] = wrong
    assert problem.startswith(f"{name}:0: expected topic id older, found ")
    assert "the topic was deleted and recreated" in problem


def test_a_group_that_feeds_another_database_is_an_error(check, broker):
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "pipeline"})
    other = "6f5b4f5e-5d8f-4c40-8a4b-7d3a1f6d0a11"
    coordinates = TopicPartition(TOPIC, 0, 0, f"pipeline:{other}")
    consumer.commit(offsets=[coordinates], asynchronous=False)
    consumer.close()

    assert contains(of(check(), "error"), f"also feeds database {other}")


def test_a_request_to_a_coordinator_that_moves_is_repeated(check, broker):
    offset_fetch, not_coordinator = 9, 16
    broker.push_errors(offset_fetch, not_coordinator)

    assert contains(of(check(), "ok"), "group pipeline may be used")


# --------------------------------------------------------------------------------------- guarantees


def test_retention_shorter_than_the_planned_outage_puts_silent_loss_at_risk(given, kafka, topic):
    name = topic(config={"retention.ms": "86400000"})

    results = found(given.database.dsn, kafka.bootstrap_servers, topic=name)
    planned_less = found(
        given.database.dsn, kafka.bootstrap_servers, topic=name, longest_outage_hours=24
    )

    loss = status_of(results, Promise.NO_SILENT_LOSS)
    assert loss.state is PromiseState.AT_RISK
    assert contains(loss.reasons, name)
    assert contains(loss.reasons, "for 1 day, but PIPELINE_LONGEST_OUTAGE_HOURS is 3 days")
    assert not contains(
        status_of(planned_less, Promise.NO_SILENT_LOSS).reasons, "PIPELINE_LONGEST_OUTAGE_HOURS"
    )


def test_the_risky_settings_of_a_real_topic_are_reported(given, kafka, topic):
    name = topic(
        config={
            "unclean.leader.election.enable": "true",
            "retention.bytes": "1000000",
            "max.message.bytes": "20000000",
            "cleanup.policy": "compact,delete",
        }
    )

    results = found(given.database.dsn, kafka.bootstrap_servers, topic=name)

    loss = status_of(results, Promise.NO_SILENT_LOSS).reasons
    for reason in (
        "unclean.leader.election",
        "at most 1,000,000 bytes",
        "compacted",
        "one replica",
    ):
        assert contains(loss, reason)
    [memory] = status_of(results, Promise.BOUNDED_MEMORY).reasons
    assert "20,000,000 bytes" in memory


@pytest.mark.both_postgres
def test_a_postgresql_that_may_lose_commits_puts_what_depends_on_them_at_risk(given):
    durable = {name: given.scalar(f"SHOW {name}") for name in ("fsync", "full_page_writes")}

    results = found_in(given.database.url)

    for promise in (Promise.FAITHFUL_LOG, Promise.ONE_EFFECT, Promise.ONE_PROJECTION):
        reasons = status_of(results, promise).reasons
        assert {
            name: "off" if contains(reasons, f"{name} is off") else "on" for name in durable
        } == durable


@pytest.mark.parametrize(
    ("setting", "promise", "expected"),
    [
        ("synchronous_commit = off", Promise.ONE_EFFECT, "synchronous_commit is off"),
        ("password_encryption = md5", Promise.SECRECY, "password_encryption is md5"),
        ("log_min_messages = error", Promise.SECRECY, "(log_min_messages is error)"),
    ],
)
def test_a_weaker_setting_of_the_database_is_a_risk(given, setting, promise, expected):
    given.execute(f'ALTER DATABASE "{given.database.name}" SET {setting}')
    given.engine.dispose()

    status = status_of(found_in(given.database.url), promise)

    assert status.state is PromiseState.AT_RISK
    assert contains(status.reasons, expected)


def test_a_setting_that_this_program_does_not_know_is_a_warning():
    result = _session(["work_mem", "auto_explain.log_analyze", "brand_new"])

    assert result.level == "warning"
    assert "does not know: brand_new" in str(result)


def test_a_missing_safeguard_breaks_only_its_promise(given):
    given.execute("DROP TRIGGER refill_after_truncate ON upvest.orders")

    results = found_in(given.database.url)

    broken = [
        status.promise
        for status in promise_statuses(results)
        if status.state is PromiseState.BROKEN
    ]
    assert broken == [Promise.DISPOSABLE]


def test_no_promise_is_reported_as_kept_while_its_server_is_unavailable(database, broker):
    nobody = f"postgresql://u:p@127.0.0.1:{free_port()}/d"

    results = found(nobody, broker.bootstrap_servers)

    held = {
        status.promise for status in promise_statuses(results) if status.state is PromiseState.HOLDS
    }
    assert held == set()
    assert status_of(results, Promise.ONE_WRITER).state is PromiseState.NOT_KNOWN


# ------------------------------------------------------------------------------------------- TLS

NAMED = "db.example"
"""The name in the certificate, which the tests' connections name too, for a loopback address."""


@pytest.fixture(scope="module")
def tls_postgres(tmp_path_factory) -> Iterator[tuple[PostgresServer, Path]]:
    """The system's PostgreSQL, with a certificate of its own; and that certificate."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "server.crt", folder / "server.key"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", f"/CN={NAMED}", "-addext", f"subjectAltName=DNS:{NAMED}"]
    subprocess.run(
        [*request, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    server = PostgresServer(OLDEST)
    try:
        server.start()  # makes its folder, which its account owns
        for path in (certificate, key):
            placed = server.directory / path.name
            shutil.copy(path, placed)
            owner = (server.directory / "password").stat()
            os.chown(placed, owner.st_uid, owner.st_gid)
            placed.chmod(0o600)
        with psycopg.connect(server.dsn(), autocommit=True) as db:
            for name, value in (
                ("ssl_cert_file", server.directory / certificate.name),
                ("ssl_key_file", server.directory / key.name),
                ("ssl", "on"),
                ("log_min_messages", "fatal"),
            ):
                db.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
        server.restart()
        yield server, certificate
    finally:
        server.close()


@pytest.mark.parametrize("pg_version", [OLDEST])  # the wheel's PostgreSQL knows no TLS
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
@pytest.mark.parametrize(
    ("parameters", "state", "expected"),
    [
        ("sslmode=disable", PromiseState.AT_RISK, "sslmode=disable, and no TLS to db.example"),
        (
            "sslmode=prefer",
            PromiseState.AT_RISK,
            "but sslmode=prefer does not verify that the server is",
        ),
        (
            "sslmode=require&channel_binding=require",
            PromiseState.AT_RISK,
            "sslmode=require does not",
        ),
        (
            "sslmode=verify-full&channel_binding=disable",
            PromiseState.AT_RISK,
            "channel_binding=disable",
        ),
        ("sslmode=verify-full&sslrootcert={certificate}", PromiseState.HOLDS, None),
    ],
)
def test_tls_below_verify_full_puts_secrets_at_risk(
    pg_version, tls_postgres, parameters, state, expected
):
    server, certificate = tls_postgres
    root = "" if "{certificate}" in parameters else "&sslrootcert={certificate}"
    requested = (parameters + root).format(certificate=certificate)
    address = server.url().replace("127.0.0.1", NAMED)
    engine = open_engine(f"{address}?hostaddr=127.0.0.1&{requested}", application="test")

    results = list(_server(engine))

    engine.dispose()
    secrecy = status_of(results, Promise.SECRECY)
    assert secrecy.state is state
    assert not secrecy.reasons if expected is None else contains(secrecy.reasons, expected)
    # And with fsync on, as a PostgreSQL comes, commits are worth what they promise.
    assert status_of(results, Promise.ONE_EFFECT).state is PromiseState.HOLDS


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def pipeline(monkeypatch, capsys):
    return InProcess(monkeypatch, capsys)


def test_the_command_prints_one_line_per_result_and_ends_with_0(given, broker, pipeline):
    result = pipeline(on_mock(given.database, broker), "check")

    found, promises = result.out.split("\n\nGuarantees, in this installation:\n")
    assert result.code == 0
    assert all(line[0] in "✓?!" for line in found.splitlines())
    assert [re.split(r" {2,}|: ", line)[1] for line in promises.splitlines()] == [
        promise.value for promise in Promise if promise not in NOT_OF_AN_INSTALLATION
    ]
    assert " 0 errors. Guarantees: " in result.err.splitlines()[-1]


def test_an_error_ends_with_1_and_json_is_one_document(given, broker, pipeline):
    given.execute("ALTER TABLE pipeline.events DISABLE TRIGGER append_only")

    result = pipeline(on_mock(given.database, broker), "check", "--json")

    assert result.code == 1
    assert result.json["ok"] is False
    [error] = [
        found
        for found in result.json["results"]
        if found["problem"] and found["problem"]["severity"] == "error"
    ]
    assert error["subject"] == "log"
    assert "CREATE TRIGGER append_only" in error["problem"]["fix"]
    assert error["promises"] == ["The log is faithful"]
    faithful = result.json["promises"][0]
    assert (faithful["promise"], faithful["state"]) == ("The log is faithful", "broken")
    assert f"log: {error['problem']['what']}" in faithful["reasons"]


def test_no_schema_ends_with_78_and_kafka_is_examined_nevertheless(
    empty_database, broker, pipeline
):
    result = pipeline(on_mock(empty_database, broker), "check")

    assert result.code == 78
    assert "run `pipeline migrate`" in result.out
    assert "✓ ok       topic Notifications: has 2 partitions" in result.out


def test_an_unavailable_broker_ends_with_69(given, pipeline):
    commands = Commands(
        database_url=given.database.dsn,
        kafka_bootstrap_servers=f"127.0.0.1:{free_port()}",
        kafka_security_protocol="PLAINTEXT",
    )

    result = pipeline(commands, "check")

    assert result.code == 69
    assert "✗ error    kafka: Kafka at 127.0.0.1:" in result.out
