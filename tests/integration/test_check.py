"""What `pipeline check` finds, on real servers, with something wrong on purpose."""

import secrets
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.check import database_tls, examine, is_loopback, kafka_tls
from pipeline.embedded.postgres import free_port
from pipeline.migrate import set_up
from pipeline.projectors import discover
from pipeline.roles import ROLES
from pipeline.settings import Settings
from tests.commands import Commands, InProcess, on_mock
from tests.given import order_event

TOPIC = "Notifications"


def found(url, servers, topic=TOPIC, **settings):
    """Findings by level and text."""
    chosen = Settings(
        database_url=url,
        kafka_bootstrap_servers=servers,
        kafka_security_protocol="PLAINTEXT",
        topics=topic,
        **settings,
    )
    return list(examine(chosen, discover()))


def of(findings, level):
    return [one.text for one in findings if one.level == level]


def is_said(texts, part):
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
def test_a_sound_installation_has_nothing_wrong(given, kafka, topic):
    name = topic(3, config={"retention.ms": str(7 * 86_400_000)})

    findings = found(given.database.dsn, kafka.bootstrap_servers, topic=name)

    assert of(findings, "wrong") == []
    well = of(findings, "ok")
    assert is_said(well, "PostgreSQL 1")
    assert is_said(well, "schema is current")
    assert is_said(well, "append-only triggers on the log and its 0 segments")
    assert is_said(well, "tables heal")
    assert is_said(well, f"topic {name}: 3 partitions")
    assert is_said(well, f"topic {name} keeps its records for 7 days")
    assert is_said(well, "group pipeline may be used")


def test_what_a_broker_does_not_tell_is_no_fault(check):
    findings = check()

    assert of(findings, "wrong") == []
    assert is_said(of(findings, "ok"), "the broker does not tell its retention")


# ----------------------------------------------------------------------------------------- database


@pytest.mark.both_postgres
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("ALTER TABLE pipeline.events DISABLE TRIGGER append_only", "pipeline.events can be"),
        ("DROP TRIGGER append_only ON pipeline_segments.{segment}", "{segment} can be changed"),
        ("DROP TRIGGER heals_after_truncate ON upvest.orders", "orders does not heal"),
        (
            "UPDATE pipeline.projectors SET state = 'broken', problem = 'x' "
            "WHERE projector = 'orders'",
            "orders is broken: x",
        ),
    ],
    ids=["parent", "segment", "truncate", "broken"],
)
def test_a_safeguard_that_is_missing_is_wrong(given, check, harm, said):
    given([order_event("NEW", at=1)]).project(*discover())
    segment = given.scalar("SELECT segment FROM pipeline.segments")
    given.execute(harm.format(segment=segment))

    findings = [one for one in check() if one.area != "kafka"]

    [wrong] = of(findings, "wrong")
    assert said.format(segment=segment) in wrong


def test_a_read_model_of_another_definition_is_a_warning(given, check):
    given([order_event("NEW", at=1)]).project(*discover())
    given.execute("UPDATE pipeline.projectors SET fingerprint = 'x' WHERE projector = 'orders'")

    assert is_said(of(check(), "warning"), "orders was built by another definition")


@pytest.fixture
def role(given) -> Iterator[tuple[str, str]]:
    """The prefix of this database's roles, and the URL of a login that may ingest and project."""
    prefix = f"c{secrets.token_hex(4)}_"
    set_up(given.database.url, with_roles=True, role_prefix=prefix)
    given.execute(f"CREATE ROLE {prefix}login LOGIN PASSWORD 'x'")
    given.execute(f"GRANT {prefix}ingest, {prefix}project TO {prefix}login")
    host = given.database.dsn.rpartition("@")[2]
    yield prefix, f"postgresql://{prefix}login:x@{host}"
    for name in (*ROLES, "login"):
        given.execute(f"DROP OWNED BY {prefix}{name}")
    for name in (*ROLES, "login"):
        given.execute(f"DROP ROLE {prefix}{name}")


def test_a_role_with_just_enough_rights_cannot_change_the_log(broker, role):
    findings = found(role[1], broker.bootstrap_servers)

    assert of(findings, "wrong") == []
    assert is_said(of(findings, "ok"), "append-only for this role")


def test_rights_that_are_missing_are_named(given, broker, role):
    prefix, url = role
    given.execute(f"REVOKE INSERT ON pipeline.events FROM {prefix}ingest")
    given.execute(f"REVOKE DELETE ON upvest.orders FROM {prefix}project")
    given.execute(f"REVOKE EXECUTE ON FUNCTION pipeline.make_segment FROM {prefix}ingest")

    missing = of(found(url, broker.bootstrap_servers), "wrong")

    assert missing == [
        "rights missing to ingest: INSERT on pipeline.events",
        "rights missing to ingest: EXECUTE on pipeline.make_segment",
        "rights missing to project: DELETE on upvest.orders",
    ]


def test_a_login_that_may_only_look_is_told_to_be_for_nothing(given, broker, role):
    prefix, url = role
    given.execute(f"REVOKE {prefix}ingest, {prefix}project FROM {prefix}login")
    given.execute(f"GRANT USAGE ON SCHEMA pipeline TO {prefix}login")
    given.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA pipeline TO {prefix}login")

    assert of(found(url, broker.bootstrap_servers), "wrong") == [
        "this role may neither ingest nor project"
    ]


def test_an_analyst_without_bounds_is_a_warning(given, check, role):
    """Settings of a role are not inherited by the logins that have it."""
    prefix, _ = role
    given.execute(f"GRANT {prefix}personal_data TO {prefix}login")
    given.execute(f"ALTER ROLE {prefix}login SET statement_timeout = '5min'")

    [said] = [text for text in of(check(), "warning") if "hold up others" in text]

    assert f"{prefix}login" in said
    assert "default_transaction_read_only, idle_in_transaction_session_timeout" in said
    for name in ("default_transaction_read_only = on", "idle_in_transaction_session_timeout = 1"):
        given.execute(f"ALTER ROLE {prefix}login SET {name}")
    assert not is_said(of(check(), "warning"), "hold up others")


@pytest.mark.parametrize(
    ("host", "near"),
    [
        *(("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True)),
        *(("/run/postgresql", True), ("", True), ("10.0.0.1", False), ("db.example", False)),
    ],
)
def test_a_host_is_near_only_if_nobody_can_listen_in_between(host, near):
    assert is_loopback(host) is near


@pytest.mark.parametrize(
    ("host", "tls", "sslmode", "level"),
    [
        ("/run/postgresql", None, "prefer", "ok"),
        ("db.example", None, "prefer", "warning"),
        ("db.example", "TLSv1.3", "require", "warning"),
        ("db.example", "TLSv1.3", "verify-full", "ok"),
    ],
)
def test_anything_below_verify_full_over_the_network_is_a_warning(host, tls, sslmode, level):
    assert database_tls(host, tls, sslmode).level == level


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


def test_a_missing_topic_is_wrong_and_what_is_there_is_named(check):
    [one] = [one for one in check(topic="Nonsense") if one.level == "wrong"]

    assert one.text == "topic Nonsense does not exist or is hidden from this user"
    assert TOPIC in one.remedy
    assert one.exit_code == 78


def test_short_retention_and_compaction_are_warnings(given, kafka, topic):
    name = topic(config={"retention.ms": "3600000", "cleanup.policy": "compact,delete"})

    warnings = of(found(given.database.dsn, kafka.bootstrap_servers, topic=name), "warning")

    assert is_said(warnings, "keeps its records for 1:00:00: a longer downtime loses some")
    assert is_said(warnings, "is compacted")


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ("cluster_id = 'another'", "the log holds records of cluster another, this is"),
        ("next_offset = 99, first_offset = 0", "ends at 0, but the log has read up to 99"),
    ],
)
def test_another_cluster_or_topic_than_was_read_is_wrong(given, check, recorded, said):
    given([order_event("NEW", at=1)])
    given.execute(f"UPDATE pipeline.consumer_offsets SET {recorded}")

    wrong = of(check(), "wrong")

    assert is_said(wrong, said)


def test_records_that_kafka_has_deleted_unread_are_wrong(given, check, broker):
    given([order_event("NEW", at=1)])
    _produce(broker, 10)
    broker.delete_records(TOPIC, 0, 7)

    assert of(check(), "wrong") == ["Notifications[0]: 6 offsets from 1 on are gone"]


def _produce(broker, records):
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
    for _ in range(records):
        producer.produce(TOPIC, b"{}", partition=0)
    producer.flush()


def test_a_topic_made_anew_is_told_by_its_id(given, kafka, topic):
    name = topic()
    given([order_event("NEW", at=1)], topic=name)
    given.execute("UPDATE pipeline.consumer_offsets SET topic_id = 'older', next_offset = 0")

    wrong = of(found(given.database.dsn, kafka.bootstrap_servers, topic=name), "wrong")

    assert wrong == [f"topic {name} was deleted and made anew since the log was read"]


def test_a_group_that_feeds_another_database_is_wrong(check, broker):
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "pipeline"})
    other = "6f5b4f5e-5d8f-4c40-8a4b-7d3a1f6d0a11"
    place = TopicPartition(TOPIC, 0, 0, f"pipeline:{other}")
    consumer.commit(offsets=[place], asynchronous=False)
    consumer.close()

    assert is_said(of(check(), "wrong"), f"group pipeline also feeds database {other}")


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def pipeline(monkeypatch, capsys):
    return InProcess(monkeypatch, capsys)


def test_the_command_prints_one_line_a_finding_and_ends_with_0(given, broker, pipeline):
    result = pipeline(on_mock(given.database, broker), "check")

    assert result.code == 0
    assert all(line[0] in "✓!" for line in result.out.splitlines())
    assert result.err.splitlines()[-1].endswith(" 0 wrong.")


def test_something_wrong_ends_with_1_and_programs_get_one_document(given, broker, pipeline):
    given.execute("ALTER TABLE pipeline.events DISABLE TRIGGER append_only")

    result = pipeline(on_mock(given.database, broker), "check", "--json")

    assert result.code == 1
    assert result.json["ok"] is False
    [wrong] = [one for one in result.json["findings"] if one["level"] == "wrong"]
    assert wrong["area"] == "log"
    assert "CREATE TRIGGER append_only" in wrong["remedy"]


def test_no_schema_ends_with_78_and_kafka_is_looked_at_all_the_same(
    empty_database, broker, pipeline
):
    result = pipeline(on_mock(empty_database, broker), "check")

    assert result.code == 78
    assert "run `pipeline migrate`" in result.out
    assert "✓ ok       kafka: topic Notifications: 2 partitions" in result.out


def test_a_broker_that_is_away_ends_with_69(given, pipeline):
    commands = Commands(
        database_url=given.database.dsn,
        kafka_bootstrap_servers=f"127.0.0.1:{free_port()}",
        kafka_security_protocol="PLAINTEXT",
    )

    result = pipeline(commands, "check")

    assert result.code == 69
    assert "✗ wrong    kafka: Kafka: _TRANSPORT" in result.out
