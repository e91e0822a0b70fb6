"""How long the log did not move although records were waiting, as PostgreSQL shows it."""

import threading
from collections.abc import Callable

import psycopg

from pipeline.partitions import Partition
from tests.servers.databases import Database
from tests.soak.journal import BACK_SECONDS_MAX, Journal

SAMPLE_SECONDS = 0.2
STILL_SECONDS_MIN = 1.0
"""A shorter time is the pace of batches, not an interruption."""
SERVERS = ("PostgreSQL", "Kafka", "network")
"""The prefixes of the names of faults of servers."""
NEXT_OFFSETS = b'SELECT topic, "partition", next_offset FROM pipeline.consumer_offsets'


class Availability:
    """Samples ``next_offset`` of all partitions all the time, in a thread of its own.

    Unavailable is a stretch of a second or more in which none of them moved, or PostgreSQL did not
    answer, while Kafka had confirmed records that were not in the log.

    Args:
        database: The database that it samples.
        ends: The ends of Kafka's partitions, by the producer's delivery reports.
        journal: Where it reports that the log does not move again.
    """

    def __init__(
        self, database: Database, ends: Callable[[], dict[Partition, int]], journal: Journal
    ) -> None:
        self.seconds = 0.0
        self.longest = 0.0
        self.longest_at = 0.0
        self.away = 0.0
        """Of these, the seconds in which a server or its network was made unavailable."""
        self.stretches = 0
        self.lag = 0
        self.logged = 0
        self._database = database
        self._ends = ends
        self._journal = journal
        self._stored: dict[Partition, int] = {}
        self._sampled_at = journal.now
        self._still_since: float | None = None
        self._away = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="availability", daemon=True)

    def __enter__(self) -> "Availability":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def sample(self, stored: dict[Partition, int] | None) -> None:
        """Evaluate the next offsets; None if PostgreSQL did not answer."""
        now, before = self._journal.now, self._sampled_at
        self._sampled_at = now
        moved = stored is not None and stored != self._stored
        self._stored = stored or self._stored
        self.logged = sum(self._stored.values())
        self.lag = sum(
            max(0, end - self._stored.get(partition, 0)) for partition, end in self._ends().items()
        )
        if not moved and self.lag:
            if any(fault.startswith(SERVERS) for fault in self._journal.running):
                self._away += now - before
            if self._still_since is None:
                self._still_since = before
            elif now - self._still_since > BACK_SECONDS_MAX:
                self._journal.fail(f"{self.lag} records wait, and nothing moves any more")
        elif self._still_since is not None:
            self._count(self._still_since, now)
            self._still_since, self._away = None, 0.0

    def _count(self, since: float, now: float) -> None:
        stretch = now - since
        if stretch < STILL_SECONDS_MIN:
            return
        self.seconds += stretch
        self.away += self._away
        self.stretches += 1
        if stretch > self.longest:
            self.longest, self.longest_at = stretch, since

    def _run(self) -> None:
        db: psycopg.Connection | None = None
        while not self._over.wait(SAMPLE_SECONDS):
            stored = None
            try:
                db = db or self._database.connect()
                rows = db.execute(NEXT_OFFSETS).fetchall()
                stored = {Partition(topic, number): offset for topic, number, offset in rows}
            except psycopg.OperationalError:
                db = None
            self.sample(stored)
        if db is not None:
            db.close()
