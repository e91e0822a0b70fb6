"""What the log holds of a record, in a real PostgreSQL: all of it, whatever it is."""

import base64
import json
import secrets
import traceback
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from pipeline import failpoints
from pipeline.db import open_engine, transaction
from pipeline.errors import (
    ConfigurationError,
    FencedError,
    InvariantError,
    MissingSegmentError,
    PoisonRecordError,
    TransientError,
)
from pipeline.events import Record, Row, read
from pipeline.log import claims, offsets
from pipeline.log.append import append
from pipeline.log.claims import Owner
from pipeline.log.copying import encode
from pipeline.log.origin import KafkaPartition
from pipeline.log.segments import make_segment
from pipeline.log.tables import events
from pipeline.partitions import Epoch, NextOffset, Partition
from tests.contract.logs import advance
from tests.records import HOSTILE, SAMPLE, deep_nesting, envelope, header_lists, nested, values

pytestmark = deep_nesting
CANARY = "c4n4ry-Erika-Mustermann"
SPAN = 1000


@pytest.fixture
def engine(database) -> Iterator[Engine]:
    engine = open_engine(database.url, application="test")
    yield engine
    engine.dispose()


def claimed(engine: Engine, partition: Partition) -> int:
    """A partition that begins at 0, with its first segment; the epoch of its owner."""
    with transaction(engine) as db:
        offsets.begin(db, partition, NextOffset(0))
        make_segment(db, partition.topic, NextOffset(0), SPAN)
        return claims.claim(db, partition, Owner("tests", "member")).epoch


def rows_of(partition: Partition, records: Sequence[bytes | None], first: int = 0) -> list[Row]:
    return [
        read(Record(*partition, first + n, value, None, None, None, 0))
        for n, value in enumerate(records)
    ]


def write(engine: Engine, partition: Partition, rows: Sequence[Row], expected: int = 0) -> None:
    """One batch by an owner that claims for it."""
    with transaction(engine) as db:
        held = claims.claim(db, partition, Owner("tests", "member")).epoch
    end = rows[-1].offset + 1
    with transaction(engine) as db:
        append(db, [encode(row) for row in rows], {partition: advance(held, expected, end)})


COLUMNS = ", ".join(f'"{column.name}"' for column in events.columns if column.name != "payload")


def stored(engine: Engine, topic: str, columns: str = COLUMNS) -> Sequence[dict[str, Any]]:
    """What the log holds of a topic, in order; the payload as PostgreSQL writes it."""
    query = text(
        f"SELECT {columns}, CAST(payload AS text) AS payload FROM pipeline.events "
        'WHERE topic = :topic ORDER BY "partition", "offset"'
    )
    with transaction(engine) as db:
        return [dict(row) for row in db.execute(query, {"topic": topic}).mappings()]


def parsed(value: bytes | str) -> object:
    """A JSON value with exact numbers, to compare with what jsonb made of it."""
    return json.loads(value, parse_float=Decimal, parse_int=Decimal)


# ---------------------------------------------------------------------------------- rows and offset


@pytest.mark.both_postgres
def test_every_column_is_stored_as_it_was_read(engine):
    partition = Partition("orders", 7)
    claimed(engine, partition)
    headers = [("trace", b"abc"), ("trace", b"\xff"), ("none", None), ("empty", b"")]
    record = Record(*partition, 41, envelope(), b"\x00key\xff", headers, 1_768_212_000_123, 1)

    write(engine, partition, [read(record, keep_raw=True)._replace(repeat_of=40)])

    [row] = stored(engine, "orders")
    assert (row["topic"], row["partition"], row["offset"]) == ("orders", 7, 41)
    assert str(row["event_id"]) == "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
    assert str(row["entity_id"]) == "7f9c24e8-3b12-4fef-91e0-56a2d5a9c001"
    assert row["event_type"] == "ORDER.NEW"
    assert str(row["created_at"]) == "2026-01-12 10:00:00.123456+00:00"
    assert str(row["kafka_timestamp"]) == "2026-01-12 10:00:00.123000+00:00"
    assert row["kafka_timestamp_type"] == 1
    assert row["repeat_of"] == 40
    assert parsed(row["payload"]) == parsed(envelope())
    assert row["raw"] == envelope()
    assert row["digest"] == read(record).digest
    assert row["key"] == b"\x00key\xff"
    assert row["headers"] == [
        ["trace", "abc"], ["trace", {"base64": "/w=="}], ["none", None], ["empty", ""],
    ]  # fmt: skip
    assert row["problem"] is None
    assert row["ingested_at"] is not None


@pytest.mark.both_postgres
def test_a_batch_that_fails_leaves_neither_rows_nor_offset(engine):
    first, second = Partition("orders", 0), Partition("orders", 1)
    held = claimed(engine, first)
    claimed(engine, second)
    rows = rows_of(first, [b"1", b"2"]) + rows_of(second, [b"3"])

    with pytest.raises(FencedError), transaction(engine) as db:
        append(
            db,
            [encode(row) for row in rows],
            {first: advance(held, 0, 2), second: advance(99, 0, 1)},
        )

    with transaction(engine) as db:
        ownerships = claims.lock_ownerships(db, [first, second])
    assert [ownership.next_offset for ownership in ownerships.values()] == [0, 0]
    assert stored(engine, "orders") == []


def test_the_time_of_the_batch_is_the_time_of_its_rows(engine):
    partition = Partition("orders", 0)
    claimed(engine, partition)

    write(engine, partition, rows_of(partition, [b"1", b"2", b"3"]))

    assert len({row["ingested_at"] for row in stored(engine, "orders")}) == 1


def test_the_end_of_a_partition_is_kept_until_kafka_reports_a_newer_end(engine):
    """Lag must not read 0 because a batch came before Kafka's next answer."""
    partition = Partition("orders", 0)
    held = claimed(engine, partition)
    with transaction(engine) as db:
        offsets.record_source(
            db, partition, Epoch(held), KafkaPartition("cluster", None, *map(NextOffset, (0, 100)))
        )  # fmt: skip
    lags = []

    for expected, new, high in ((0, 10, None), (10, 20, 90), (20, 30, None), (30, 120, 95)):
        with transaction(engine) as db:
            append(db, [], {partition: advance(held, expected, new, high)})
            lags.append(db.execute(text("SELECT lag_events FROM pipeline.lag")).scalar_one())

    assert lags == [90, 70, 60, 0]


def test_a_listener_is_notified_of_a_commit(engine, database):
    partition = Partition("orders", 0)
    claimed(engine, partition)
    with database.connect() as listener:
        listener.execute("LISTEN pipeline_events")

        write(engine, partition, rows_of(partition, [b"1"]))

        assert [
            notification.channel for notification in listener.notifies(timeout=10, stop_after=1)
        ] == ["pipeline_events"]


# -------------------------------------------------------------------------------- hostile payloads


def jsonb_cannot_hold(value: bytes | None) -> bool:
    """What passes for JSON here and is refused by PostgreSQL only."""
    return value is not None and (b"1e200000" in value or value == nested(100_000))


@pytest.mark.both_postgres
def test_a_hostile_record_is_in_the_log_with_the_other_records_of_its_batch(engine):
    for number, (value, has_payload, keeps_bytes, problem) in enumerate(HOSTILE.values()):
        partition = Partition(f"orders-{number}", 0)
        claimed(engine, partition)

        write(engine, partition, rows_of(partition, [envelope(), value, envelope()]))

        before, row, after = stored(engine, partition.topic, "raw, problem")
        assert [before["problem"], after["problem"]] == [None, None]
        assert parsed(before["payload"]) == parsed(after["payload"]) == parsed(envelope())
        if jsonb_cannot_hold(value):
            assert row["payload"] is None
            assert row["raw"] == value
            assert str(row["problem"]).startswith("jsonb cannot hold the value (")
        else:
            assert (row["payload"] is not None) == has_payload, value
            assert row["raw"] == (value if keeps_bytes else None), value
            assert str(row["problem"] or "").startswith(problem or ""), value


@pytest.mark.both_postgres
@pytest.mark.parametrize("bad", [1, 3, 20])
def test_only_the_refused_payloads_of_a_batch_are_left_empty(engine, bad):
    partition = Partition("orders", 0)
    claimed(engine, partition)
    refusals = {
        b"[1e200000]": "22003",
        nested(100_000): "54001",
        # Too deep to be parsed here, and no JSON either.
        b"[" * 3_000 + b"\0": "22021",
        b"[" * 3_000 + b"\xc3\xa4": "22P02",
    }
    good = SAMPLE.read_bytes().splitlines()[:40]
    records = list(good)
    for n in range(bad):
        records.insert(2 * n, list(refusals)[n % len(refusals)])

    write(engine, partition, rows_of(partition, records))

    rows = stored(engine, "orders")
    problems = [str(row["problem"]) for row in rows if row["problem"]]
    assert len(rows) == len(records)
    assert problems == [
        f"jsonb cannot hold the value ({list(refusals.values())[n % len(refusals)]})"
        for n in range(bad)
    ]
    assert [row["raw"] for row in rows if row["problem"]] == records[: 2 * bad : 2]
    assert [parsed(row["payload"]) for row in rows if not row["problem"]] == [*map(parsed, good)]


def test_only_the_refused_payload_is_left_empty_if_the_error_names_no_row(engine, monkeypatch):
    """A server that speaks another language tells the row in words that are not understood."""
    monkeypatch.setattr(failpoints, "_armed", None)
    partition = Partition("orders", 0)
    claimed(engine, partition)
    failpoints.arm(
        {"PIPELINE_ENABLE_FAILPOINTS": "1", "PIPELINE_FAILPOINT": "mid_copy:raise:22P05"}
    )

    write(engine, partition, rows_of(partition, [envelope(), b"[1e200000]", envelope()]))

    assert [row["problem"] for row in stored(engine, "orders")] == [
        None, "jsonb cannot hold the value (22003)", None,
    ]  # fmt: skip


def test_a_row_that_is_refused_for_another_reason_is_an_error(engine):
    partition = Partition("orders", 0)
    claimed(engine, partition)
    [row] = rows_of(partition, [None])

    with pytest.raises(InvariantError, match="COPY of the log was refused"):
        write(engine, partition, [row._replace(headers=b"not JSON")])

    assert stored(engine, "orders") == []


# ------------------------------------------------------------------------------------- any record


def unpacked(headers: object) -> object:
    """Headers as Kafka gave them, from what the log holds."""
    if headers is None:
        return None

    def plain(part: object) -> bytes | None:
        if part is None:
            return None
        if isinstance(part, dict):
            return base64.b64decode(part["base64"])
        assert isinstance(part, str)
        return part.encode()

    assert isinstance(headers, list)
    return [((plain(name) or b"").decode(), plain(value)) for name, value in headers]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(values, st.none() | st.binary(max_size=20), header_lists,
                  st.none() | st.integers(-62_135_596_800_000, 253_402_300_799_999)),
        min_size=1, max_size=12,
    )
)  # fmt: skip
@pytest.mark.both_postgres
def test_any_bytes_are_in_the_log_unchanged(engine, records):
    partition = Partition(f"orders-{secrets.token_hex(6)}", 0)
    claimed(engine, partition)
    rows = [
        read(Record(*partition, n, value, key, headers, milliseconds, 1))
        for n, (value, key, headers, milliseconds) in enumerate(records)
    ]

    write(engine, partition, rows)

    found = stored(engine, partition.topic)
    assert [row["offset"] for row in found] == list(range(len(records)))
    for (value, key, headers, milliseconds), row in zip(records, found, strict=True):
        assert row["key"] == key
        assert unpacked(row["headers"]) == (headers or None)
        at = row["kafka_timestamp"]
        assert (at is None) == (milliseconds is None)
        if row["raw"] is not None or value is None:
            assert row["raw"] == value
        else:
            assert parsed(row["payload"]) == parsed(value)
            assert not row["problem"] or "envelope" in str(row["problem"])


@pytest.mark.parametrize("milliseconds", [-210_866_803_200_000, -1, 9_224_318_015_999_999])
def test_a_time_at_the_end_of_the_calendar_is_written(engine, milliseconds):
    partition = Partition("orders", 0)
    claimed(engine, partition)

    write(engine, partition, [read(Record(*partition, 0, b"1", None, None, milliseconds, 1))])

    [row] = stored(engine, "orders", "extract(epoch from kafka_timestamp) * 1000 AS milliseconds")
    assert row["milliseconds"] == milliseconds


def test_a_time_that_postgresql_cannot_hold_is_the_only_value_left_empty(engine):
    partition = Partition("orders", 0)
    claimed(engine, partition)
    odd = [2**63 - 1, -(2**63), 9_224_318_016_000_000, -210_866_803_200_001]

    write(
        engine,
        partition,
        [read(Record(*partition, n, envelope(), None, None, at, 1)) for n, at in enumerate(odd)],
    )

    assert [row["kafka_timestamp"] for row in stored(engine, "orders")] == [None] * 4


def test_a_record_of_5_megabytes_is_in_the_log(engine):
    partition = Partition("orders", 0)
    claimed(engine, partition)
    large = envelope(note="x" * 5_000_000)

    write(engine, partition, rows_of(partition, [large, b"y" * 5_000_000]))

    event, text_only = stored(engine, "orders")
    assert parsed(event["payload"]) == parsed(large)
    assert text_only["raw"] == b"y" * 5_000_000


# ---------------------------------------------------------------------------------- errors, secrets


def text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.both_postgres
def test_no_error_quotes_a_record(engine):
    partition = Partition("orders", 0)
    held = claimed(engine, partition)
    record = Record(
        *partition, 0, envelope(note=CANARY), CANARY.encode(), [(CANARY, CANARY.encode())], None, 0
    )
    row = read(record)
    write(engine, partition, [row])
    errors = []

    for attempt in (
        row,  # its place is taken
        row._replace(offset=1, headers=f'["{CANARY}'.encode()),
        row._replace(offset=1, event_id=CANARY.encode()),
        row._replace(offset=SPAN + 1),
    ):
        with pytest.raises((InvariantError, MissingSegmentError)) as raised:
            write(engine, partition, [attempt], expected=1)
        errors.append(raised.value)
    with pytest.raises(PoisonRecordError) as poison, transaction(engine) as db:
        db.execute(text("SELECT CAST(:value AS jsonb)"), {"value": CANARY})
    errors.append(poison.value)

    assert held
    assert [error for error in errors if CANARY in text_of(error)] == []


def test_no_error_quotes_a_password(database):
    url = psycopg.conninfo.conninfo_to_dict(database.dsn)
    at = f"{url['host']}:{url['port']}/{database.name}"
    errors = []

    for address, kind in (
        (f"postgres:{CANARY}@{at}", ConfigurationError),
        (f"nobody:{CANARY}@{at}", ConfigurationError),
        (f"postgres:{CANARY}@127.0.0.1:1/{database.name}", TransientError),
        (f"postgres:{CANARY}@no-such-host.invalid/{database.name}", TransientError),
    ):
        engine = open_engine(f"postgresql+psycopg://{address}", application="test")
        with pytest.raises(kind) as raised, transaction(engine):
            pass
        errors.append(raised.value)
        assert CANARY not in repr(engine)
        engine.dispose()

    assert [error for error in errors if CANARY in text_of(error)] == []


def test_a_missing_segment_is_distinguished_from_a_refused_value(engine):
    partition = Partition("orders", 0)
    claimed(engine, partition)

    with pytest.raises(MissingSegmentError):
        write(engine, partition, rows_of(partition, [b"1"], first=SPAN))

    with transaction(engine) as db:
        assert claims.lock_ownerships(db, [partition])[partition].next_offset == 0
        make_segment(db, "orders", NextOffset(SPAN), SPAN)
    write(engine, partition, rows_of(partition, [b"1"], first=SPAN))
    assert [row["offset"] for row in stored(engine, "orders")] == [SPAN]
