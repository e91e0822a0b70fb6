"""The partitions that the group has given us, from one assignment to the next revocation.

Each is claimed and looked at (``takeover``). One that may go on is the machine's from then on; one
that must not stands still, and is refused with a reason until an operator or Kafka changes it.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping

import structlog
from sqlalchemy import Connection, Engine

from pipeline.db import transaction
from pipeline.errors import ConfigurationError, RefusedError, TransientError
from pipeline.ingest.claim import Taken, Takeover
from pipeline.ingest.repeats import RepeatWindow
from pipeline.ingest.state import Machine
from pipeline.kafka import GroupConsumer
from pipeline.log import offsets
from pipeline.outages import OutagePolicy
from pipeline.partitions import Epoch, NextOffset, Partition, lag

log = structlog.get_logger(__name__)

ASSIGN_S_MAX = 240.0
"""How long an assignment may wait for the database; below Kafka's max.poll.interval.ms."""
RETRY_S = 1.0
"""Wait before asking again a server that is away."""


class Assignment:
    """What one membership in the group has been given.

    Args:
        engine: The database.
        machine: It is told which partitions are ours.
        source: Kafka, as this membership reads it.
        takeover: Claims partitions for this membership.
        outages: How long to wait for servers that are unavailable when a partition is taken.
        stop: When it is set, nothing is waited for any more.
    """

    def __init__(
        self,
        engine: Engine,
        machine: Machine,
        source: GroupConsumer,
        takeover: Takeover,
        outages: OutagePolicy,
        stop: threading.Event,
    ) -> None:
        self._engine = engine
        self._machine = machine
        self._source = source
        self._takeover = takeover
        self._outages = outages
        self._stop = stop
        self._windows: dict[Partition, RepeatWindow] = {}
        self._refusals: dict[Partition, RefusedError] = {}
        self._unreleased: dict[Partition, Epoch] = {}
        self._topic_ids: dict[str, str] = {}
        self._has_failed = False

    @property
    def refusals(self) -> Mapping[Partition, RefusedError]:
        """The partitions that stand still, with the reason of each."""
        return self._refusals

    @property
    def topic_ids(self) -> Mapping[str, str]:
        """The id that each topic had when it was taken over, where Kafka tells ids."""
        return self._topic_ids

    def window(self, partition: Partition) -> RepeatWindow:
        """What tells the repeats of a partition that is ours."""
        return self._windows[partition]

    def take(self, partitions: Collection[Partition]) -> Mapping[Partition, NextOffset]:
        """Take partitions over; where those that may go on begin.

        Raises:
            TransientError: A server was unavailable for too long.
            ConfigurationError: A login or a right is missing, and stays so.
        """
        begin: dict[Partition, NextOffset] = {}
        behind = 0
        for partition, outcome in self._take_patiently(partitions).items():
            match outcome:
                case Taken(held, first, end, topic_id, window):
                    self._machine.claimed(partition, held, first, end)
                    if topic_id is not None:
                        self._topic_ids[partition.topic] = topic_id
                    self._windows[partition] = window
                    self._refusals.pop(partition, None)
                    begin[partition] = first
                    behind += lag(first, end)
                case RefusedError() as refusal:
                    self._refuse(partition, refusal)
        if begin:
            log.info(
                "partitions_claimed",
                next_offsets={str(one): first for one, first in sorted(begin.items())},
                lag=behind,
            )
        return begin

    def retake(self, partitions: Collection[Partition]) -> None:
        """Claim partitions again that are assigned to us, and read on where the log ends."""
        for partition, begin in self.take(partitions).items():
            self._source.seek(partition, begin)
            self._source.resume([partition])

    def retake_topics(self, topics: Collection[str]) -> None:
        """The same, for the partitions of these topics that are ours."""
        self.retake([partition for partition in self._machine.owned if partition.topic in topics])

    def let_go(self, partitions: Collection[Partition], event: str) -> None:
        """Hold nothing of these partitions any more; what is not written of them is dropped.

        Args:
            partitions: Which; those of them that are not ours do not matter.
            event: How the log tells it.
        """
        held = {p: epoch for p, epoch in self._machine.owned.items() if p in partitions}
        was_troubled = self._machine.is_troubled
        dropped = self._machine.released(partitions)
        for partition in partitions:
            self._windows.pop(partition, None)
            self._refusals.pop(partition, None)
        if held:
            log.info(event, partitions=sorted(map(str, held)), records_dropped=dropped)
        self._unreleased |= held
        if not was_troubled:
            self.release()

    def release(self) -> None:
        """Say in the database what we no longer own; while it fails, that waits."""
        if gone := self._unreleased:
            self._unreleased = {}
            try:
                with transaction(self._engine) as db:
                    offsets.release(db, gone.items())
            except (TransientError, ConfigurationError) as error:
                log.info(
                    "partitions_not_released", partitions=sorted(map(str, gone)), reason=str(error)
                )

    def attempt(self, work: Callable[[], None]) -> None:
        """Record or look at what may also be done later; a failure is an outage like any other.

        Raises:
            PipelineError: It has lasted for longer than the policy allows.
        """
        try:
            work()
        except (TransientError, ConfigurationError) as error:
            self._has_failed = True
            self._outages.on_error(error)
        else:
            if self._has_failed:
                self._has_failed = False
                self._outages.on_success()

    def query(self, work: Callable[[Connection], None]) -> None:
        """The same, with a transaction of its own."""

        def in_transaction() -> None:
            with transaction(self._engine) as db:
                work(db)

        self.attempt(in_transaction)

    def _take_patiently(
        self, partitions: Collection[Partition]
    ) -> Mapping[Partition, Taken | RefusedError]:
        """Wait for servers that are away: without the database there is no place to begin at."""
        if not partitions:
            return {}
        deadline = time.monotonic() + ASSIGN_S_MAX
        while True:
            try:
                taken = self._takeover.take(partitions)
            except (TransientError, ConfigurationError) as error:
                if self._stop.is_set():
                    return {}
                if time.monotonic() > deadline:
                    raise
                self._stop.wait(self._outages.on_error(error))
            else:
                self._outages.on_success()
                return taken

    def _refuse(self, partition: Partition, refusal: RefusedError) -> None:
        self._machine.released([partition])
        self._windows.pop(partition, None)
        self._source.pause([partition])
        known = self._refusals.get(partition)
        self._refusals[partition] = refusal
        if str(known) != str(refusal):
            log.error(
                "partition_stands_still",
                topic=partition.topic,
                partition=partition.number,
                reason=str(refusal),
            )


def tell_fenced(partitions: Collection[Partition]) -> None:
    """Log which partitions turned out to be no longer ours, or not where we left them."""
    if partitions:
        log.warning(
            "fenced",
            partitions=sorted(map(str, partitions)),
            reason="another process has claimed them, or their next offsets were moved",
            effect="nothing of ours was written; they are claimed again if Kafka leaves them to us",
        )
