"""The partitions that one membership in the consumer group has, from assignment to revocation.

An assignment reads from top to bottom: ``on_assign`` claims the partitions (``claim``), waiting for
servers that are unavailable; each one is then started or halted. A halted partition has a reason
and stays halted until an operator or Kafka removes the reason; then it is claimed again.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from uuid import UUID

import structlog
from sqlalchemy import Engine

from pipeline import failpoints
from pipeline.db import transaction
from pipeline.errors import (
    ConfigurationError,
    RefusedError,
    Server,
    SharedGroupError,
    TransientError,
)
from pipeline.ingest.claim import Claimed, Claimer
from pipeline.ingest.copies import CopyCheck
from pipeline.ingest.halts import HaltLog
from pipeline.ingest.repeats import RepeatWindow
from pipeline.ingest.state import IngestMachine
from pipeline.kafka.access import Access
from pipeline.kafka.consumer import GroupConsumer, RebalanceListener
from pipeline.log import claims, ranges
from pipeline.outages import OutagePolicy
from pipeline.partitions import Epoch, NextOffset, Partition, lag

log = structlog.get_logger(__name__)

ASSIGN_S_MAX = 240.0
"""Maximum wait of an assignment for a server; below Kafka's max.poll.interval.ms."""
PENDING_S = 10.0
"""After this time without an assignment, while Kafka answers, that is logged."""
NOT_RECORDED = (
    "PostgreSQL is unavailable and has not recorded this; the next owner claims them all the same"
)


class Membership:
    """Starts, halts and releases the partitions that the group assigns to one consumer.

    Args:
        engine: The database.
        machine: Decides for the partitions that are started.
        consumer: The member of the group.
        claimer: Claims partitions for this member.
        copies: Checks for members that write to a copy of this database.
        installation: The identity of the database.
        outages: How long to wait for servers that are unavailable.
        halts: Logs which partitions are halted and resumed.
        stop: When it is set, a claim no longer waits for a server.
        drain: Writes what is held of partitions that are about to be revoked.

    Attributes:
        was_assigned: Whether the group has assigned something, even if it was no partition.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        machine: IngestMachine,
        consumer: GroupConsumer,
        claimer: Claimer,
        copies: CopyCheck,
        installation: UUID,
        outages: OutagePolicy,
        halts: HaltLog,
        stop: threading.Event,
        drain: Callable[[Collection[Partition]], None],
    ) -> None:
        self._engine = engine
        self._machine = machine
        self._consumer = consumer
        self._claimer = claimer
        self._copies = copies
        self._installation = installation
        self._outages = outages
        self._halts = halts
        self._stop = stop
        self._drain = drain
        self._windows: dict[Partition, RepeatWindow] = {}
        self._halted: dict[Partition, RefusedError] = {}
        self._topic_ids: dict[str, str] = {}
        self._unrecorded_releases: dict[Partition, Epoch] = {}
        self._unassigned_since: float | None = None
        self.was_assigned = False

    def join(self) -> frozenset[str]:
        """Join the group; topics of the default list that Kafka does not show.

        Raises:
            ConfigurationError: A topic does not exist.
            CopiedDatabaseError: A member of the group writes to a copy of this database.
        """
        with transaction(self._engine) as db:
            known_topics = ranges.topics(db)
        absent = self._consumer.join(
            RebalanceListener(self._on_assign, self._on_revoke, self._on_lost),
            known_topics,
            self._copies.before_joining,
        )
        self._unassigned_since = time.monotonic()
        return absent

    def log_pending(self, *, kafka_answers: bool) -> None:
        """Log once that the group, although Kafka answers, has assigned nothing yet."""
        if self._unassigned_since is None:
            return
        now = time.monotonic()
        if not kafka_answers:
            self._unassigned_since = now
        elif now - self._unassigned_since > PENDING_S:
            self._unassigned_since = None
            log.info(
                "assignment_pending",
                reason="Kafka has assigned no partition to this process yet; it waits for former "
                "members of the group for up to their session timeout",
            )

    # ----------------------------------------------------------------------------------- assignment

    def _on_assign(self, partitions: Collection[Partition]) -> Mapping[Partition, NextOffset]:
        failpoints.reach("in_on_assign")
        self.was_assigned = True
        self._unassigned_since = None
        if partitions:
            self._copies.after_assignment()
        starts = self._claim_and_start(partitions)
        for partition in partitions:
            if isinstance(refusal := self._halted.get(partition), SharedGroupError):
                # As long as we stay, the other database of the group gets no records of them.
                raise refusal
        return starts

    def _claim_and_start(self, partitions: Collection[Partition]) -> Mapping[Partition, NextOffset]:
        """Claim partitions; the offsets at which those start that are not halted."""
        starts: dict[Partition, NextOffset] = {}
        refusals: list[RefusedError] = []
        total_lag = 0
        for partition, result in self._claim_when_available(partitions).items():
            match result:
                case Claimed():
                    self._start(partition, result)
                    starts[partition] = result.start
                    total_lag += lag(result.start, result.end)
                case RefusedError():
                    self._halt(partition, result)
                    refusals.append(result)
        self._halts.log_halted(refusals)
        self._halts.log_resumed(starts)
        if starts:
            log.info(
                "partitions_claimed",
                next_offsets={str(partition): at for partition, at in sorted(starts.items())},
                lag=total_lag,
            )
        return starts

    def _claim_when_available(
        self, partitions: Collection[Partition]
    ) -> Mapping[Partition, Claimed | RefusedError]:
        """Claim; wait for servers that are unavailable: only the database has the next offsets.

        Raises:
            TransientError: A server was unavailable for too long.
            ConfigurationError: A login or a right is missing, and stays so.
        """
        if not partitions:
            return {}
        deadline = time.monotonic() + ASSIGN_S_MAX
        while True:
            try:
                results = self._claimer.claim(partitions)
            except (TransientError, ConfigurationError) as error:
                if self._stop.is_set():
                    return {}
                if time.monotonic() > deadline:
                    raise
                self._stop.wait(self._outages.on_error(error))
            else:
                self._outages.on_success(*Server)
                return results

    def _start(self, partition: Partition, claimed: Claimed) -> None:
        self._machine.claimed(partition, claimed.held, claimed.start, claimed.end)
        if claimed.topic_id is not None:
            self._topic_ids[partition.topic] = claimed.topic_id
        self._windows[partition] = claimed.window
        self._halted.pop(partition, None)

    def _halt(self, partition: Partition, refusal: RefusedError) -> None:
        self._machine.released([partition])
        self._windows.pop(partition, None)
        self._consumer.pause([partition])
        self._halted[partition] = refusal

    def reclaim(self, partitions: Collection[Partition]) -> None:
        """Claim assigned partitions again, and continue where the log ends.

        Raises:
            TransientError: A server was unavailable for too long.
            ConfigurationError: A login or a right is missing, and stays so.
        """
        for partition, start in self._claim_and_start(partitions).items():
            self._consumer.seek(partition, start)
            self._consumer.resume([partition])

    def reclaim_topics(self, topics: Collection[str]) -> None:
        """Reclaim the owned partitions of these topics."""
        self.reclaim([partition for partition in self._machine.owned if partition.topic in topics])

    # ----------------------------------------------------------------------------- while it is ours

    @property
    def halted(self) -> Mapping[Partition, RefusedError]:
        """The halted partitions, with the reason of each."""
        return self._halted

    @property
    def topic_ids(self) -> Mapping[str, str]:
        """The id that each topic had when it was claimed, where Kafka returns ids."""
        return self._topic_ids

    def window(self, partition: Partition) -> RepeatWindow:
        """The window that detects the repeats of an owned partition."""
        return self._windows[partition]

    def commit(self, next_offsets: Mapping[Partition, NextOffset]) -> None:
        """Show Kafka's tools how far the log is; best effort."""
        self._consumer.commit(next_offsets, self._installation, self._copies.heartbeat)

    # -------------------------------------------------------------------------- revocation and loss

    def _on_revoke(self, partitions: Collection[Partition]) -> None:
        failpoints.reach("in_on_revoke")
        self._drain(partitions)
        self.commit({p: stored for p, stored in self._machine.stored.items() if p in partitions})
        self.release(partitions, "partitions_revoked")

    def _on_lost(self, partitions: Collection[Partition]) -> None:
        failpoints.reach("in_on_lost")
        self._unassigned_since = time.monotonic()
        # For a topic that is deleted or hidden, the periodic checks log the reason.
        access = self._consumer.brokers.access({partition.topic for partition in partitions})
        visible = [
            partition
            for partition in partitions
            if access.get(partition.topic, Access.VISIBLE) is Access.VISIBLE
        ]
        if visible:
            log.warning(
                "member_timed_out",
                partitions=sorted(map(str, visible)),
                reason="Kafka did not answer this process for its session timeout, or this process "
                "was paused, so the group may give its partitions to another worker",
                effect="nothing is lost; this process joins the group again by itself",
            )
        self.release(partitions, "partitions_lost")

    def release(self, partitions: Collection[Partition], event: str) -> None:
        """Stop reading these partitions; rows that are not written are dropped.

        Args:
            partitions: The partitions; those that we do not own do not matter.
            event: The log event.
        """
        owned = {p: epoch for p, epoch in self._machine.owned.items() if p in partitions}
        was_failing = self._machine.is_failing
        dropped = self._machine.released(partitions)
        for partition in partitions:
            self._windows.pop(partition, None)
            self._halted.pop(partition, None)
        self._unrecorded_releases |= owned
        is_recorded = not was_failing and self.record_releases()
        if owned:
            log.info(
                event,
                partitions=sorted(map(str, owned)),
                records_to_read_again=dropped,
                **({} if is_recorded else {"effect": NOT_RECORDED}),
            )

    def record_releases(self) -> bool:
        """Record in the database what we no longer own; best effort: others can claim it anyway.

        Returns:
            Whether the database has recorded it.
        """
        if releases := self._unrecorded_releases:
            self._unrecorded_releases = {}
            try:
                with transaction(self._engine) as db:
                    claims.release(db, releases.items())
            except (TransientError, ConfigurationError):
                return False
        return True


def log_fenced(partitions: Collection[Partition]) -> None:
    """Log which partitions we no longer own, or whose next offset somebody else has moved."""
    if partitions:
        log.warning(
            "partitions_fenced",
            partitions=sorted(map(str, partitions)),
            reason="another process has claimed them, or their next offsets were moved",
            effect="this process wrote nothing to them; it claims them again if the group still "
            "assigns them to it",
        )
