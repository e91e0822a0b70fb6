"""What an ingest looks at now and then, for no record and no commit tells it.

Kafka's ends, topics that are gone or made anew, another database in our group; what an operator has
decided, and a database that was put back to a backup. Whatever is not as it was when a partition
was taken over has it taken over again, which looks closely.
"""

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import structlog
from sqlalchemy import Connection, Engine

from pipeline.db import LOG_SCHEMA, metadata, transaction
from pipeline.errors import (
    DeletedTopicError,
    ForbiddenTopicError,
    PipelineError,
    RefusedError,
    TransientError,
)
from pipeline.foreign_objects import SILENT, refuse_foreign_objects
from pipeline.ingest.assignment import Assignment, tell_fenced
from pipeline.ingest.machine import Machine
from pipeline.ingest.takeover import Takeover
from pipeline.log import ownership
from pipeline.log.ownership import Place, Watermark
from pipeline.outages import GRACE_S
from pipeline.positions import Offset, Partition
from pipeline.source import Brokers

log = structlog.get_logger(__name__)


class Lookout:
    """Looks around for one membership in the group.

    Args:
        machine: Is told the ends, and where partitions stand.
        brokers: Kafka.
        takeover: Knows who else is in the group, and records that a topic is gone.
        assignment: Takes partitions over again.
        topics: Those that are configured.
        note_kept_until: Is told until when Kafka keeps the oldest record that is not in the log, in
            seconds since 1970; None if not known.
        engine: The database.

    Attributes:
        absent: Configured topics that Kafka had not, when last looked at.
        optional: Those of them that were never read, and need not be there.
        arrived: Those that were optional, and are there now.
        kafka_error: Why Kafka did not answer then; None if it did.
    """

    def __init__(
        self,
        machine: Machine,
        brokers: Brokers,
        takeover: Takeover,
        assignment: Assignment,
        topics: Collection[str],
        note_kept_until: Callable[[float | None], None],
        engine: Engine,
    ) -> None:
        self._engine = engine
        self._machine = machine
        self._brokers = brokers
        self._takeover = takeover
        self._assignment = assignment
        self._topics = topics
        self._note_kept_until = note_kept_until
        self.absent: frozenset[str] = frozenset()
        self.optional: frozenset[str] = frozenset()
        self.arrived: frozenset[str] = frozenset()
        self._forbidden_since: float | None = None
        self.kafka_error: TransientError | None = None

    def look(self) -> None:
        """Look at everything once.

        Raises:
            TransientError: Kafka fell silent in the midst of it, or a partition could not be taken.
            ConfigurationError: A login or a right is missing, and stays so.
        """
        self.see_changed_tables()
        # Kafka that is silent is asked one question and no more: meanwhile nobody polls.
        if self._see_absent_topics():
            self._see_rights()
            self._see_watermarks()
            self._see_topic_ids()
            self._see_other_databases()
        self._see_decisions()
        self._see_places()

    def see_changed_tables(self) -> None:
        """Write no more where a trigger or a rule of somebody else may change or leave out rows.

        Raises:
            ConfigurationError: There is one; the text names it with its owner.
        """
        with transaction(self._engine) as db:
            refuse_foreign_objects(db, metadata.tables.values(), [LOG_SCHEMA], kinds=SILENT)

    @property
    def refusals(self) -> Sequence[RefusedError]:
        """Why an ingest of the absent topics is not complete."""
        return [self._why_gone(topic) for topic in sorted(self.absent - self.optional)]

    def _why_gone(self, topic: str) -> RefusedError:
        return self._brokers.why_gone(Partition(topic, 0))

    def _see_rights(self) -> None:
        """Topics that we were not allowed to read continue once we are.

        Raises:
            ForbiddenTopicError: None of them may be read, and this lasts.
        """
        forbidden = [
            refusal
            for refusal in self._assignment.refusals.values()
            if isinstance(refusal, ForbiddenTopicError)
        ]
        topics = {refusal.partition.topic for refusal in forbidden} - self.absent
        if topics:  # each client is one more login
            with self._brokers.probing():
                readable = {topic for topic in topics if self._brokers.may_read(topic)}
            self._assignment.retake([p for p in self._assignment.refusals if p.topic in readable])
        if not forbidden or self._machine.owned:
            self._forbidden_since = None
            return
        now = time.monotonic()
        self._forbidden_since = self._forbidden_since or now
        if now - self._forbidden_since > GRACE_S:
            raise forbidden[0]

    def kept_until(self) -> float | None:
        """Until when Kafka keeps the oldest record that is not in the log, as Kafka says now.

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
            with self._brokers.probing():
                for partition, offset in stored.items():
                    low, high = self._brokers.watermarks(partition)
                    if offset < low:
                        return 0.0
                    retention = retention_ms.get(partition.topic)
                    if offset < high and retention is not None:
                        record = self._brokers.record_at(partition, Offset(offset))
                        if record is not None and record.timestamp_ms is not None:
                            times.append(record.timestamp_ms + retention)
        except PipelineError as error:
            log.debug("time_left_unknown", reason=str(error))
            return None
        return min(times) / 1000 if times else None

    def _see_watermarks(self) -> None:
        owned = self._machine.owned
        asked_at = time.monotonic()
        ends = self._brokers.ends(owned)
        retention_ms = self._brokers.retention_ms({partition.topic for partition in ends})
        seen = []
        for partition, high in ends.items():
            self._machine.saw_end(partition, high, asked_at)
            retention = retention_ms.get(partition.topic)
            seen.append(Watermark(partition, owned[partition], high, retention))

        def note(db: Connection) -> None:
            ownership.see_watermarks(db, seen)
            self._note_kept_until(ownership.kept_until(db, owned))

        self._assignment.query(note)

    def _see_absent_topics(self) -> bool:
        """A topic that is deleted is taken from us without a word of why; it may come back.

        Returns:
            Whether Kafka answers.
        """
        try:
            there = self._brokers.topics_there()
        except TransientError as error:
            self.kafka_error = error
            return False
        self.kafka_error = None
        absent = frozenset(self._topics) - there.keys()
        self.arrived |= self.optional - absent
        self.optional &= absent
        for topic in sorted(absent - self.absent - self.optional):
            why = self._why_gone(topic)
            is_forbidden = isinstance(why, ForbiddenTopicError)
            event = "topic_not_authorized" if is_forbidden else "topic_gone"
            log.error(event, topic=topic, reason=str(why))
        self.absent = absent
        self._assignment.retake_topics(absent)
        for topic in sorted(absent - self.optional):
            self._assignment.attempt(partial(self._takeover.miss, topic))
        self._assignment.retake(
            [
                partition
                for partition, refusal in self._assignment.refusals.items()
                if isinstance(refusal, DeletedTopicError) and partition.topic in there
            ]
        )
        return True

    def _see_topic_ids(self) -> None:
        """A topic made anew is noticed by each batch; this is for one that is silent."""
        now_there = self._brokers.topic_ids({partition.topic for partition in self._machine.owned})
        self._assignment.retake_topics(
            [
                topic
                for topic, seen in now_there.items()
                if seen != self._assignment.topic_ids.get(topic, seen)
            ]
        )

    def _see_other_databases(self) -> None:
        """Another database in our group says so only once it has committed there."""
        try:
            others = self._takeover.other_databases({p.topic for p in self._machine.owned})
        except TransientError as error:
            log.debug("group_not_seen", reason=str(error))
            return
        self._assignment.retake([p for p in self._machine.owned if p.topic in others])

    def _see_decisions(self) -> None:
        """Partitions that stand still go on when an operator has said so."""
        if not self._assignment.refusals:
            return
        freed: list[Partition] = []
        self._assignment.query(
            lambda db: freed.extend(ownership.freed(db, self._assignment.refusals))
        )
        if freed:
            self._assignment.retake(freed)

    def _see_places(self) -> None:
        """A database that was put back to a backup is noticed before the next record comes."""
        if self._machine.is_with_database:
            return
        places: dict[Partition, Place] = {}
        self._assignment.query(lambda db: places.update(ownership.look(db, self._machine.owned)))
        tell_fenced(self._machine.looked(places, time.monotonic()))
