"""The ingest loop: asks Kafka, does what the state machine says, tells it what came of it.

1. on assignment: claim each partition in the database, check that Kafka is what it was, and
   read on where the log ends (``assignment``)
2. poll records, read each once into a row, mark repeats
3. append the batch and move the next offsets, in one transaction, in the writer's thread
4. tell Kafka's tools how far we are
5. on revocation: finish the batch, then let go; on loss: drop everything
6. every few seconds: look for what none of this tells (``lookout``)
"""

import gc
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import structlog
from sqlalchemy import Engine

from pipeline import failpoints
from pipeline.db import transaction
from pipeline.errors import (
    ConfigurationError,
    GroupFencedError,
    MemberReplacedError,
    PipelineError,
    SharedGroupError,
    TransientError,
)
from pipeline.events import read
from pipeline.ingest import machine as decisions
from pipeline.ingest import writer as writing
from pipeline.ingest.assignment import RETRY_S, Assignment, tell_fenced
from pipeline.ingest.copies import CopyCheck
from pipeline.ingest.lookout import Lookout
from pipeline.ingest.machine import Bounds, Machine, Reclaim, Resolve, Stolen, Write
from pipeline.ingest.takeover import Takeover
from pipeline.ingest.writer import Broken, Committed, Failed, Fenced, Found, Replaced, Writer
from pipeline.log import ownership
from pipeline.log.copying import encode
from pipeline.outages import OutagePolicy
from pipeline.positions import NextOffset, Partition
from pipeline.settings import Settings
from pipeline.source import Access, KafkaSource, Listener, OutOfRange, Polled, ReachedEnd

log = structlog.get_logger(__name__)

POLL_RECORDS_MAX = 100
"""Most records taken at a time: so few still lie in the processor's cache when they are read, and
in between, the database gets its next batch without delay."""
IDLE_WAIT_S = 0.05
"""How long to wait for a record before anything else is looked at."""
BUSY_WAIT_S = 0.002
"""How long to wait for the database, with a part of a batch, before Kafka is asked for more."""
DRAIN_WAIT_S = 0.05
"""How often a drain looks whether the writer is done."""
FULL_WAIT_S = 1.0
"""How long to wait for the database with a full batch before Kafka is told to hold."""
LOOK_S = 5.0
"""How often watermarks, topic ids and partitions that stand still are looked at."""
REPLACED_MAX = 3
"""How often another member may take our place in the group within ``REPLACED_S``."""
REPLACED_S = 60.0
"""See ``REPLACED_MAX``."""


class Progress(NamedTuple):
    """How far an ingest is, for a progress bar.

    Attributes:
        written: Records appended by this process.
        behind: Offsets between the log and Kafka's ends as last seen, over all owned partitions.
    """

    written: int
    behind: int


class Ingest:
    """Reads the configured topics into the log until told to stop.

    Args:
        settings: What to read, and within which bounds.
        engine: The database, with the schema of this program.
        stop: Set it to finish the batch in hand and return.
        until_end: Return when the log holds what was there at the start.
        observe: Called after each poll, from this thread.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        *,
        stop: threading.Event,
        until_end: bool = False,
        observe: Callable[[Progress], None] = lambda _progress: None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._stop = stop
        self._until_end = until_end
        self._observe = observe
        self._writer = Writer(engine, segment_span=settings.segment_offsets)
        self._written = 0
        # A moment, so that it holds while Kafka is away, and after this membership.
        self._kept_until: float | None = None
        self._ask_kept_until: Callable[[], float | None] = lambda: None
        self._outages = OutagePolicy(
            waits_forever=not until_end, time_left=self._time_left_by_kafka
        )
        self._kafka_outages = OutagePolicy(waits_forever=True, time_left=self._time_left)
        self._look_at = self._ask_others_at = 0.0
        self._replaced_at: list[float] = []

    def run(self) -> None:
        """Ingest until stopped, or until caught up.

        Raises:
            RefusedError: Caught up, but a partition stands still to protect data; or the group
                feeds another database.
            GroupFencedError: Another process keeps claiming our partitions, or taking our place in
                the group.
            ConfigurationError: A topic, a login or a right is missing, and stays so.
            TransientError: A one-shot run waited long enough for a server.
            InvariantError: What must be impossible has happened.
        """
        with _tuned_interpreter(), self._writer:
            while not self._stop.is_set():
                try:
                    self._serve_membership()
                except (TransientError, ConfigurationError) as error:
                    if not self._has_fresh_login(error):
                        self._stop.wait(self._outages.on_error(error))
                        self._has_fresh_login(error)
                except MemberReplacedError as error:
                    self._bear_replacement(error)
                else:
                    break

    def _has_fresh_login(self, error: PipelineError) -> bool:
        """Whether a login was refused and there is another one now, which is used from now on."""
        if not (isinstance(error, ConfigurationError) and error.is_login):
            return False
        before = self._settings.kafka_client()
        self._settings = self._settings.with_fresh_logins()
        if self._settings.kafka_client() == before:
            return False
        log.info("password_read_again", server="Kafka", effect="the new login is used")
        return True

    def _time_left_by_kafka(self) -> timedelta | None:
        """Asks Kafka, which mostly answers while the database is away."""
        if (until := self._ask_kept_until()) is not None:
            self._kept_until = until
        return self._time_left()

    def _time_left(self) -> timedelta | None:
        """How long Kafka keeps the oldest record that is not in the log, as last known."""
        if self._kept_until is None:
            return None
        return timedelta(seconds=self._kept_until - time.time())

    def _note_kept_until(self, seconds: float | None) -> None:
        self._kept_until = seconds

    def _bear_replacement(self, error: MemberReplacedError) -> None:
        """Let the loop join anew, unless somebody else wants our place for good."""
        now = time.monotonic()
        self._replaced_at = [at for at in self._replaced_at if now - at < REPLACED_S] + [now]
        if len(self._replaced_at) >= REPLACED_MAX:
            raise GroupFencedError(
                f"{error}. Is another process running with the same PIPELINE_GROUP_INSTANCE_ID, "
                f"{self._settings.group_instance_id!r}?"
            ) from None
        log.warning("member_replaced", reason=str(error), effect="joining the group again")

    # ------------------------------------------------------------------------------ one membership

    def _serve_membership(self) -> None:
        """Join the group, ingest, drain, leave."""
        self._machine = Machine(
            Bounds(
                batch_rows_max=self._settings.batch_rows,
                batch_bytes_max=self._settings.batch_bytes,
            )
        )
        self._goal: Mapping[Partition, int] | None = None
        self._assigned = False
        self._source = KafkaSource(self._settings)
        try:
            self._takeover = Takeover(self._engine, self._source, self._settings)
            self._assignment = Assignment(
                self._engine,
                self._machine,
                self._source,
                self._takeover,
                self._outages,
                self._stop,
            )
            self._lookout = Lookout(
                self._machine,
                self._source.brokers,
                self._takeover,
                self._assignment,
                self._settings.topics,
                self._note_kept_until,
                self._engine,
            )
            self._lookout.see_changed_tables()
            self._copies = CopyCheck(
                self._engine,
                self._source,
                self._settings,
                self._stop,
                was_replaced=bool(self._replaced_at),
            )
            self._ask_kept_until = self._lookout.kept_until
            with transaction(self._engine) as db:
                begun = ownership.known_topics(db)
            listener = Listener(self._on_assign, self._on_revoke, self._on_lost)
            self._lookout.optional = self._source.join(
                listener, begun, before=self._copies.before_joining
            )
            while not self._stop.is_set() and not self._is_done():
                self._turn()
            self._drain(self._machine.owned)
            self._observe(Progress(self._written, self._machine.behind))
            refusals = [*self._assignment.refusals.values(), *self._lookout.refusals]
            self._assignment.let_go(self._machine.owned, "partitions_released")
        except BaseException:
            self._writer.settle()
            self._machine.abandon()
            raise
        finally:
            self._ask_kept_until = lambda: None
            self._source.leave()
        if self._until_end and refusals:
            raise refusals[0]

    def _is_done(self) -> bool:
        has_all = self._assigned or self._lookout.absent.issuperset(self._settings.topics)
        return (
            self._until_end and has_all and self._machine.is_caught_up and self._others_are_done()
        )

    def _others_are_done(self) -> bool:
        """Whether the log has what partitions held that are not ours, when we first asked.

        They may be on their way to us, or come to us when their owner dies.
        """
        now = time.monotonic()
        if now < self._ask_others_at:
            return False
        self._ask_others_at = now + RETRY_S
        ours = self._machine.owned.keys() | self._assignment.refusals.keys()
        if self._goal is None:
            brokers = self._source.brokers
            there = {
                Partition(topic, number)
                for topic in self._settings.topics
                if topic not in self._lookout.absent
                for number in range(brokers.partition_count(topic))
            }
            self._goal = {one: brokers.watermarks(one).high for one in there - ours}
        others = {one: end for one, end in self._goal.items() if one not in ours}
        with transaction(self._engine) as db:
            return ownership.has_passed(db, others)

    def _turn(self) -> None:
        """Poll once, and hand on what is ready."""
        self._advance(wait_s=0.0)
        if self._machine.room:
            self._source.let_flow(self._machine.owned)
            # What has come meanwhile is written as soon as the database is free.
            gathers = self._machine.has_waiting and self._machine.is_with_database
            received = self._receive(wait_s=0.0 if gathers else IDLE_WAIT_S)
            if gathers and not received:
                self._advance(wait_s=BUSY_WAIT_S)
        elif not self._advance(wait_s=FULL_WAIT_S):
            # The database is slow or away: stay in the group, and fetch no more meanwhile.
            self._source.hold(self._machine.owned)
            self._receive(wait_s=0.0)
        self._look_around()
        self._observe(Progress(self._written, self._machine.behind))

    # ---------------------------------------------------------------------------------- from Kafka

    def _receive(self, *, wait_s: float) -> bool:
        """Take what Kafka has for us; whether it was anything."""
        records_max = min(POLL_RECORDS_MAX, max(1, self._machine.room))
        polled = self._source.poll(records_max, wait_s, self._settings.linger_ms / 1000)
        failpoints.reach("after_poll")
        self._take_in(polled)
        return bool(polled.records)

    def _take_in(self, polled: Polled) -> None:
        keep_raw = self._settings.keep_raw
        for place, polled_of in groupby(polled.records, key=itemgetter(0, 1)):
            partition, records = Partition(*place), list(polled_of)
            first = self._machine.wants_from(partition)
            if first is None:
                continue
            if records[0].offset < first:
                records = [record for record in records if record.offset >= first]
            mark = self._assignment.window(partition).mark
            self._machine.received(
                partition, [encode(mark(read(record, keep_raw=keep_raw))) for record in records]
            )
        for happening in polled.happenings:
            match happening:
                case ReachedEnd(partition, offset):
                    self._machine.reached_end(partition, offset)
                case OutOfRange(partition) if partition in self._machine.owned:
                    # The watermarks tell what happened; taking it over again looks at them.
                    self._assignment.retake([partition])
                case OutOfRange():
                    pass

    def _on_assign(self, partitions: Collection[Partition]) -> Mapping[Partition, NextOffset]:
        failpoints.reach("in_on_assign")
        self._assigned = True
        if partitions:
            self._copies.when_assigned()
        begin = self._assignment.take(partitions)
        for partition in partitions:
            if isinstance(refusal := self._assignment.refusals.get(partition), SharedGroupError):
                # As long as we stay, the database that the group feeds gets nothing of them.
                raise refusal
        return begin

    def _on_revoke(self, partitions: Collection[Partition]) -> None:
        failpoints.reach("in_on_revoke")
        self._drain(partitions)
        stored = {p: n for p, n in self._machine.stored.items() if p in partitions}
        self._source.commit(stored, self._takeover.installation, self._copies.beat)
        self._assignment.let_go(partitions, "partitions_revoked")

    def _on_lost(self, partitions: Collection[Partition]) -> None:
        failpoints.reach("in_on_lost")
        # Of a topic that is gone or hidden the lookout reports what it is.
        shown = self._source.brokers.access({partition.topic for partition in partitions})
        fenced = [p for p in partitions if shown.get(p.topic, Access.VISIBLE) is Access.VISIBLE]
        if fenced:
            log.warning(
                "fenced_by_group",
                partitions=sorted(map(str, fenced)),
                reason="for longer than session.timeout.ms, Kafka's group has not heard from this "
                "process, or this process got no answer: Kafka gives them to another member",
            )
        self._assignment.let_go(partitions, "partitions_lost")

    # ----------------------------------------------------------------------------- to the database

    def _advance(self, *, wait_s: float) -> bool:
        """Tell the machine what the writer has done, and do what it says; whether anything was."""
        outcome = self._writer.outcome(wait_s)
        if outcome is not None:
            self._tell(outcome)
        stepped = False
        while (step := self._machine.next_step(time.monotonic())) is not None:
            stepped = True
            match step:
                case Write(batch):
                    topics = {partition.topic for partition in batch.advances}
                    self._writer.do(step, self._ask_for_replaced(topics))
                case Resolve():
                    self._writer.do(step)
                case Reclaim(partition):
                    self._assignment.retake([partition])
                case Stolen(partition):
                    raise GroupFencedError(
                        f"{partition}: another process keeps claiming it. Is a second pipeline "
                        "running on this database with another PIPELINE_GROUP_ID?"
                    )
        return stepped or outcome is not None

    def _tell(self, outcome: writing.Outcome) -> None:
        now = time.monotonic()
        match outcome:
            case Committed():
                self._settled(self._machine.committed())
            case Found(places):
                self._settled(self._machine.found(places, now))
            case Fenced():
                self._machine.fenced(now)
            case Replaced(topics):
                # Its other partitions are written once these are let go.
                self._machine.fenced(now)
                self._assignment.retake_topics(topics)
            case Failed(error):
                self._machine.failed(now)
                self._outages.on_error(error)
            case Broken(error):
                raise error

    def _ask_for_replaced(self, topics: Collection[str]) -> writing.Replacement:
        """Ask Kafka for the topics' ids; the result tells which are not those of their records."""
        ids = self._assignment.topic_ids
        expected = {topic: ids[topic] for topic in topics if topic in ids}
        if not expected:
            return tuple
        wait = self._source.brokers.ask_topic_ids(expected)

        def replaced() -> Collection[str]:
            now_there = wait()
            return [topic for topic, known in expected.items() if now_there.get(topic) != known]

        return replaced

    def _settled(self, outcome: decisions.Outcome) -> None:
        if not self._machine.is_troubled:
            self._outages.on_success()
        self._written += outcome.records
        tell_fenced(outcome.foreign)
        failpoints.reach("after_commit")
        self._source.commit(outcome.moved, self._takeover.installation, self._copies.beat)
        failpoints.reach("after_kafka_commit")

    def _drain(self, partitions: Collection[Partition]) -> None:
        """Write what we hold of these partitions, within the deadline."""
        deadline = time.monotonic() + self._settings.revoke_deadline_ms / 1000
        while not self._machine.is_drained(partitions) and time.monotonic() < deadline:
            self._advance(wait_s=DRAIN_WAIT_S)
            if self._stop.is_set() and self._machine.is_troubled:
                return

    # -------------------------------------------------------------------------------- now and then

    def _look_around(self) -> None:
        now = time.monotonic()
        if now < self._look_at:
            if not self._machine.is_troubled:
                self._copies.register_new_id(self._assignment.query)
            return
        self._look_at = now + LOOK_S
        gc.collect()
        if self._machine.is_troubled:
            return
        self._assignment.release()
        self._assignment.attempt(lambda: self._copies.keep_up(self._machine.stored))
        if self._until_end:
            # A client that waits for its brokers says nothing; one that is to end must know.
            self._source.brokers.cluster_id()
        self._lookout.look()
        if self._lookout.kafka_error is None:
            self._kafka_outages.on_success()
        else:
            self._kafka_outages.on_error(self._lookout.kafka_error)
        if arrived := self._lookout.arrived:
            log.info("topic_available", topics=sorted(arrived))
            self._lookout.arrived = frozenset()
            self._source.subscribe(arrived)


@contextmanager
def _tuned_interpreter() -> Iterator[None]:
    """Two threads and many short-lived rows; measured in benchmarks/ingest.py.

    While rows are read, the writer's thread wants the interpreter back after each piece it sends;
    the default of 5 ms makes it wait longer than PostgreSQL works. And rows hold no cycles, so the
    collector would look at each of them in vain: it runs with each look around instead.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.000_5)
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        sys.setswitchinterval(interval)
