"""Verify: holds on what is right, and names what is not, whatever was done to it."""

import json
import secrets
from typing import NamedTuple

import pytest

from pipeline import catalogue
from pipeline.db import open_engine
from pipeline.errors import ExitCode
from pipeline.projection.loop import run_projection
from pipeline.sandbox.simulator import Chaos, Simulation
from tests.commands import Commands, InProcess
from tests.given import order_event
from tests.integration.ingesting import Ledger, ingest_until_end, settings_for
from tests.records import HOSTILE, deep_nesting
from tests.servers.databases import Database, fresh_database

pytestmark = deep_nesting
PARTITIONS = 2
EVENTS = 300


@pytest.fixture(scope="module")
def day(kafka, postgres_server_18, _templates):
    """A day at a broker with chaos and everything hostile, in Kafka, log and read models."""
    topic = f"day-{secrets.token_hex(4)}"
    kafka.create_topic(topic, PARTITIONS)
    ledger = Ledger(kafka.bootstrap_servers)
    for record in Simulation(
        seed=4, events=EVENTS, topic=topic, partitions=PARTITIONS, chaos=Chaos()
    ):
        ledger.send(
            topic, [record.value], partition=record.partition or 0, key=record.key,
            headers=record.headers,
        )  # fmt: skip
    ledger.send(topic, [value for value, *_ in HOSTILE.values()], key=b"\x00\xff").flush()
    template = _templates(postgres_server_18)
    with fresh_database(postgres_server_18, template=template) as database:
        ingest_until_end(settings_for(database, kafka.bootstrap_servers, topic))
        engine = open_engine(database.url, application="test")
        run_projection(engine, catalogue.load().models, until_end=True)
        engine.dispose()
        yield Day(topic, ledger, database)


class Day(NamedTuple):
    topic: str
    ledger: Ledger
    database: Database


@pytest.fixture
def filled(day, postgres_server_18):
    """A database of this test's own with the day in it."""
    with fresh_database(postgres_server_18, template=day.database) as database:
        yield database


@pytest.fixture
def pipeline(monkeypatch, capsys, filled, kafka):
    """``pipeline("verify", …)``, in this process."""
    return on(filled, kafka, InProcess(monkeypatch, capsys))


def on(database, kafka, in_process):
    commands = Commands(
        database_url=database.dsn,
        kafka_bootstrap_servers=kafka.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
    )
    return lambda *arguments: in_process(commands, *arguments)


def tamper(database, statement, *parameters):
    """Do to the log what nobody may: as the superuser, past its triggers; how many rows."""
    with database.connect() as db:
        db.execute("SET session_replication_role = replica")
        changed = db.execute(statement, parameters).rowcount
    assert changed, "nothing was tampered with"
    return changed


def wrong(result):
    return [finding for finding in result.json["evidence"] if finding["wrong"]]


def test_every_check_holds_on_an_unchanged_log(day, pipeline):
    result = pipeline("verify")

    assert result.code == 0, result.out
    assert result.err.endswith("Every claim holds.\n")
    records = len(day.ledger.records)
    assert (
        f"kafka: the log holds what Kafka holds, record by record: {records:,} examined"
        in result.out
    )
    assert "read models: its tables equal a replay of the log: " in result.out
    assert "✗" not in result.out


LOG, KAFKA, READ_MODELS = "log", "kafka", "read models"
ROW = 'topic = (SELECT min(topic) FROM pipeline.events) AND "partition" = 0'
TAMPERED = {
    "a row after the next offset": (
        LOG, "first and next offset",
        "UPDATE pipeline.consumer_offsets SET next_offset = next_offset - 3 "
        "WHERE \"partition\" = 0",
    ),
    "a row of no partition": (
        LOG, "first and next offset",
        "DELETE FROM pipeline.consumer_offsets WHERE \"partition\" = 1",
    ),
    "another type": (
        LOG, "type and id",
        f"UPDATE pipeline.events SET event_type = 'X' WHERE {ROW} AND \"offset\" = 7"
    ),
    "another id": (
        LOG, "type and id",
        f"UPDATE pipeline.events SET event_id = gen_random_uuid() WHERE {ROW} AND \"offset\" = 7",
    ),
    "a repeat of something else": (
        LOG, "earlier row",
        f"UPDATE pipeline.events SET repeat_of = 3 WHERE {ROW} AND \"offset\" = 7",
    ),
    "a segment that is not known": (LOG, "segment", "DELETE FROM pipeline.segments"),
    "a checkpoint after the end": (
        LOG, "checkpoint",
        "UPDATE pipeline.projection_checkpoints SET next_offset = 1000000 "
        "WHERE projector = 'orders' AND \"partition\" = 1",
    ),
    "a dead letter without an event": (
        LOG, "dead letter",
        "INSERT INTO pipeline.dead_letters (projector, topic, \"partition\", \"offset\", sqlstate) "
        "VALUES ('orders', 'nowhere', 0, 5, '22000')",
    ),
    "bytes that were changed": (
        LOG, "digest",
        "UPDATE pipeline.events SET raw = raw || '!' WHERE \"offset\" = "
        "(SELECT min(\"offset\") FROM pipeline.events WHERE raw IS NOT NULL AND \"partition\" = 0) "
        "AND \"partition\" = 0",
    ),
    "a record that is missing": (
        KAFKA, "in Kafka and not in the log",
        f"DELETE FROM pipeline.events WHERE {ROW} AND \"offset\" BETWEEN 7 AND 9",
    ),
    "another payload": (
        KAFKA, "differ between Kafka and the log",
        "UPDATE pipeline.events SET payload = jsonb_set(payload, '{object}', '{}') "
        f"WHERE {ROW} AND \"offset\" = 7",
    ),
    "another key": (
        KAFKA, "differ between Kafka and the log",
        f"UPDATE pipeline.events SET key = 'x' WHERE {ROW} AND \"offset\" = 7"
    ),
    "other headers": (
        KAFKA, "differ between Kafka and the log",
        f"UPDATE pipeline.events SET headers = '[[\"a\", \"b\"]]' WHERE {ROW} AND \"offset\" = 7",
    ),
    "another time": (
        KAFKA, "differ between Kafka and the log",
        f"UPDATE pipeline.events SET kafka_timestamp = now() WHERE {ROW} AND \"offset\" = 7",
    ),
    "content that is missing": (
        KAFKA, "differ between Kafka and the log",
        f"UPDATE pipeline.events SET payload = NULL, raw = NULL WHERE {ROW} AND \"offset\" = 7",
    ),
    "rows of a read model that are missing": (
        READ_MODELS, "missing", "DELETE FROM upvest.orders",
    ),
    "rows of a read model that were changed": (
        READ_MODELS, "not the same", "UPDATE upvest.cash_balances SET balance = balance + 0.01"
    ),
    # The replay of such a table is rounded in the same way, and equals it.
    "a column of a read model that rounds": (
        READ_MODELS, "has column price of type numeric(20,1)",
        "ALTER TABLE upvest.executions ALTER COLUMN price TYPE numeric(20, 1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tampering", TAMPERED)
def test_every_kind_of_damage_is_named(tampering, filled, pipeline):
    part, expected, statement = TAMPERED[tampering]
    tamper(filled, statement)

    result = pipeline("verify", "--json")

    assert result.code == ExitCode.FOUND
    assert not result.json["ok"]
    assert [
        finding
        for finding in wrong(result)
        if finding["part"] == part
        and expected in f"{finding['claim']} {finding['problem']['what']}"
    ], wrong(result)


def test_a_record_that_kafka_does_not_have_is_named_with_its_offset(filled, pipeline):
    with filled.connect() as db:
        db.execute(
            'INSERT INTO pipeline.events (topic, "partition", "offset", kafka_timestamp_type) '
            "SELECT topic, 1, next_offset, 0 FROM pipeline.consumer_offsets "
            'WHERE "partition" = 1'
        )
        db.execute(
            "UPDATE pipeline.consumer_offsets SET next_offset = next_offset + 1 "
            'WHERE "partition" = 1'
        )
        end = db.execute(
            'SELECT next_offset FROM pipeline.consumer_offsets WHERE "partition" = 1'
        ).fetchone()[0]

    result = pipeline("verify", "--only", "kafka")

    assert result.code == ExitCode.FOUND
    assert f"a topic that ends at {end - 1}" in result.out


def test_missing_records_are_reported_as_intervals_with_the_command_that_fills_them(
    filled, day, pipeline
):
    tamper(
        filled,
        'DELETE FROM pipeline.events WHERE "partition" = 0 '
        'AND ("offset" BETWEEN 7 AND 9 OR "offset" = 11)',
    )

    result = pipeline("verify", "--only", "kafka")

    assert result.code == ExitCode.FOUND
    assert "4 wrong at 7-9, 11" in result.out
    assert f"`pipeline rewind {day.topic}:0 --to 7 --execute`" in result.out
    assert pipeline("rewind", f"{day.topic}:0", "--to", "7", "--execute").code == 0
    assert pipeline("verify", "--only", "kafka").code == 0


def test_records_deleted_by_retention_are_reported_as_not_examined(
    kafka, topic, database, monkeypatch, capsys
):
    name = topic(1)
    Ledger(kafka.bootstrap_servers).send(name, [b"{}"] * 30).flush()
    ingest_until_end(settings_for(database, kafka.bootstrap_servers, name))
    kafka.delete_records(name, 0, 20)

    result = on(database, kafka, InProcess(monkeypatch, capsys))("verify", "--only", "kafka")

    assert result.code == ExitCode.FOUND
    assert "not examined: offsets 0 to 19 are no longer in Kafka" in result.out
    assert result.err.endswith("Some claims could not be examined; see above.\n")


def test_an_empty_log_and_a_deleted_topic_are_not_examined(given, kafka, monkeypatch, capsys):
    verify = on(given.database, kafka, InProcess(monkeypatch, capsys))
    empty = verify("verify", "--only", "log", "--only", "kafka")
    given([None], topic=f"gone-{secrets.token_hex(4)}")

    gone = verify("verify", "--only", "kafka")

    assert (empty.code, gone.code) == (ExitCode.FOUND, ExitCode.FOUND)
    assert empty.out.count("not examined: the log is empty") == 2
    assert "not examined: Kafka has no such partition" in gone.out


@pytest.mark.both_postgres
def test_a_compacted_topic_may_have_less_than_the_log(kafka, topic, database, monkeypatch, capsys):
    name = topic(1, config={"cleanup.policy": "compact"})
    ledger = Ledger(kafka.bootstrap_servers)
    for number in range(5):
        ledger.send(name, [b'{"n": %d}' % number], key=b"%d" % number)
    ledger.flush()
    ingest_until_end(settings_for(database, kafka.bootstrap_servers, name))
    with database.connect() as db:
        db.execute(
            'INSERT INTO pipeline.events (topic, "partition", "offset", kafka_timestamp_type) '
            "SELECT topic, 0, 5, 0 FROM pipeline.consumer_offsets"
        )
        db.execute("UPDATE pipeline.consumer_offsets SET next_offset = 6")
    producer = Ledger(kafka.bootstrap_servers, {"transactional.id": secrets.token_hex(4)})
    producer.producer.init_transactions()
    producer.producer.begin_transaction()
    producer.send(name, [b"{}"], key=b"x").forget()
    producer.producer.abort_transaction()

    result = on(database, kafka, InProcess(monkeypatch, capsys))("verify", "--only", "kafka")

    assert result.code == 0, result.out
    assert "1 more is only in the log: the topic is compacted" in result.out


def test_one_read_model_alone_may_be_verified(pipeline):
    result = pipeline("verify", "orders", "--only", "read-models", "--json")

    assert result.code == 0
    assert {finding["subject"] for finding in result.json["evidence"]} == {"orders"}
    assert json.loads(result.out)["ok"] is True


def test_an_unavailable_kafka_ends_verify_with_69(given):
    given([order_event("NEW", at=1)])
    commands = Commands(
        database_url=given.database.dsn,
        kafka_bootstrap_servers="127.0.0.1:1",
        kafka_security_protocol="PLAINTEXT",
    )

    result = commands.run("verify", "--only", "kafka")

    assert result.code == ExitCode.UNAVAILABLE
