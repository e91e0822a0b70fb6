"""Whatever the log and its bookkeeping hold, every command can show it, and shows it as it is.

Rows come as a producer makes them, through the reader and the append of the service; and where the
types of the columns reach further than that, by SQL. PostgreSQL itself judges what is shown.
"""

import json
import secrets
from datetime import UTC, datetime

import pytest
from confluent_kafka import Producer
from hypothesis import HealthCheck, Phase, example, settings
from hypothesis import given as over
from hypothesis import strategies as st
from sqlalchemy import text

from pipeline import events as reading
from pipeline.db import LOG_SCHEMA, metadata, transaction
from pipeline.errors import ExitCode
from pipeline.log import append as writing
from pipeline.log import claims, offsets
from pipeline.log.claims import Owner
from pipeline.log.copying import encode
from pipeline.log.segments import make_segment
from pipeline.partitions import Advance, NextOffset, Partition
from pipeline.sandbox.servers.broker import MockBroker
from pipeline.schema.bookkeeping import declare_tables
from tests.commands import Commands, InProcess, command_names, on_mock
from tests.given import Given, event, some_id
from tests.servers.databases import fresh_database

OFFSET_MAX = 2**63 - 1

# ------------------------------------------------------------------- what a producer may write

# Kafka's timestamp is any 64 bits: seconds, microseconds or nanoseconds by mistake, or nonsense.
KAFKA_TIMES = st.one_of(
    st.none(),
    st.integers(-(2**63), OFFSET_MAX),
    st.sampled_from(
        [0, 1_768_212_000, 1_768_212_000_000_000, 253_402_300_800_000, -62_135_596_800_001]
    ),
)
CREATED_AT = st.one_of(
    st.sampled_from(
        [
            "9999-12-31T23:30:00-01:00",
            "9999-12-31T23:59:60Z",
            "0001-01-01T00:30:00+01:00",
            "0001-01-01T00:00:00Z",
            "9999-12-31",
            "infinity",
        ]
    ),
    st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
)
NASTY = st.one_of(
    st.sampled_from(["", "\x1b[2J\x07", "\u202e\u2028\x9b", "x" * 3000, "ORDER.NEW", "'; --"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
)
NUMBERS = st.sampled_from(["1e400", "-0.0", "9" * 5000, "0.1000", "1" + "0" * 400 + ".5", "NaN"])
HEADERS = st.none() | st.lists(
    st.tuples(NASTY, st.none() | st.binary(max_size=9) | NASTY.map(str.encode)), max_size=3
)


@st.composite
def values(draw):
    """A record's value: nothing, any bytes, or an event with something odd in it."""
    kind = draw(st.sampled_from(["tombstone", "bytes", "nested", "event", "event", "event"]))
    if kind == "tombstone":
        return None
    if kind == "bytes":
        return draw(st.binary(max_size=30))
    if kind == "nested":
        depth = draw(st.sampled_from([200, 900, 3000]))
        return b"[" * depth + b"]" * depth
    body = {
        "id": draw(st.sampled_from([some_id("an order"), "", "x"])),
        "status": draw(NASTY),
        "fee": "N",
        "updated_at": draw(CREATED_AT),
    }
    wanted = event(draw(NASTY | st.just("ORDER.NEW")), body, name=draw(st.sampled_from(["a", "b"])))
    written = json.dumps({**wanted, "created_at": draw(CREATED_AT)})
    return written.replace('"N"', draw(NUMBERS)).encode()


@st.composite
def records(draw):
    return reading.Record(
        "orders",
        0,
        0,
        draw(values()),
        draw(st.none() | st.binary(max_size=9)),
        draw(HEADERS),
        draw(KAFKA_TIMES),
        draw(st.sampled_from([0, 1, 2])),
    )


# ---------------------------------------------------------------------- what the columns can hold

TIMES = st.sampled_from(
    [
        *("infinity", "-infinity", "294276-12-31 23:59:59.999999+00", "4714-11-24 00:00:00+00 BC"),
        *("10000-01-01 00:00:00+00", "0001-12-31 23:59:59.999999+00 BC", "9999-12-31 23:59:59+00"),
        *("2026-01-12 10:00:00.123456+00", "now"),
    ]
)
BIGINTS = st.sampled_from([0, 1, 2**31, 2**53 + 1, OFFSET_MAX - 1, OFFSET_MAX])
INTEGERS = st.sampled_from([0, 1, -1, 2**31 - 1])
JSONS = st.sampled_from(
    [
        "[]",
        "1e1000",
        "9" * 5000,
        '[["a", {"base64": "/w=="}], ["a", null]]',
        "[" * 2000 + "]" * 2000,
        '"\\u001b[2J"',
    ]
)
BY_TYPE = {
    "TEXT": NASTY,
    "TIMESTAMP": TIMES,
    "BIGINT": BIGINTS,
    "INTEGER": INTEGERS,
    "SMALLINT": st.sampled_from([0, -1, 2**15 - 1]),
    "JSONB": JSONS,
    "BYTEA": st.sampled_from(["\\x", "\\x00ff1b", "\\x" + "fe" * 5000]),
    "UUID": st.sampled_from([some_id("a"), "00000000-0000-0000-0000-000000000000"]),
    "ARRAY": st.sampled_from(["{}", '{orders,"\x1b[2J"}']),
}
# Tables that a command shows, and the columns that have a meaning of their own to keep.
SHOWN = {
    "events": {"topic", "partition", "offset"},
    "consumer_offsets": {"topic", "partition", "first_offset", "next_offset"},
    "gaps": {"gap_id", "topic", "partition", "first_offset", "end_offset"},
    "dead_letters": {"projector", "topic", "partition", "offset"},
    "projectors": {"projector", "state"},
    "projection_checkpoints": {"projector", "topic", "partition"},
    "projection_workers": {"worker"},
}

# Tables that no command shows: only the service's own statements read them.
NOT_SHOWN = {
    *("declared_objects", "ingest_workers", "installation", "locks", "rebuild_ranges"),
    *("schema_changes", "segments"),
}


def test_each_table_of_the_log_is_filled_with_odd_values_or_shown_by_no_command():
    declare_tables()

    tables = {table.name for table in metadata.tables.values() if table.schema == LOG_SCHEMA}

    assert tables == {*SHOWN} | NOT_SHOWN


def column_values(table):
    """A value for each column of a table that has no meaning to keep, by its type."""
    return st.fixed_dictionaries(
        {
            column.name: (st.none() if column.nullable else st.nothing())
            | BY_TYPE[
                type(column.type)
                .__visit_name__.upper()
                .replace("DATETIME", "TIMESTAMP")
                .replace("BIG_INTEGER", "BIGINT")
                .replace("SMALL_INTEGER", "SMALLINT")
                .replace("LARGE_BINARY", "BYTEA")
            ]
            for column in metadata.tables[f"pipeline.{table}"].columns
            if column.name not in SHOWN[table]
        }
    )


# ----------------------------------------------------------------------------------- the commands

READING = [
    ["status"],
    ["events", "-n", "100"],
    ["events", "-n", "100", "--payload"],
    ["events", some_id("an order"), "--payload"],
    ["events", "--bad", "--since", "0001-01-01"],
    ["events", "--type", "ORDER", "--until", "9999-12-31T23:59:59Z"],
    ["events", "--follow", "--since", "0001-01-01", "-n", "1", "--payload"],
    ["gaps", "list"],
    ["dead-letters", "list"],
    ["dead-letters", "show", "orders:0:1", "--payload"],
    ["dead-letters", "retry"],
    ["verify", "--only", "log"],
    ["verify", "--only", "read-models", "orders"],
    ["rebuild", "orders", "--check"],
]

READING_KAFKA_TOO = [
    ["check"],
    ["verify", "--only", "kafka"],
    ["rewind", "orders:0", "--to", "earliest"],
    ["gaps", "accept", "orders:0"],
]
# Commands that write or watch: what they meet in the log is tested where each of them is, with the
# records of `tests/records.py`.
NOT_READING = {*("demo", "ingest", "migrate", "project", "run", "simulate")}


def test_each_command_that_reads_the_log_is_among_those_that_are_tested_here():
    read = {
        name
        for name in command_names()
        if any(
            command[: len(name.split())] == name.split() for command in READING + READING_KAFKA_TOO
        )
    }

    assert read | NOT_READING == {*command_names()}


@pytest.fixture(scope="module")
def shared(postgres_server_18, _templates):
    template = _templates(postgres_server_18)
    with fresh_database(postgres_server_18, template=template) as database:
        made = Given(database)
        yield made
        made.close()


@pytest.fixture
def run(shared, monkeypatch, capsys):
    here = InProcess(monkeypatch, capsys)
    commands = Commands(database_url=shared.database.dsn)

    def shown(*arguments):
        result = here(commands, *arguments)
        assert result.code in (0, 1), (arguments, result.err)
        assert "Traceback" not in result.err
        assert "\x1b" not in result.out + result.err
        return result

    return shown


EMPTY = """
SET LOCAL session_replication_role = replica;
TRUNCATE pipeline.events, pipeline.consumer_offsets, pipeline.gaps, pipeline.dead_letters,
         pipeline.projectors, pipeline.projection_checkpoints, pipeline.projection_workers,
         pipeline.segments, upvest.orders CASCADE
"""


@pytest.fixture
def log(shared):
    """Clears what an example before has left."""

    def cleared():
        segments = shared.query("SELECT segment FROM pipeline.segments")
        shared.execute(EMPTY)
        for row in segments:
            shared.execute(f'DROP TABLE pipeline_segments."{row.segment}"')
        return shared

    yield cleared
    cleared()


def append(given, taken):
    """As the service does it, with keys, headers and times."""
    partition = Partition("orders", 0)
    with transaction(given.engine) as db:
        offsets.begin(db, partition, NextOffset(0))
        claim = claims.claim(db, partition, Owner(group="tests", member="tests"))
        make_segment(db, partition.topic, claim.next_offset, 1000)
        rows = [
            encode(reading.read(record._replace(offset=offset)))
            for offset, record in enumerate(taken)
        ]
        advance = Advance(claim.epoch, claim.next_offset, NextOffset(len(rows)), len(rows))
        writing.append(db, rows, {partition: advance})


# What is shown of a row must be what PostgreSQL itself would write of it, or reads as the same.
SAME = text("""
SELECT (shown ->> 'event_id')::uuid IS NOT DISTINCT FROM event_id,
       shown ->> 'event_type' IS NOT DISTINCT FROM event_type,
       (shown ->> 'created_at')::timestamptz IS NOT DISTINCT FROM created_at,
       (shown ->> 'kafka_timestamp')::timestamptz IS NOT DISTINCT FROM kafka_timestamp,
       (shown ->> 'ingested_at')::timestamptz IS NOT DISTINCT FROM ingested_at,
       (shown ->> 'entity_id')::uuid IS NOT DISTINCT FROM entity_id,
       (shown ->> 'repeat_of')::bigint IS NOT DISTINCT FROM repeat_of,
       shown ->> 'problem' IS NOT DISTINCT FROM problem,
       decode(shown ->> 'raw_base64', 'base64') IS NOT DISTINCT FROM raw,
       decode(shown ->> 'key_base64', 'base64') IS NOT DISTINCT FROM key,
       shown -> 'payload' IS NOT DISTINCT FROM coalesce(payload, 'null'),
       shown -> 'headers' IS NOT DISTINCT FROM coalesce(headers, 'null')
FROM (SELECT CAST(:line AS jsonb) AS shown) line
JOIN pipeline.events ON topic = shown ->> 'topic' AND "partition" = (shown -> 'partition')::int
    AND "offset" = (shown -> 'offset')::bigint
""")


def assert_shown_as_stored(given, line):
    """One line of ``events --json --payload``."""
    with transaction(given.engine) as db:
        [same] = db.execute(SAME, {"line": line})
    assert all(same), list(same)


MANY = settings(
    max_examples=4,  # some thirty commands each
    # To shrink a failure takes hundreds of runs, and hides it behind the time limit of the test.
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@MANY
@over(taken=st.lists(records(), min_size=2, max_size=12))
@example(
    taken=[
        reading.Record("orders", 0, 0, b"{}", b"\xff", [("h", b"\xff")], 1_768_212_000_000_000, 1),
        reading.Record(
            "orders",
            0,
            1,
            json.dumps(
                {**event("ORDER.NEW", {"id": 1}), "created_at": "9999-12-31T23:30:00-01:00"}
            ).encode(),
            None,
            None,
            None,
            0,
        ),
    ]
)
def test_any_value_of_a_producer_is_shown_as_stored(log, run, taken):
    given = log()
    append(given, taken)

    for command in READING[:8]:
        run(*command)
    lines = run("events", "-n", "100", "--payload", "--json").out.splitlines()

    assert len(lines) == len(taken)
    for line in lines:
        assert_shown_as_stored(given, line)


@MANY
@over(data=st.data())
@pytest.mark.faults
def test_any_value_that_a_column_can_hold_is_shown_as_stored(log, run, data):
    given = log()
    append(given, [reading.Record("orders", 0, 0, b"{}", None, None, None, 0)])
    with given.database.connect() as db:
        fill_at_random(db, data)

    for command in READING:
        if "--follow" in command:  # it may wait for ever: an event of before the year 1 is too old
            continue
        # A replay plans ranges of offsets up to the checkpoint; no topic has 2^63 of them.
        if command[-1] in ("--check", "orders"):
            continue
        run(*command)
        documents = run(*command, "--json").out.splitlines()
        assert documents or command[0] == "events"
        for document in documents:
            given.scalar("SELECT jsonb_typeof(CAST(:line AS jsonb))", line=document)
    for line in run("events", "-n", "100", "--payload", "--json").out.splitlines():
        assert_shown_as_stored(given, line)
    assert_gaps_shown_as_stored(given, run("gaps", "list", "--json").json)


@settings(MANY, max_examples=2)
@over(data=st.data())
@pytest.mark.faults
def test_any_value_that_a_column_can_hold_stops_no_command_that_reads_kafka(
    log, shared, monkeypatch, capsys, kafka_of_orders, data
):
    """It finds what is wrong with it, perhaps, and says so."""
    given = log()
    append(given, [reading.Record("orders", 0, 0, b"{}", None, None, None, 0)])
    with given.database.connect() as db:
        fill_at_random(db, data)
    here = InProcess(monkeypatch, capsys)
    commands = on_mock(shared.database, kafka_of_orders).with_(topics="orders")

    for command in READING_KAFKA_TOO:
        result = here(commands, *command)
        moved = command[0] == "gaps" and "Nothing was changed" in result.err
        expected = (ExitCode.INVARIANT,) if moved else (0, 1, ExitCode.REFUSED)
        assert result.code in expected, (command, result.err)
        assert "Traceback" not in result.err
        assert "\x1b" not in result.out + result.err


@pytest.fixture(scope="module")
def kafka_of_orders():
    with MockBroker() as broker:
        broker.create_topic("orders", 1)
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
        for number in range(3):
            producer.produce("orders", b"{}" if number else None, partition=0)
        assert producer.flush(20) == 0
        yield broker


def fill_at_random(db, data):
    """Past triggers and rights: what a restore, a human or a later version may have left."""
    db.execute("SET session_replication_role = replica")
    end = data.draw(st.sampled_from([9, OFFSET_MAX]))
    for offset in (1, 2):
        insert(db, data, "events", topic="orders", partition=0, offset=offset)
        insert(
            db, data, "dead_letters", projector="orders", topic="orders", partition=0, offset=offset
        )
    db.execute("DELETE FROM pipeline.consumer_offsets")
    for number in (0, 1):
        insert(
            db, data, "consumer_offsets",
            topic="orders", partition=number, first_offset=0, next_offset=end,
        )  # fmt: skip
        insert(
            db, data, "gaps",
            topic="orders", partition=number, first_offset=0, end_offset=data.draw(BIGINTS) or 1,
        )  # fmt: skip
    for name in ("orders", "gone \x1b[2J", "users@rebuild"):
        insert(
            db,
            data,
            "projectors",
            projector=name,
            state=data.draw(st.sampled_from(["live", "broken"])),
        )
        insert(db, data, "projection_checkpoints", projector=name, topic="orders", partition=0)
    insert(db, data, "projection_workers", worker=secrets.token_hex(16))


def insert(db, data, table, **fixed):
    row = {**data.draw(column_values(table), label=table), **fixed}
    names = ", ".join(f'"{name}"' for name in row)
    marks = ", ".join(["%s"] * len(row))
    # Without a type, so that PostgreSQL reads each as its column's.
    texts = [None if value is None else str(value) for value in row.values()]
    db.execute(f"INSERT INTO pipeline.{table} ({names}) VALUES ({marks})", texts)


def assert_gaps_shown_as_stored(given, shown):
    for gap in shown:
        with transaction(given.engine) as db:
            [same] = db.execute(
                text("""
                SELECT (first_offset, end_offset) = (:first_offset, :end_offset)
                       AND reason = :reason AND accepted_by IS NOT DISTINCT FROM :accepted_by
                       AND detected_at = CAST(:detected_at AS timestamptz)
                       AND accepted_at IS NOT DISTINCT FROM CAST(:accepted_at AS timestamptz)
                FROM pipeline.gaps WHERE gap_id = :gap_id"""),
                gap,
            ).scalars()
        assert same, gap


@pytest.mark.parametrize(
    "arguments",
    [
        ["events", "--at", "orders:0:9223372036854775808"],
        ["events", "--at", "orders:0:5-4"],
        ["events", "--since", "9" * 30 + "d"],
        ["events", "--since", "²d"],
        ["events", "--until", "9999-12-31T23:30:00-01:00"],
        ["events", "--since", "0001-01-01T00:30:00+01:00"],
        ["events", "--type", "\udcff"],
        ["dead-letters", "show", "orders:0:" + "9" * 40],
    ],
)
def test_a_value_that_no_column_can_hold_is_wrong_usage(shared, monkeypatch, capsys, arguments):
    here = InProcess(monkeypatch, capsys)

    result = here(Commands(database_url=shared.database.dsn), *arguments)

    assert result.code == 2, result.err
    assert "Traceback" not in result.err


def test_a_dead_letter_without_its_event_is_shown_and_never_counted_as_applied(log, run):
    given = log()
    given.execute(
        'INSERT INTO pipeline.dead_letters (projector, topic, partition, "offset", sqlstate) '
        "VALUES ('orders', 'orders', 0, 7, '22P02')"
    )

    shown = run("dead-letters", "show", "orders:0:7")
    tried = run("dead-letters", "retry")

    assert "no longer in pipeline.events" in shown.out
    assert (tried.code, given.scalar("SELECT count(*) FROM pipeline.dead_letters")) == (1, 1)
