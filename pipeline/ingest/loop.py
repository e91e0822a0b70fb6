"""The ingest loop of one membership: polls Kafka, and executes what the state machine decides.

1. on assignment: claim each partition in the database, check that Kafka still has what was read
   before, and continue where the log ends (``membership``, ``claim``)
2. poll records, read each once into a row, mark repeats
3. append the batch and move the next offsets, in one transaction, in the writer's thread
4. show Kafka's tools how far the log is
5. on revocation: finish the batch, then release the partitions; on loss: drop everything
6. every few seconds: the periodic checks (``monitor``)
"""

import time
from collections.abc import Collection, Sequence
from itertools import groupby
from operator import itemgetter
from uuid import UUID

import structlog

from pipeline import failpoints
from pipeline.errors import GroupFencedError, RefusedError, Server
from pipeline.events import read
from pipeline.ingest import state, writer
from pipeline.ingest.claim import Claimer
from pipeline.ingest.copies import CHECK_S, CopyCheck
from pipeline.ingest.goal import Goal
from pipeline.ingest.membership import Membership, log_fenced
from pipeline.ingest.monitor import BestEffort, PeriodicChecks
from pipeline.ingest.process import ProcessState, Progress
from pipeline.ingest.state import Bounds, Contested, IngestMachine, Reclaim, Resolve, Write
from pipeline.ingest.writer import (
    Committed,
    Failed,
    Fatal,
    Fenced,
    Resolved,
    TopicsReplaced,
    no_topics,
)
from pipeline.kafka.consumer import GroupConsumer, OutOfRange, Polled, ReachedEnd
from pipeline.log import workers
from pipeline.log.copying import encode
from pipeline.log.origin import replaced_topics
from pipeline.partitions import Partition
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

POLL_RECORDS_MAX = 100
"""Maximum number of records per poll. So few are still in the processor's cache when they are read,
and between two polls the database gets its next batch without delay."""
IDLE_WAIT_S = 0.05
"""How long to wait for a record before the loop does anything else."""
BUSY_WAIT_S = 0.002
"""How long to wait for the database, with a part of a batch, before Kafka is polled again."""
DRAIN_WAIT_S = 0.05
"""How often a drain checks whether the writer is done."""
FULL_WAIT_S = 1.0
"""How long to wait for the database, with a full batch, before Kafka is paused."""


class IngestLoop:
    """One membership in the group, from joining to the last batch.

    Args:
        process: What lives as long as the process.
        settings: What to read, and within which bounds.
        consumer: The member of the group; the caller closes it.
        installation: The identity of the database.
        server: Where the database runs.
        was_replaced: See ``CopyCheck``.
    """

    def __init__(
        self,
        process: ProcessState,
        settings: Settings,
        consumer: GroupConsumer,
        *,
        installation: UUID,
        server: workers.Server,
        was_replaced: bool,
    ) -> None:
        self._process = process
        self._settings = settings
        self._consumer = consumer
        self._stop = process.stop
        self._writer = process.writer
        self._machine = IngestMachine(
            Bounds(batch_rows_max=settings.batch_rows, batch_bytes_max=settings.batch_bytes)
        )
        self._copies = CopyCheck(
            process.engine,
            consumer,
            settings,
            process.stop,
            installation=installation,
            server=server,
            was_replaced=was_replaced,
        )
        claimer = Claimer(process.engine, consumer, settings, installation)
        self._membership = Membership(
            engine=process.engine,
            machine=self._machine,
            consumer=consumer,
            claimer=claimer,
            copies=self._copies,
            installation=installation,
            outages=process.outages,
            halts=process.halts,
            stop=process.stop,
            drain=self._drain,
        )
        self._best_effort = BestEffort(process.engine, process.outages)
        self._checks = PeriodicChecks(
            engine=process.engine,
            machine=self._machine,
            brokers=consumer.brokers,
            claimer=claimer,
            membership=self._membership,
            halts=process.halts,
            best_effort=self._best_effort,
            topics=settings.topics,
            retention=process.retention,
        )
        self._goal = Goal(process.engine, consumer.brokers, settings.topics)
        self._check_at = 0.0

    def run(self) -> Sequence[RefusedError]:
        """Join the group and ingest until stopped, or until caught up; then release everything.

        Returns:
            Why partitions are halted, and topics missing.

        Raises:
            PipelineError: See ``Ingest.run``. Nothing is owned any more, and no step is running.
        """
        self._process.retention.connect(self._checks.request_retention_deadline)
        try:
            self._checks.check_changed_tables()
            self._checks.expect_optional(self._membership.join())
            while not self._stop.is_set() and not self._is_done():
                self._turn()
            self._drain(self._machine.owned)
            self._report_progress()
            refusals = [*self._membership.halted.values(), *self._checks.refusals]
            self._membership.release(self._machine.owned, "partitions_released")
        except BaseException:
            self._writer.wait_until_idle()
            self._machine.abandon()
            raise
        return refusals

    def _is_done(self) -> bool:
        absent = self._checks.absent
        return (
            self._process.until_end
            and (self._membership.was_assigned or absent.issuperset(self._settings.topics))
            and self._machine.is_caught_up
            and self._goal.is_reached_by_others(
                self._machine.owned.keys() | self._membership.halted.keys(), absent
            )
        )

    def _turn(self) -> None:
        """Poll once, and give the writer what is ready."""
        self._advance(wait_s=0.0)
        if self._machine.room:
            self._consumer.resume(self._machine.owned)
            # What has arrived meanwhile is written as soon as the database is free.
            is_filling = self._machine.has_rows_waiting and self._machine.awaits_outcome
            received = self._receive(wait_s=0.0 if is_filling else IDLE_WAIT_S)
            if is_filling and not received:
                self._advance(wait_s=BUSY_WAIT_S)
        elif not self._advance(wait_s=FULL_WAIT_S):
            # The database is slow or unavailable: stay in the group, and fetch no more meanwhile.
            self._consumer.pause(self._machine.owned)
            self._receive(wait_s=0.0)
        self._check_periodically()
        self._report_progress()

    def _report_progress(self) -> None:
        self._process.observe(Progress(self._process.count_written(0), self._machine.lag))

    # ---------------------------------------------------------------------------------- from Kafka

    def _receive(self, *, wait_s: float) -> bool:
        """Poll Kafka; returns whether a record arrived."""
        records_max = min(POLL_RECORDS_MAX, max(1, self._machine.room))
        polled = self._consumer.poll(records_max, wait_s, self._settings.linger_ms / 1000)
        failpoints.reach("after_poll")
        self._take(polled)
        return bool(polled.records)

    def _take(self, polled: Polled) -> None:
        keep_raw = self._settings.keep_raw
        for coordinates, records_of in groupby(polled.records, key=itemgetter(0, 1)):
            partition, records = Partition(*coordinates), list(records_of)
            first = self._machine.first_wanted(partition)
            if first is None:
                continue
            if records[0].offset < first:
                records = [record for record in records if record.offset >= first]
            mark = self._membership.window(partition).mark
            self._machine.received(
                partition, [encode(mark(read(record, keep_raw=keep_raw))) for record in records]
            )
        for notice in polled.notices:
            match notice:
                case ReachedEnd(partition, offset):
                    self._machine.reached_end(partition, offset)
                case OutOfRange(partition) if partition in self._machine.owned:
                    # Claiming it again compares the watermarks, which reveals the reason.
                    self._membership.reclaim([partition])
                case OutOfRange():
                    pass

    # ----------------------------------------------------------------------------- to the database

    def _advance(self, *, wait_s: float) -> bool:
        """Report the writer's outcome to the machine, and do its next steps.

        Returns:
            Whether there was an outcome or a step.
        """
        outcome = self._writer.outcome(wait_s)
        if outcome is not None:
            self._on_outcome(outcome)
        has_stepped = False
        while (step := self._machine.next_step(time.monotonic())) is not None:
            has_stepped = True
            match step:
                case Write(batch):
                    topics = {partition.topic for partition in batch.advances}
                    self._writer.submit(step, self._request_replaced(topics))
                case Resolve():
                    self._writer.submit(step)
                case Reclaim(partition):
                    self._membership.reclaim([partition])
                case Contested(partition):
                    raise GroupFencedError(
                        f"{partition}: another process keeps claiming it. Find out whether another "
                        "process uses this database with another PIPELINE_GROUP_ID"
                    )
        return has_stepped or outcome is not None

    def _on_outcome(self, outcome: writer.StepOutcome) -> None:
        now = time.monotonic()
        match outcome:
            case Committed():
                self._after_batch(self._machine.committed())
            case Resolved(stored):
                self._after_batch(self._machine.resolved(stored, now))
            case Fenced():
                self._machine.append_refused(now)
            case TopicsReplaced(topics):
                # The other partitions of the batch are written once these are halted.
                self._machine.append_refused(now)
                self._membership.reclaim_topics(topics)
            case Failed(error):
                self._machine.failed(now)
                self._process.outages.on_error(error)
            case Fatal(error):
                raise error

    def _request_replaced(self, topics: Collection[str]) -> writer.ReplacedTopics:
        """Request the topics' ids; the result returns the topics from which the batch is not."""
        claimed = self._membership.topic_ids
        expected = {topic: claimed[topic] for topic in topics if topic in claimed}
        if not expected:
            return no_topics
        wait_for_ids = self._consumer.brokers.request_topic_ids(expected)

        def replaced() -> Collection[str]:
            ids = wait_for_ids()
            # A topic whose id is no longer reported counts as replaced: its records decide then.
            return replaced_topics(expected, {topic: ids.get(topic) for topic in expected})

        return replaced

    def _after_batch(self, outcome: state.BatchResult) -> None:
        if not self._machine.is_failing:
            self._process.outages.on_success(Server.POSTGRESQL)
        self._process.count_written(outcome.records)
        log_fenced(outcome.fenced)
        failpoints.reach("after_commit")
        self._membership.commit(outcome.next_offsets)
        failpoints.reach("after_kafka_commit")

    def _drain(self, partitions: Collection[Partition]) -> None:
        """Write what we hold of these partitions, within the deadline."""
        deadline = time.monotonic() + self._settings.revoke_deadline_ms / 1000
        while not self._machine.is_drained(partitions) and time.monotonic() < deadline:
            self._advance(wait_s=DRAIN_WAIT_S)
            if self._stop.is_set() and self._machine.is_failing:
                return

    # --------------------------------------------------------------------------------- periodically

    def _check_periodically(self) -> None:
        now = time.monotonic()
        if now < self._check_at:
            if not self._machine.is_failing:
                self._copies.register_new_member_id(self._best_effort.query)
            return
        self._check_at = now + CHECK_S
        self._process.collect_garbage()
        if self._machine.is_failing:
            return
        self._best_effort.begin_round()
        self._membership.record_releases()
        self._best_effort.run(lambda: self._copies.send_heartbeat(self._machine.stored))
        if self._process.until_end:
            # A client that waits for its brokers reports nothing; a run that is to end must know.
            self._consumer.brokers.cluster_id()
        self._checks.run()
        if self._checks.kafka_error is None:
            self._process.kafka_outages.on_success(Server.KAFKA)
        else:
            self._process.kafka_outages.on_error(self._checks.kafka_error)
            self._best_effort.failed(Server.KAFKA)
        self._best_effort.end_round()
        self._membership.log_pending(kafka_answers=self._checks.kafka_error is None)
        if arrived := self._checks.take_arrived():
            log.info("topic_available", topics=sorted(arrived))
            self._consumer.subscribe(arrived)
