"""The queries of the demo: every number that it shows comes from here."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, Engine, Row, select, text

from pipeline import catalogue
from pipeline.db import transaction
from pipeline.log.ranges import ranges
from pipeline.log.watermarks import partition_rows
from pipeline.partitions import NextOffset, Partition, lag
from pipeline.projection import checkpoints
from pipeline.sandbox.simulator import Books

DIGESTS = text('SELECT "partition", "offset", digest FROM pipeline.events')

EVENTS_BY_TYPE = text("""
SELECT event_type, count(*) AS events FROM pipeline.events
WHERE event_type IS NOT NULL GROUP BY event_type ORDER BY events DESC, event_type
""")
ORDERS_BY_STATUS = text("""
SELECT status, count(*) AS orders, sum(executions)::bigint AS executions,
       round(coalesce(sum(filled_amount) FILTER (WHERE currency = 'EUR'), 0), 2) AS filled_eur
FROM upvest.order_book GROUP BY status ORDER BY orders DESC, status
""")
TOP_HOLDINGS = text("""
SELECT instrument_name, isin, count(*) AS accounts, round(sum(quantity), 4) AS units
FROM upvest.holdings GROUP BY instrument_uuid, instrument_name, isin
ORDER BY accounts DESC, units DESC, isin LIMIT 6
""")
CASH = text("""
SELECT currency, count(balance) AS balances, sum(entries)::bigint AS entries,
       sum(balance) AS reported, sum(ledger_sum) AS summed,
       count(*) FILTER (WHERE is_break) AS breaks
FROM upvest.cash_reconciliation GROUP BY currency ORDER BY currency
""")
BALANCES = text("SELECT account_group_id, currency, balance FROM upvest.cash_balances")

PROBLEMS = text("""
SELECT problem, count(*) AS records, count(raw) AS with_bytes FROM pipeline.events
WHERE problem IS NOT NULL GROUP BY problem ORDER BY records DESC, problem
""")
REPEATS = text("SELECT count(*) FROM pipeline.events WHERE repeat_of IS NOT NULL")
DEAD_LETTERS = text("""
SELECT projector, column_name, sqlstate, count(*) AS events FROM pipeline.dead_letters
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
""")
DEAD_EVENTS = text("""
SELECT e.event_id FROM pipeline.dead_letters d
JOIN pipeline.events e USING (topic, "partition", "offset")
""")
DELAY = text("""
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY late) AS median,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY late) AS nearly_all
FROM (SELECT extract(epoch FROM ingested_at - kafka_timestamp) * 1000 AS late
      FROM pipeline.events) e
""")

SHUT_ORDERS = text("LOCK TABLE upvest.orders IN ACCESS EXCLUSIVE MODE")
TRUNCATE_ORDERS = text("TRUNCATE upvest.orders")
COUNT_ORDERS = text("SELECT count(*) FROM upvest.orders")


class Standing(NamedTuple):
    """Records in the log, and of these the ones that every read model has taken."""

    logged: int
    projected: int


class Truncation(NamedTuple):
    """Rows of orders before and right after, and where the log ended then."""

    before: int
    after: int
    log_ends: Mapping[Partition, NextOffset]
    logged: int


class CashComparison(NamedTuple):
    """Balances against the simulator's books, to the cent and beyond."""

    balances: int
    differing: int


def logged(engine: Engine) -> int:
    """Records in the log: in the mock broker every offset is a record."""
    with transaction(engine) as db:
        return _logged(db)


def _logged(db: Connection) -> int:
    return sum(offsets.span for offsets in ranges(db).values())


def standing(engine: Engine, projectors: Sequence[str]) -> Standing:
    """How far the log and the read models are."""
    with transaction(engine) as db:
        in_log = _logged(db)
        slowest: dict[Partition, int] = {}
        for progress in checkpoints.progress(db, projectors):
            taken = lag(progress.log_first, max(progress.next_offset, progress.log_first))
            slowest[progress.partition] = min(taken, slowest.get(progress.partition, taken))
    return Standing(in_log, min(in_log, sum(slowest.values())))


def owners(engine: Engine) -> dict[int, list[int]]:
    """Which process reads which partitions."""
    with transaction(engine) as db:
        rows = partition_rows(db)
    partitions: dict[int, list[int]] = {}
    for row in rows:
        if row.owner_pid is not None:
            partitions.setdefault(row.owner_pid, []).append(row.partition)
    return partitions


def digests(engine: Engine) -> dict[tuple[int, int], bytes | None]:
    """Every record of the log by its place, with the digest of its bytes."""
    with transaction(engine) as db:
        return {(row.partition, row.offset): row.digest for row in db.execute(DIGESTS)}


def truncate_orders(engine: Engine) -> Truncation:
    """Empty the table, counting on both sides while nobody else can write."""
    with transaction(engine) as db:
        db.execute(SHUT_ORDERS)
        before = _number(db, COUNT_ORDERS)
        db.execute(TRUNCATE_ORDERS)
        after = _number(db, COUNT_ORDERS)
        ends = {partition: offsets.end for partition, offsets in ranges(db).items()}
        return Truncation(before, after, ends, _logged(db))


def orders_reach(engine: Engine, goal: Mapping[Partition, NextOffset]) -> bool:
    """Whether `orders` has taken everything up to these places again."""
    with transaction(engine) as db:
        places = checkpoints.next_offsets(db, "orders")
    return all(places.get(partition, 0) >= end for partition, end in goal.items())


def rows(engine: Engine, question: Any) -> Sequence[Row[Any]]:  # noqa: ANN401 - a constant above
    """The answer to one of the constants above."""
    with transaction(engine) as db:
        return db.execute(question).all()


def number(engine: Engine, question: Any) -> int:  # noqa: ANN401 - a constant above
    """The same, where it is one number."""
    with transaction(engine) as db:
        return _number(db, question)


def _number(db: Connection, question: Any) -> int:  # noqa: ANN401 - a constant above
    return int(db.execute(question).scalar_one())


def compare_cash(engine: Engine, books: Iterable[Books]) -> CashComparison:
    """Each balance that the tables or the books know, compared exactly."""
    told: dict[tuple[object, ...], object] = {
        (row.account_group_id, row.currency): row.balance for row in rows(engine, BALANCES)
    }
    wanted: dict[tuple[object, ...], object] = {}
    for simulated in books:
        names = simulated.columns("cash_balances")
        places = [names.index(name) for name in ("account_group_id", "currency", "balance")]
        for row in simulated.rows("cash_balances"):
            group, currency, balance = (row[place] for place in places)
            wanted[group, currency] = balance
    both = told.keys() | wanted.keys()
    return CashComparison(len(both), sum(told.get(key) != wanted.get(key) for key in both))


def compare_books(engine: Engine, books: Sequence[Books]) -> tuple[int, int, int]:
    """Every read model against the books: how many tables, rows, and rows that differ."""
    compared = differing = 0
    declared = catalogue.load().tables
    for name in books[0].tables:
        table = declared[name]
        columns = [table.c[column] for column in books[0].columns(name)]
        found = Counter(tuple(row) for row in rows(engine, select(*columns)))
        wanted = Counter(row for simulated in books for row in simulated.rows(name))
        compared += wanted.total()
        differing += (found - wanted).total() + (wanted - found).total()
    return len(books[0].tables), compared, differing


def dead_events(engine: Engine) -> set[UUID]:
    """The events that a read model could not take."""
    return {row.event_id for row in rows(engine, DEAD_EVENTS)}


def delay_ms(engine: Engine) -> tuple[int, int]:
    """From the producer's clock to the batch that wrote the record: median, and 99 of 100."""
    [row] = rows(engine, DELAY)
    return round(row.median or Decimal(0)), round(row.nearly_all or Decimal(0))
