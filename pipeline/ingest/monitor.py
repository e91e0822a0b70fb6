"""The periodic checks of an ingest: what neither a record nor a commit reports.

Kafka's ends, missing and recreated topics, rights, another database in our group; what an operator
has decided, and a database that was restored from a backup. Where something is not as it was when a
partition was claimed, the partition is claimed again, which checks everything.
"""

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import structlog
from sqlalchemy import Connection, Engine

from pipeline.db import transaction
from pipeline.errors import (
    ConfigurationError,
    DeletedTopicError,
    ForbiddenTopicError,
    PipelineError,
    RefusedError,
    Server,
    TransientError,
)
from pipeline.foreign_objects import SILENT, refuse_foreign_objects
from pipeline.ingest.claim import Claimer
from pipeline.ingest.halts import HaltLog
from pipeline.ingest.membership import Membership, log_fenced
from pipeline.ingest.retention import RetentionDeadline
from pipeline.ingest.state import IngestMachine
from pipeline.kafka.metadata import Brokers
from pipeline.log import claims, offsets
from pipeline.log.ingest_tables import INGEST_TABLES
from pipeline.log.origin import replaced_topics
from pipeline.log.watermarks import Watermark, record_watermarks, retention_deadline
from pipeline.outages import GRACE_S, OutagePolicy
from pipeline.partitions import Offset, Ownership, Partition

log = structlog.get_logger(__name__)


class BestEffort:
    """Does work that may also be done later; a failure is an outage like any other.

    Args:
        engine: The database.
        outages: How long to wait for it, and for Kafka.
    """

    def __init__(self, engine: Engine, outages: OutagePolicy) -> None:
        self._engine = engine
        self._outages = outages
        self._failed: set[Server] = set()

    def begin_round(self) -> None:
        """Begin a round of work that uses both servers."""
        self._failed.clear()

    def failed(self, server: Server) -> None:
        """A server did not answer in this round."""
        self._failed.add(server)

    def end_round(self) -> None:
        """End a round: a server that failed in none of its work is available."""
        self._outages.on_success(*(server for server in Server if server not in self._failed))

    def run(self, work: Callable[[], None]) -> None:
        """Do the work, or leave it for the next time.

        Raises:
            PipelineError: The outage has lasted for longer than the policy allows.
        """
        try:
            work()
        except (TransientError, ConfigurationError) as error:
            self._failed.add(error.server)
            self._outages.on_error(error)

    def query(self, work: Callable[[Connection], None]) -> None:
        """``run``, with a transaction of its own."""

        def in_transaction() -> None:
            with transaction(self._engine) as db:
                work(db)

        self.run(in_transaction)


class PeriodicChecks:
    """The checks of one membership in the group.

    Args:
        engine: The database.
        machine: Receives Kafka's ends, and what is stored of each partition.
        brokers: Kafka.
        claimer: Finds other databases in the group; records that a topic is missing.
        membership: Claims partitions again.
        halts: Logs that a topic is missing.
        best_effort: Runs queries that may also be run later.
        topics: Those that are configured.
        retention: Receives the retention deadline.

    Attributes:
        absent: Configured topics that Kafka did not show at the last check.
        kafka_error: Why Kafka did not answer at the last check; None if it did.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        machine: IngestMachine,
        brokers: Brokers,
        claimer: Claimer,
        membership: Membership,
        halts: HaltLog,
        best_effort: BestEffort,
        topics: Collection[str],
        retention: RetentionDeadline,
    ) -> None:
        self._engine = engine
        self._machine = machine
        self._brokers = brokers
        self._claimer = claimer
        self._membership = membership
        self._halts = halts
        self._best_effort = best_effort
        self._topics = topics
        self._retention = retention
        self.absent: frozenset[str] = frozenset()
        self._optional: frozenset[str] = frozenset()
        self._arrived: frozenset[str] = frozenset()
        self.kafka_error: TransientError | None = None
        self._forbidden_since: float | None = None

    def expect_optional(self, topics: frozenset[str]) -> None:
        """These topics were never read and may be missing; the checks notice when they exist."""
        self._optional = topics

    def take_arrived(self) -> frozenset[str]:
        """The optional topics that exist since the last call."""
        arrived, self._arrived = self._arrived, frozenset()
        return arrived

    def run(self) -> None:
        """Run every check once.

        Raises:
            TransientError: Kafka stopped answering in the middle, or a partition was not claimed.
            ConfigurationError: A login or a right is missing, and stays so.
        """
        self.check_changed_tables()
        # If Kafka does not answer, send it one request and no more: meanwhile nobody polls.
        if self._check_topics():
            self._check_rights()
            self._record_ends()
            self._check_topic_ids()
            self._check_group()
        self._check_decisions()
        self._check_stored()

    def check_changed_tables(self) -> None:
        """Refuse to write where a trigger or a rule of others may change or leave out rows.

        Raises:
            ConfigurationError: There is one; the text names it with its owner.
        """
        with transaction(self._engine) as db:
            refuse_foreign_objects(db, INGEST_TABLES, kinds=SILENT)

    @property
    def refusals(self) -> Sequence[RefusedError]:
        """Why an ingest is not complete without the absent topics."""
        return [self._missing(topic) for topic in sorted(self.absent - self._optional)]

    def _log_missing(self, refusal: RefusedError) -> None:
        topic = refusal.partition.topic
        partitions = [p for p in self._machine.owned if p.topic == topic]
        is_forbidden = isinstance(refusal, ForbiddenTopicError)
        event = "topic_not_authorized" if is_forbidden else "topic_missing"
        log.error(event, topic=topic, partitions=sorted(map(str, partitions)), reason=refusal.cause)
        self._halts.mark_logged(refusal.cause, partitions)

    def _missing(self, topic: str) -> RefusedError:
        return self._brokers.missing_topic_error(Partition(topic, 0))

    # --------------------------------------------------------------------------------------- Kafka

    def _check_topics(self) -> bool:
        """Kafka takes the partitions of a deleted topic away without a reason; it may come back.

        Returns:
            Whether Kafka answers.
        """
        try:
            shown = self._brokers.partition_counts()
        except TransientError as error:
            self.kafka_error = error
            return False
        self.kafka_error = None
        absent = frozenset(self._topics) - shown.keys()
        self._arrived |= self._optional - absent
        self._optional &= absent
        for topic in sorted(absent - self.absent - self._optional):
            self._log_missing(self._missing(topic))
        self.absent = absent
        self._membership.reclaim_topics(absent)
        for topic in sorted(absent - self._optional):
            self._best_effort.run(partial(self._claimer.halt_unassigned, topic))
        self._membership.reclaim(
            [
                partition
                for partition, refusal in self._membership.halted.items()
                if isinstance(refusal, DeletedTopicError) and partition.topic in shown
            ]
        )
        return True

    def _check_rights(self) -> None:
        """Topics that we were not allowed to read are resumed once we are.

        Raises:
            ForbiddenTopicError: None of them may be read, and this lasts.
        """
        forbidden = [
            refusal
            for refusal in self._membership.halted.values()
            if isinstance(refusal, ForbiddenTopicError)
        ]
        topics = {refusal.partition.topic for refusal in forbidden} - self.absent
        if topics:  # each client is one more login
            with self._brokers.record_reader() as reader:
                readable = {topic for topic in topics if reader.may_read(topic)}
            self._membership.reclaim([p for p in self._membership.halted if p.topic in readable])
        if not forbidden or self._machine.owned:
            self._forbidden_since = None
            return
        now = time.monotonic()
        self._forbidden_since = self._forbidden_since or now
        if now - self._forbidden_since > GRACE_S:
            raise forbidden[0]

    def _record_ends(self) -> None:
        """Record Kafka's ends, so that the lag is known without Kafka."""
        owned = self._machine.owned
        requested_at = time.monotonic()
        ends = self._brokers.ends(owned)
        retention_ms = self._brokers.retention_ms({partition.topic for partition in ends})
        watermarks = []
        for partition, high in ends.items():
            self._machine.end_reported(partition, high, requested_at)
            retention = retention_ms.get(partition.topic)
            watermarks.append(Watermark(partition, owned[partition], high, retention))

        def record(db: Connection) -> None:
            record_watermarks(db, watermarks)
            self._retention.update(retention_deadline(db, owned))

        self._best_effort.query(record)

    def _check_topic_ids(self) -> None:
        """Each batch detects a recreated topic; this is for a topic without records."""
        ids = self._brokers.topic_ids({partition.topic for partition in self._machine.owned})
        self._membership.reclaim_topics(replaced_topics(self._membership.topic_ids, ids))

    def _check_group(self) -> None:
        """Another database in our group is detected only once it has committed there."""
        try:
            others = self._claimer.other_databases({p.topic for p in self._machine.owned})
        except TransientError as error:
            log.debug("group_commits_unknown", reason=str(error))
            return
        self._membership.reclaim([p for p in self._machine.owned if p.topic in others])

    # ------------------------------------------------------------------------------------- database

    def _check_decisions(self) -> None:
        """Halted partitions are resumed when an operator has decided so."""
        if not self._membership.halted:
            return
        freed: list[Partition] = []
        self._best_effort.query(
            lambda db: freed.extend(offsets.not_halted(db, self._membership.halted))
        )
        if freed:
            self._membership.reclaim(freed)

    def _check_stored(self) -> None:
        """A database that was restored from a backup is detected before the next record arrives."""
        if self._machine.awaits_outcome:
            return
        stored: dict[Partition, Ownership] = {}
        self._best_effort.query(
            lambda db: stored.update(claims.ownerships(db, self._machine.owned))
        )
        log_fenced(self._machine.checked(stored, time.monotonic()))

    # ------------------------------------------------------------------------------------ retention

    def request_retention_deadline(self) -> float | None:
        """Until when Kafka keeps the oldest record that is not in the log, as Kafka reports now.

        By the topic's ``retention.ms`` and the record's timestamp. Kafka deletes whole segments of
        its log, so it may keep the record for longer.

        Returns:
            Seconds since 1970, 0 if the record is deleted; None if Kafka has no such record, does
            not answer, or keeps everything.
        """
        times = []
        stored = self._machine.stored
        try:
            retention_ms = self._brokers.retention_ms({partition.topic for partition in stored})
            with self._brokers.record_reader() as reader:
                for partition, offset in stored.items():
                    low, high = self._brokers.watermarks(partition)
                    if offset < low:
                        return 0.0
                    retention = retention_ms.get(partition.topic)
                    if offset < high and retention is not None:
                        record = reader.record_at(partition, Offset(offset))
                        if record is not None and record.timestamp_ms is not None:
                            times.append(record.timestamp_ms + retention)
        except PipelineError as error:
            log.debug("retention_deadline_unknown", reason=str(error))
            return None
        return min(times) / 1000 if times else None
