"""Segments: every offset of a topic has one, made once, and nobody changes what is in it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import Engine, text

from pipeline.db import open_engine, transaction
from pipeline.errors import MissingSegmentError, PoisonRecordError
from pipeline.log import claims, offsets
from pipeline.log.append import append
from pipeline.log.claims import Owner
from pipeline.log.segments import make_segment
from pipeline.partitions import NextOffset, Partition
from tests.contract.logs import advance, row_at

SPAN = 1000


@pytest.fixture
def engine(database) -> Iterator[Engine]:
    engine = open_engine(database.url, application="test")
    yield engine
    engine.dispose()


def make(engine: Engine, topic: str, offset: int, span: int = SPAN) -> tuple[int, int]:
    with transaction(engine) as db:
        return make_segment(db, topic, NextOffset(offset), span)


def write(engine: Engine, partition: Partition, *at: int) -> None:
    """Records at these offsets, by a new owner."""
    with transaction(engine) as db:
        if partition.number not in offsets.lock_origins(db, partition.topic):
            offsets.begin(db, partition, NextOffset(0))
        claim = claims.claim(db, partition, Owner("tests", "member"))
    step = advance(claim.epoch, claim.next_offset, max(at) + 1)
    with transaction(engine) as db:
        append(db, [row_at(partition, offset) for offset in at], {partition: step})


def segments(engine: Engine) -> list[tuple[str, int, int]]:
    with transaction(engine) as db:
        found = db.execute(
            text(
                "SELECT topic, first_offset, end_offset FROM pipeline.segments "
                "ORDER BY topic, first_offset"
            )
        )
        return [(row.topic, row.first_offset, row.end_offset) for row in found]


def tables(engine: Engine) -> list[str]:
    with transaction(engine) as db:
        return list(
            db.execute(
                text(
                    "SELECT inhrelid::regclass::text FROM pg_inherits "
                    "WHERE inhparent = 'pipeline.events'::regclass ORDER BY 1"
                )
            ).scalars()
        )


@pytest.mark.both_postgres
def test_a_segment_holds_the_offsets_of_all_partitions_of_its_topic(engine):
    made = [make(engine, "orders", offset) for offset in (0, 999, 1000, 2500)]

    write(engine, Partition("orders", 0), 0, 999, 1000, 2999)
    write(engine, Partition("orders", 7), 5, 2500)

    assert made == [(0, 1000), (0, 1000), (1000, 2000), (2000, 3000)]
    assert segments(engine) == [("orders", n, n + 1000) for n in (0, 1000, 2000)]
    assert len(tables(engine)) == 3


@pytest.mark.both_postgres
def test_segments_of_another_span_fit_between_their_neighbours(engine):
    made = [
        make(engine, "orders", 1500, 1000),
        make(engine, "orders", 100, 10_000),
        make(engine, "orders", 2100, 5000),
        make(engine, "orders", 7000, 1000),
        make(engine, "orders", 5500, 10_000),
        make(engine, "orders", 8500, 100_000),
    ]

    write(engine, Partition("orders", 0), 0, 999, 1000, 1999, 2000, 4999, 5500, 7999, 8000, 99_999)

    # The hole between 5000 and 7000 is filled by the fifth, the rest by the last.
    assert made == [
        (1000, 2000), (0, 1000), (2000, 5000), (7000, 8000), (5000, 7000), (8000, 100_000),
    ]  # fmt: skip


def test_an_offset_between_segments_has_no_segment_until_it_is_created(engine):
    make(engine, "orders", 0)
    make(engine, "orders", 2000)

    with pytest.raises(MissingSegmentError):
        write(engine, Partition("orders", 0), 0, 1500, 2000)
    assert make(engine, "orders", 1500) == (1000, 2000)

    write(engine, Partition("orders", 0), 0, 1500, 2000)


def test_two_workers_that_need_the_same_segment_create_it_once(engine):
    together = threading.Barrier(4)

    def want(topic: str) -> tuple[int, int]:
        together.wait(10)
        return make(engine, topic, 1234)

    with ThreadPoolExecutor(4) as pool:
        for n in range(5):
            assert set(pool.map(want, [f"orders-{n}"] * 4)) == {(1000, 2000)}

    assert segments(engine) == [(f"orders-{n}", 1000, 2000) for n in range(5)]


def test_creating_a_segment_blocks_no_writer(engine):
    make(engine, "orders", 0)
    partition = Partition("orders", 0)

    with engine.connect() as db:
        make_segment(db, "orders", NextOffset(1000), SPAN)
        write(engine, partition, 0, 1)
        db.commit()

    write(engine, partition, 2, 1000)


LONG = "a" * 248


HOSTILE = [
    "UPPER.lower_1-2", 'quote"quote', "quote'quote", "dollar$$quote", "per%cent", "back\\slash",
    "new\nline", "..", "_", "-", "Grüße", "topic; DROP TABLE pipeline.events; --",
    f"{LONG}1", f"{LONG}2", "orders.v1", "orders_v1", "orders-v1", "ORDERS.V1",
]  # fmt: skip


@pytest.mark.both_postgres
def test_topics_with_hostile_names_have_segments_of_their_own(engine):
    for topic in HOSTILE:
        make(engine, topic, 0)
        make(engine, topic, 9_000_000_000_000_000)
        write(engine, Partition(topic, 0), 0, 7)

    found = sorted((topic, first, end) for topic, first, end in segments(engine) if first == 0)
    assert found == sorted((topic, 0, SPAN) for topic in HOSTILE)
    assert len(tables(engine)) == 2 * len(HOSTILE)
    with transaction(engine) as db:
        counted = db.execute(text("SELECT topic, count(*) FROM pipeline.events GROUP BY topic"))
        assert sorted(counted.all()) == sorted((topic, 2) for topic in HOSTILE)


def test_an_impossible_segment_is_refused(engine):
    for offset, span in ((-1, 1000), (0, 999), (0, 0), (0, -5)):
        with pytest.raises(PoisonRecordError):
            make(engine, "orders", offset, span)

    assert tables(engine) == []


# ------------------------------------------------------------------------------------- append-only

CHANGES = [
    'UPDATE {} SET problem = \'changed\'',
    "UPDATE {} SET payload = '1' WHERE false",
    "DELETE FROM {}",
    "DELETE FROM {} WHERE false",
    "TRUNCATE {}",
    "TRUNCATE {} CASCADE",
    'INSERT INTO {} (topic, "partition", "offset") VALUES (\'orders\', 0, 0) '
    'ON CONFLICT (topic, "partition", "offset") DO UPDATE SET problem = \'changed\'',
    'MERGE INTO {} e USING (SELECT 1) s ON e.topic = \'orders\' WHEN MATCHED THEN DELETE',
]  # fmt: skip


@pytest.mark.both_postgres
def test_nothing_that_changes_the_log_is_allowed_on_it_or_on_any_segment(engine, database):
    make(engine, "orders", 0)
    make(engine, "orders", 1000)
    write(engine, Partition("orders", 0), 0, 1000)
    tables_of_log = [Identifier("pipeline", "events")]
    tables_of_log += [Identifier(*name.split(".")) for name in tables(engine)]
    assert len(tables_of_log) == 3
    allowed = []

    with database.connect() as owner:
        before = owner.execute("SELECT * FROM pipeline.events ORDER BY 3").fetchall()
        for table in tables_of_log:
            for change in CHANGES:
                try:
                    owner.execute(SQL(change).format(table))
                except psycopg.errors.InsufficientPrivilege as refused:
                    assert "append-only" in str(refused)  # noqa: PT017 - each of them must say so
                else:
                    allowed.append((table, change))
        after = owner.execute("SELECT * FROM pipeline.events ORDER BY 3").fetchall()

    assert allowed == []
    assert before == after


@pytest.mark.both_postgres
def test_a_segment_has_the_indexes_the_defaults_and_the_comments_of_the_log(engine, database):
    make(engine, "orders", 0)
    [segment] = tables(engine)
    described = """
        SELECT a.attname, a.attnotnull, col_description(a.attrelid, a.attnum),
               pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = %s::regclass AND a.attnum > 0 ORDER BY a.attnum
    """
    indexed = """
        SELECT pg_get_indexdef(indexrelid, k, true), indisprimary
        FROM pg_index, generate_series(1, indnatts) k
        WHERE indrelid = %s::regclass ORDER BY 1, 2
    """

    with database.connect() as connection:
        for query in (described, indexed):
            of_log = connection.execute(query, ["pipeline.events"]).fetchall()
            assert connection.execute(query, [segment]).fetchall() == of_log
            assert of_log
        comment = connection.execute("SELECT obj_description(%s::regclass)", [segment]).fetchone()

    assert comment == ("Events of topic orders, offsets 0 to 999.",)
