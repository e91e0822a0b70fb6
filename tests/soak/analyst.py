"""Somebody who looks all the time, and knows what must be so at every single moment.

Each look is one REPEATABLE READ transaction. What it may never see: an offset or an epoch that
falls, a record that is missing below ``next_offset`` or stands above it, a checkpoint that falls or
is ahead of the log, a table that gets shorter, an event that a read model has passed and does not
hold. TRUNCATE is the one excuse, and it is announced beforehand.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import namedtuple_row
from psycopg.sql import SQL, Identifier

from pipeline import catalogue
from pipeline.partitions import Partition
from tests.given import full
from tests.servers.databases import Database
from tests.soak.journal import Journal

LOOK_SECONDS_MIN = 0.5
RESTS_PER_LOOK = 4
"""It rests so many times as long as it looks: it is not what is measured."""
LATEST_OFFSETS = 500
"""How many offsets below each checkpoint are looked for in the read models."""

# First of all, before the snapshot: it would not see a TRUNCATE that comes in between.
HOLD_STILL = SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(
    SQL(", ").join(
        Identifier("upvest", table.name)
        for projector in sorted(catalogue.load().models, key=lambda one: one.name)
        for table in projector.tables
    )
)
OFFSETS = """
SELECT topic, "partition", first_offset, next_offset, epoch, problem
FROM pipeline.consumer_offsets
"""
# Everything from where the last look ended, also what must not be there.
GROWN = """
SELECT count(*) AS records, min("offset") AS lowest, max("offset") AS highest
FROM pipeline.events WHERE topic = %s AND "partition" = %s AND "offset" >= %s
"""
CHECKPOINTS = """
SELECT projector, topic, "partition", next_offset FROM pipeline.projection_checkpoints
WHERE projector NOT LIKE '%@rebuild'
"""
COUNTS = SQL("SELECT {}").format(
    SQL(", ").join(
        SQL("(SELECT count(*) FROM upvest.{}) AS {}").format(
            Identifier(projector.name), Identifier(projector.name)
        )
        for projector in catalogue.load().models
    )
)
# Events just below the checkpoint that are neither in the read model nor among the dead letters.
# Chaos spoils no key of an event that is one.
UNSEEN = """
SELECT count(*) AS events, min(e."offset") AS lowest FROM pipeline.events e
WHERE e.topic = %(topic)s AND e."partition" = %(number)s
  AND e."offset" >= %(first)s AND e."offset" < %(end)s
  AND e.problem IS NULL AND e.event_type LIKE %(type)s
  AND NOT EXISTS (SELECT FROM {table} t WHERE {key})
  AND NOT EXISTS (SELECT FROM pipeline.dead_letters d WHERE d.projector = '{projector}'
                  AND d.topic = e.topic AND d."partition" = e."partition"
                  AND d."offset" = e."offset")
"""


class _Seen(NamedTuple):
    """What a read model must hold of an event."""

    type: str
    key: str


_UUID = "t.{} = (e.payload #>> '{{object,{}}}')::uuid"
_TEXT = "t.{} = e.payload #>> '{{object,{}}}'"


def _key(**columns: str) -> str:
    return " AND ".join(
        (_TEXT if column in ("currency", "transaction_type") else _UUID).format(column, path)
        for column, path in columns.items()
    )


SEEN = {
    "orders": _Seen("ORDER.%", _key(order_id="id")),
    "users": _Seen("USER.CREATED", _key(user_id="id")),
    "accounts": _Seen("ACCOUNT.CREATED", _key(account_id="id")),
    "cash_transactions": _Seen(
        "CASH_TRANSACTION.EXECUTED", _key(cash_transaction_id="id", transaction_type="type")
    ),
    "security_transactions": _Seen(
        "SECURITY_TRANSACTION.EXECUTED",
        _key(security_transaction_id="id", transaction_type="type"),
    ),
    "cash_balances": _Seen(
        "CASH_BALANCE.UPDATED", _key(account_group_id="account_group_id", currency="currency")
    ),
    "positions": _Seen(
        "POSITION.UPDATED", _key(account_id="account_id", instrument_uuid="instrument,uuid")
    ),
}

# The sums of the ledgers, and the balances as last told, straight from the log: up to where the
# read model stands in each partition, whatever is late or astray, both must be the same.
_BELOW = """
FROM pipeline.events e JOIN pipeline.projection_checkpoints c
  ON c.projector = '{table}' AND c.topic = e.topic AND c."partition" = e."partition"
 AND e."offset" < c.next_offset
WHERE e.problem IS NULL AND e.event_type = '{type}'
  AND e.payload #>> '{{object,{amount}}}' ~ '^-?[0-9]+([.][0-9]+)?$'
  AND NOT EXISTS (SELECT FROM pipeline.dead_letters d WHERE d.projector = c.projector
                  AND d.topic = e.topic AND d."partition" = e."partition"
                  AND d."offset" = e."offset")
"""
AUDITS = {
    "sums of the cash ledger": """
        WITH entries AS (
            SELECT DISTINCT ON (e.payload #>> '{object,id}', e.payload #>> '{object,type}')
                   (e.payload #>> '{object,account_group_id}')::uuid AS one,
                   e.payload #>> '{object,delta,currency}' AS two,
                   (e.payload #>> '{object,delta,amount}')::numeric AS amount
        """
    + _BELOW.format(
        amount="delta,amount", table="cash_transactions", type="CASH_TRANSACTION.EXECUTED"
    )
    + """),
        told AS (SELECT one, two, sum(amount) AS amount FROM entries GROUP BY one, two),
        held AS (SELECT account_group_id AS one, currency AS two, ledger_sum AS amount
                 FROM upvest.cash_reconciliation WHERE entries > 0)""",
    "sums of the securities ledger": """
        WITH entries AS (
            SELECT DISTINCT ON (e.payload #>> '{object,id}', e.payload #>> '{object,type}')
                   (e.payload #>> '{object,account_id}')::uuid AS one,
                   (e.payload #>> '{object,instrument,uuid}')::uuid AS two,
                   (e.payload #>> '{object,delta,amount}')::numeric AS amount
        """
    + _BELOW.format(
        amount="delta,amount", table="security_transactions", type="SECURITY_TRANSACTION.EXECUTED"
    )
    + """),
        told AS (SELECT one, two, sum(amount) AS amount FROM entries GROUP BY one, two),
        held AS (SELECT account_id AS one, instrument_uuid AS two, ledger_sum AS amount
                 FROM upvest.position_reconciliation WHERE entries > 0)""",
    "cash balances": """
        WITH told AS (
            SELECT DISTINCT ON (one, two)
                   (e.payload #>> '{object,account_group_id}')::uuid AS one,
                   e.payload #>> '{object,currency}' AS two,
                   (e.payload #>> '{object,balance}')::numeric AS amount
        """
    + _BELOW.format(amount="balance", table="cash_balances", type="CASH_BALANCE.UPDATED")
    + """
            ORDER BY one, two, e.created_at DESC, e.topic DESC, e."partition" DESC, e."offset" DESC
        ),
        held AS (SELECT account_group_id AS one, currency AS two, balance AS amount
                 FROM upvest.cash_balances)""",
    "positions": """
        WITH told AS (
            SELECT DISTINCT ON (one, two)
                   (e.payload #>> '{object,account_id}')::uuid AS one,
                   (e.payload #>> '{object,instrument,uuid}')::uuid AS two,
                   (e.payload #>> '{object,quantity}')::numeric AS amount
        """
    + _BELOW.format(amount="quantity", table="positions", type="POSITION.UPDATED")
    + """
            ORDER BY one, two, e.created_at DESC, e.topic DESC, e."partition" DESC, e."offset" DESC
        ),
        held AS (SELECT account_id AS one, instrument_uuid AS two, quantity AS amount
                 FROM upvest.positions)""",
}
DIFFERING = """
SELECT count(*) FILTER (WHERE told.amount IS DISTINCT FROM held.amount) AS differing,
       count(*) AS compared
FROM told FULL JOIN held USING (one, two)
"""


class Look(NamedTuple):
    """What one look has found, for the next one to compare with."""

    at: float
    offsets: Mapping[Partition, Any]
    checkpoints: Mapping[tuple[str, Partition], int]
    counts: Mapping[str, int]


class Analyst:
    """Looks all the time, in a thread of its own; what must not be is a failure of the journal.

    Args:
        database: Where it looks.
        journal: Where it complains.
    """

    def __init__(self, database: Database, journal: Journal) -> None:
        self.looks = 0
        self.put_off = 0
        """Looks that somebody's lock or a server that is away has prevented."""
        self.audits = 0
        self.compared = 0
        """Sums and balances that the audits have compared."""
        self._database = database
        self._journal = journal
        self._last: Look | None = None
        self._announced: dict[str, int] = {}
        self._ended: dict[str, float] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="analyst", daemon=True)

    def __enter__(self) -> "Analyst":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def announced(self, projector: str) -> Iterator[None]:
        """While this lasts, the read model may begin anew."""
        with self._lock:
            self._announced[projector] = self._announced.get(projector, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._announced[projector] -= 1
                self._ended[projector] = time.monotonic()

    def look(self) -> None:
        """Look once, and complain about what cannot be."""
        before = self._last
        with self._snapshot() as db:
            looked = self._read(db)
            complaints = list(self._complaints(db, before, looked))
        for complaint in complaints:
            self._journal.fail(f"the analyst saw: {complaint}")
        self._last = looked
        self.looks += 1

    def audit(self) -> None:
        """Compare money and units of the read models with the log, each to the last digit."""
        with self._snapshot() as db:
            for what, statement in AUDITS.items():
                found = db.execute((statement + DIFFERING).encode()).fetchone()
                self.compared += found.compared
                if found.differing:
                    self._journal.fail(
                        f"the analyst saw: {found.differing} of {found.compared} {what} are not "
                        "what the log says up to the checkpoints"
                    )
        self.audits += 1

    def breaks(self) -> int:
        """How many balances are not the sum of their entries; 0 once everything told has come."""
        with self._snapshot() as db:
            return sum(
                db.execute(f"SELECT count(*) FROM upvest.{view} WHERE is_break").fetchone()[0]
                for view in ("cash_reconciliation", "position_reconciliation")
            )

    @contextmanager
    def _snapshot(self) -> Iterator[Any]:
        with self._database.connect(autocommit=False) as db:
            db.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            db.row_factory = namedtuple_row
            db.execute("SET LOCAL lock_timeout = '2s'")
            db.execute("SET LOCAL jit = off")
            db.execute(HOLD_STILL)
            yield db

    def _run(self) -> None:
        rest = LOOK_SECONDS_MIN
        while not self._over.wait(rest):
            began = time.monotonic()
            try:
                self.look()
            except psycopg.OperationalError:
                self.put_off += 1
            except Exception as failure:  # noqa: BLE001 - whatever it is, the soak has failed by it
                self._journal.fail(f"the analyst could not look: {failure!r}")
                return
            rest = max(LOOK_SECONDS_MIN, RESTS_PER_LOOK * (time.monotonic() - began))

    def _read(self, db: Any) -> Look:
        at = time.monotonic()
        offsets = {Partition(row.topic, row.partition): row for row in db.execute(OFFSETS.encode())}
        checkpoints = {
            (row.projector, Partition(row.topic, row.partition)): row.next_offset
            for row in db.execute(CHECKPOINTS.encode())
        }
        counts = db.execute(COUNTS).fetchone()._asdict()
        return Look(at, offsets, checkpoints, counts)

    def _complaints(self, db: Any, before: Look | None, now: Look) -> Iterator[str]:
        for place, row in now.offsets.items():
            known = before.offsets.get(place) if before else None
            yield from self._about_partition(db, place, known, row)
        for (projector, place), checkpoint in now.checkpoints.items():
            end = now.offsets[place].next_offset
            if checkpoint > end:
                yield f"{projector} stands at {checkpoint} of {place}, whose log ends at {end}"
            if projector in SEEN:
                yield from self._unseen(db, projector, place, checkpoint)
        if before is None:
            return
        for (projector, place), checkpoint in before.checkpoints.items():
            fell = now.checkpoints.get((projector, place), -1) < checkpoint
            if fell and not self._is_excused(projector, before.at):
                there = now.checkpoints.get((projector, place))
                yield f"the checkpoint of {projector} in {place} fell from {checkpoint} to {there}"
        for projector, count in before.counts.items():
            if now.counts[projector] < count and not self._is_excused(projector, before.at):
                yield f"{projector} had {count} rows and has {now.counts[projector]}"

    def _about_partition(self, db: Any, place: Partition, known: Any, row: Any) -> Iterator[str]:
        begin = row.first_offset if known is None else known.next_offset
        if row.problem is not None:
            yield f"{place} stands still: {row.problem}"
        if known is not None and row.epoch < known.epoch:
            yield f"the epoch of {place} fell from {known.epoch} to {row.epoch}"
        if row.next_offset < begin:
            yield f"next_offset of {place} fell from {begin} to {row.next_offset}"
            return
        grown = db.execute(GROWN.encode(), [place.topic, place.number, begin]).fetchone()
        expected = row.next_offset - begin
        found = (grown.records, grown.lowest, grown.highest)
        if found != ((expected, begin, row.next_offset - 1) if expected else (0, None, None)):
            yield (
                f"{place} went from {begin} to {row.next_offset}, and the log holds "
                f"{grown.records} records from {grown.lowest} to {grown.highest} there"
            )

    def _unseen(self, db: Any, projector: str, place: Partition, checkpoint: int) -> Iterator[str]:
        wanted = SEEN[projector]
        query = UNSEEN.format(projector=projector, table=full(projector), key=wanted.key)
        span = {
            "topic": place.topic,
            "number": place.number,
            "first": checkpoint - LATEST_OFFSETS,
            "end": checkpoint,
            "type": wanted.type,
        }
        unseen = db.execute(query.encode(), span).fetchone()
        if unseen.events:
            yield (
                f"{projector} stands at {checkpoint} of {place} without {unseen.events} events "
                f"below, the first at {unseen.lowest}"
            )

    def _is_excused(self, projector: str, since: float) -> bool:
        with self._lock:
            running = self._announced.get(projector, 0) > 0
            return running or self._ended.get(projector, 0.0) >= since
