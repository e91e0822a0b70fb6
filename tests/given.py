"""The start of tests of read models: events in the log, written as the ingester writes them.

``given(events).project(orders)`` delivers through the real projection loop, so checkpoints, locks
and dead letters do their work, and gives the rows of the projector's table.
"""

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Engine, Row, text

from pipeline import catalogue
from pipeline import events as reading
from pipeline.catalogue import Catalogue
from pipeline.db import open_engine, transaction, translated
from pipeline.ingest.repeats import RepeatWindow
from pipeline.log import append as writing
from pipeline.log import claims, offsets
from pipeline.log.claims import Owner
from pipeline.log.copying import encode
from pipeline.log.segments import make_segment
from pipeline.partitions import Advance, Epoch, NextOffset, Offset, Partition, after
from pipeline.projection.loop import Limits, run_projection
from pipeline.readmodel import Projector
from pipeline.schema import execute
from tests.servers.databases import Database

TOPIC = "Notifications"
SAMPLE = Path(__file__).parent / "data" / "sample_events.jsonl"
REPEAT_WINDOW = 10_000
SEGMENT = 10_000_000

Event = Mapping[str, Any]


# ------------------------------------------------------------------------------------------- events


def sample_events() -> list[Event]:
    """574 events of all types whose references and sums agree, in the order of their times."""
    return [json.loads(line) for line in SAMPLE.read_text().splitlines()]


def some_id(name: str) -> str:
    """An id that is the same for the same name."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))


def moment(at: str | float) -> str:
    """``10:00:05`` on the tests' day, or a number of seconds after midnight, in RFC 3339."""
    if isinstance(at, str):
        return f"2026-01-12T{at}Z"
    return (datetime(2026, 1, 12, tzinfo=UTC) + timedelta(seconds=at)).isoformat()


def event(kind: str, body: Any, *, at: str | float = "10:00:00", name: str | None = None) -> Event:
    """An event with its envelope; the same ``name`` gives the same event id."""
    return {
        "id": some_id(name) if name else str(uuid.uuid4()),
        "created_at": moment(at),
        "type": kind,
        "object": body,
    }


def order_event(
    status: str,
    *,
    at: str | float,
    order: str = "an order",
    name: str | None = None,
    **changes: Any,
) -> Event:
    """``ORDER.<status>``, as Upvest writes it, with ``changes`` to the object."""
    body = {
        "id": some_id(order),
        "created_at": moment("09:00:00"),
        "updated_at": moment(at),
        "user_id": some_id("a user"),
        "account_id": some_id("an account"),
        "cash_amount": "600.00",
        "currency": "EUR",
        "side": "BUY",
        "instrument_id": "IE00ZQ7B0228",
        "instrument_id_type": "ISIN",
        "order_type": "MARKET",
        "quantity": "",
        "limit_price": "",
        "stop_price": "",
        "status": status,
        "fee": "0",
        "initiation_flow": "API",
        "execution_flow": "STRAIGHT_THROUGH",
        "executions": [],
        "client_reference": "",
    }
    return event(f"ORDER.{status}", {**body, **changes}, at=at, name=name)


def execution(status: str, *, execution: str = "an execution", **changes: Any) -> dict[str, Any]:
    """An execution as in its own event and inside its order."""
    body = {
        "id": some_id(execution),
        "order_id": some_id("an order"),
        "cash_amount": "240.00",
        "currency": "EUR",
        "price": "87.955",
        "share_quantity": "2.7286680689",
        "side": "BUY",
        "status": status,
        "taxes": [{"type": "TOTAL", "amount": "0"}],
        "transaction_time": moment("10:00:00.727"),
        "settlement_date": "2026-01-14",
    }
    return {**body, **changes}


def execution_event(
    status: str, *, at: str | float, name: str | None = None, **changes: Any
) -> Event:
    """``EXECUTION.<status>``."""
    return event(f"EXECUTION.{status}", execution(status, **changes), at=at, name=name)


# ---------------------------------------------------------------------------------------------- log


class Log:
    """The log of a test's database, written through the service's own claim and append."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: dict[Partition, Epoch] = {}
        self._next: dict[Partition, NextOffset] = {}
        self._windows: dict[Partition, RepeatWindow] = {}

    def append(
        self,
        records: Iterable[Event | bytes | None],
        *,
        topic: str = TOPIC,
        partition: int = 0,
        gap: int = 0,
    ) -> list[Offset]:
        """Write records at the end of a partition, in one transaction.

        Args:
            records: Events, or the bytes of a record; None is a tombstone.
            topic: Topic to write to.
            partition: Its partition.
            gap: Offsets left unused before each record, as Kafka leaves them.

        Returns:
            Their offsets.
        """
        target = Partition(topic, partition)
        with transaction(self._engine) as db:
            if target not in self._held:
                self._claim(db, target)
            expected = self._next[target]
            rows = []
            end = expected
            for record in records:
                value = record if isinstance(record, bytes | None) else json.dumps(record).encode()
                offset = Offset(end + gap)
                row = reading.read(
                    reading.Record(topic, partition, offset, value, None, None, None, 0)
                )
                rows.append(encode(self._windows[target].mark(row)))
                end = after(offset)
            advance = Advance(self._held[target], expected, end, None)
            writing.append(db, rows, {target: advance})
        self._next[target] = end
        return [Offset(row.offset) for row in rows]

    def _claim(self, db: Any, partition: Partition) -> None:
        offsets.begin(db, partition, NextOffset(0))
        claim = claims.claim(db, partition, Owner(group="tests", member="tests"))
        make_segment(db, partition.topic, claim.next_offset, SEGMENT)
        self._held[partition] = claim.epoch
        self._next[partition] = claim.next_offset
        self._windows[partition] = RepeatWindow(REPEAT_WINDOW, [])


# ------------------------------------------------------------------------------------------- tables


def full(table: str) -> str:
    """A read model's table with its schema."""
    return catalogue.load().tables[table].fullname


def rows_of(engine: Engine, table: str, *, schema: str | None = None) -> Sequence[Row[Any]]:
    """Every row of a table, in the order of its primary key; with its personal columns."""
    names = [f"{schema}.{table}"] if schema else [f"upvest_personal.{table}", f"upvest.{table}"]
    with transaction(engine) as db:
        [name] = db.execute(FIRST_TABLE, {"names": names}).scalars()
        key = db.execute(PRIMARY_KEY, {"table": name}).scalar_one()
        return db.execute(text(f"SELECT * FROM {name} ORDER BY {key}")).all()


FIRST_TABLE = text("""
    SELECT n.name FROM unnest(CAST(:names AS text[])) WITH ORDINALITY AS n(name, place)
    WHERE to_regclass(n.name) IS NOT NULL ORDER BY n.place LIMIT 1
""")
PRIMARY_KEY = text("""
    SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY k.place)
    FROM pg_index i
    CROSS JOIN LATERAL unnest(i.indkey::int[]) WITH ORDINALITY AS k(attnum, place)
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
    WHERE i.indisprimary AND i.indrelid = CAST(:table AS regclass)
""")


def contents(engine: Engine, projectors: Iterable[Projector], *, machinery: bool = True) -> Any:
    """The tables of projectors as data that can be compared to the last digit.

    Args:
        engine: The database.
        projectors: The owners of the tables.
        machinery: Include the underscore columns, which name the event of a row.
    """
    found = {}
    for projector in projectors:
        for table in projector.tables:
            columns = [
                column.name
                for column in table.columns
                if machinery or not column.name.startswith("_")
            ]
            listed = ", ".join(f'"{name}"' for name in columns)
            keys = ", ".join(f'"{column.name}"' for column in table.primary_key)
            with transaction(engine) as db:
                # As text: 1.0 and 1.00 are equal numbers, but not the same bytes.
                query = f"SELECT ROW({listed})::text FROM {table.fullname} ORDER BY {keys}"
                found[table.name] = db.execute(text(query)).scalars().all()
    return found


def create_tables(engine: Engine, *projectors: Projector) -> None:
    """Create the tables of read models, as `pipeline migrate` does."""
    declared = catalogue.load()
    models = sorted((*declared.models, *projectors), key=lambda model: model.name)
    with translated(), engine.connect() as db:
        execute.make(db, Catalogue(tuple(models), declared.views), lambda _step: None)


class Given:
    """A database with a log; call it to add events, then ``project``."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.engine = open_engine(database.url, application="pipeline test", pool_size=8)
        self.log = Log(self.engine)

    def __call__(
        self,
        records: Iterable[Event | bytes | None] = (),
        *,
        topic: str = TOPIC,
        partition: int = 0,
    ) -> Self:
        """Append records to a partition of the log."""
        self.log.append(records, topic=topic, partition=partition)
        return self

    def project(self, *projectors: Projector, limits: Limits | None = None) -> Sequence[Row[Any]]:
        """Bring the read models to the end of the log; the rows of the first model's table."""
        run_projection(self.engine, projectors, limits, until_end=True)
        return self.rows(projectors[0].name)

    def rows(self, table: str) -> Sequence[Row[Any]]:
        """Every row of a read model, in the order of its key."""
        return rows_of(self.engine, table)

    def execute(self, statement: str, **parameters: Any) -> None:
        """Run a statement in a transaction of its own."""
        with transaction(self.engine) as db:
            db.execute(text(statement), parameters)

    def query(self, statement: str, **parameters: Any) -> Sequence[Row[Any]]:
        """The rows of a query."""
        with transaction(self.engine) as db:
            return db.execute(text(statement), parameters).all()

    def scalar(self, statement: str, **parameters: Any) -> Any:
        """The only value of a query."""
        with transaction(self.engine) as db:
            return db.execute(text(statement), parameters).scalar_one()

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()
