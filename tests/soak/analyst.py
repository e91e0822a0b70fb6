"""Checks continuously what must be true at every moment, as an analyst sees the database.

Each check is one REPEATABLE READ transaction. A failure is: an offset or an epoch that falls, a
record that is missing below ``next_offset`` or exists above it, a checkpoint that falls or is
ahead of the log, a table that gets shorter, an event that a read model has passed and does not
hold. Only an announced TRUNCATE is allowed.
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
"""It pauses for this many times the duration of a check, so that it does not slow the rest."""
LATEST_OFFSETS = 500
"""The number of offsets below each checkpoint that must be in the read models."""

# Before the snapshot is taken: it would not show a TRUNCATE in between.
HOLD_STILL = SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(
    SQL(", ").join(
        Identifier("upvest", table.name)
        for projector in sorted(catalogue.load().models, key=lambda projector: projector.name)
        for table in projector.tables
    )
)
OFFSETS = """
SELECT topic, "partition", first_offset, next_offset, epoch, problem
FROM pipeline.consumer_offsets
"""
# Everything from the end of the last check, also records that must not exist.
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
# Chaos damages no key of a valid event.
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
    """The row that a read model must hold for an event."""

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

# The sums of the ledgers, and the newest balances, computed from the log up to the read model's
# checkpoint in each partition: both must be equal, even if events are late or out of order.
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
                   (e.payload #>> '{object,account_group_id}')::uuid AS owner,
                   e.payload #>> '{object,delta,currency}' AS unit,
                   (e.payload #>> '{object,delta,amount}')::numeric AS amount
        """
    + _BELOW.format(
        amount="delta,amount", table="cash_transactions", type="CASH_TRANSACTION.EXECUTED"
    )
    + """),
        logged AS (SELECT owner, unit, sum(amount) AS amount FROM entries GROUP BY owner, unit),
        projected AS (SELECT account_group_id AS owner, currency AS unit, ledger_sum AS amount
                 FROM upvest.cash_reconciliation WHERE entries > 0)""",
    "sums of the securities ledger": """
        WITH entries AS (
            SELECT DISTINCT ON (e.payload #>> '{object,id}', e.payload #>> '{object,type}')
                   (e.payload #>> '{object,account_id}')::uuid AS owner,
                   (e.payload #>> '{object,instrument,uuid}')::uuid AS unit,
                   (e.payload #>> '{object,delta,amount}')::numeric AS amount
        """
    + _BELOW.format(
        amount="delta,amount", table="security_transactions", type="SECURITY_TRANSACTION.EXECUTED"
    )
    + """),
        logged AS (SELECT owner, unit, sum(amount) AS amount FROM entries GROUP BY owner, unit),
        projected AS (SELECT account_id AS owner, instrument_uuid AS unit, ledger_sum AS amount
                 FROM upvest.position_reconciliation WHERE entries > 0)""",
    "cash balances": """
        WITH logged AS (
            SELECT DISTINCT ON (owner, unit)
                   (e.payload #>> '{object,account_group_id}')::uuid AS owner,
                   e.payload #>> '{object,currency}' AS unit,
                   (e.payload #>> '{object,balance}')::numeric AS amount
        """
    + _BELOW.format(amount="balance", table="cash_balances", type="CASH_BALANCE.UPDATED")
    + """
            ORDER BY owner, unit, e.created_at DESC, e.topic DESC, e."partition" DESC,
                e."offset" DESC
        ),
        projected AS (SELECT account_group_id AS owner, currency AS unit, balance AS amount
                 FROM upvest.cash_balances)""",
    "positions": """
        WITH logged AS (
            SELECT DISTINCT ON (owner, unit)
                   (e.payload #>> '{object,account_id}')::uuid AS owner,
                   (e.payload #>> '{object,instrument,uuid}')::uuid AS unit,
                   (e.payload #>> '{object,quantity}')::numeric AS amount
        """
    + _BELOW.format(amount="quantity", table="positions", type="POSITION.UPDATED")
    + """
            ORDER BY owner, unit, e.created_at DESC, e.topic DESC, e."partition" DESC,
                e."offset" DESC
        ),
        projected AS (SELECT account_id AS owner, instrument_uuid AS unit, quantity AS amount
                 FROM upvest.positions)""",
}
DIFFERING = """
SELECT count(*) FILTER (WHERE logged.amount IS DISTINCT FROM projected.amount) AS differing,
       count(*) AS compared
FROM logged FULL JOIN projected USING (owner, unit)
"""


class Look(NamedTuple):
    """The result of a check, with which the next check is compared."""

    at: float
    offsets: Mapping[Partition, Any]
    checkpoints: Mapping[tuple[str, Partition], int]
    counts: Mapping[str, int]


class Analyst:
    """Checks continuously, in a thread of its own; it adds each failure to the journal.

    Args:
        database: The database that it checks.
        journal: Where it reports failures.
    """

    def __init__(self, database: Database, journal: Journal) -> None:
        self.looks = 0
        self.put_off = 0
        """Checks that a lock or an unavailable server has prevented."""
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
        """Within the block, the read model may be emptied."""
        with self._lock:
            self._announced[projector] = self._announced.get(projector, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._announced[projector] -= 1
                self._ended[projector] = time.monotonic()

    def look(self) -> None:
        """Check once, and report what must not be."""
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
        """The number of balances that are not the sum of their entries; 0 at the end."""
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
        for partition, row in now.offsets.items():
            known = before.offsets.get(partition) if before else None
            yield from self._about_partition(db, partition, known, row)
        for (projector, partition), checkpoint in now.checkpoints.items():
            end = now.offsets[partition].next_offset
            if checkpoint > end:
                yield f"{projector} is at {checkpoint} of {partition}, whose log ends at {end}"
            if projector in SEEN:
                yield from self._unseen(db, projector, partition, checkpoint)
        if before is None:
            return
        for (projector, partition), checkpoint in before.checkpoints.items():
            fell = now.checkpoints.get((projector, partition), -1) < checkpoint
            if fell and not self._is_excused(projector, before.at):
                now_at = now.checkpoints.get((projector, partition))
                yield (
                    f"the checkpoint of {projector} in {partition} fell from {checkpoint} "
                    f"to {now_at}"
                )
        for projector, count in before.counts.items():
            if now.counts[projector] < count and not self._is_excused(projector, before.at):
                yield f"{projector} had {count} rows and has {now.counts[projector]}"

    def _about_partition(
        self, db: Any, partition: Partition, known: Any, row: Any
    ) -> Iterator[str]:
        begin = row.first_offset if known is None else known.next_offset
        if row.problem is not None:
            yield f"{partition} is halted: {row.problem}"
        if known is not None and row.epoch < known.epoch:
            yield f"the epoch of {partition} fell from {known.epoch} to {row.epoch}"
        if row.next_offset < begin:
            yield f"next_offset of {partition} fell from {begin} to {row.next_offset}"
            return
        grown = db.execute(GROWN.encode(), [partition.topic, partition.number, begin]).fetchone()
        expected = row.next_offset - begin
        found = (grown.records, grown.lowest, grown.highest)
        if found != ((expected, begin, row.next_offset - 1) if expected else (0, None, None)):
            yield (
                f"{partition} went from {begin} to {row.next_offset}, and the log holds "
                f"{grown.records} records from {grown.lowest} to {grown.highest} there"
            )

    def _unseen(
        self, db: Any, projector: str, partition: Partition, checkpoint: int
    ) -> Iterator[str]:
        wanted = SEEN[projector]
        query = UNSEEN.format(projector=projector, table=full(projector), key=wanted.key)
        span = {
            "topic": partition.topic,
            "number": partition.number,
            "first": checkpoint - LATEST_OFFSETS,
            "end": checkpoint,
            "type": wanted.type,
        }
        unseen = db.execute(query.encode(), span).fetchone()
        if unseen.events:
            yield (
                f"{projector} is at {checkpoint} of {partition} without {unseen.events} events "
                f"below, the first at {unseen.lowest}"
            )

    def _is_excused(self, projector: str, since: float) -> bool:
        with self._lock:
            running = self._announced.get(projector, 0) > 0
            return running or self._ended.get(projector, 0.0) >= since
