"""Ingest for as long as the process runs: one membership in the group after another."""

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy import Engine

from pipeline.db import transaction
from pipeline.errors import (
    ConfigurationError,
    GroupFencedError,
    MemberReplacedError,
    PipelineError,
    TransientError,
)
from pipeline.ingest.halts import HaltLog
from pipeline.ingest.loop import IngestLoop
from pipeline.ingest.process import ProcessState, Progress
from pipeline.ingest.retention import RetentionDeadline
from pipeline.ingest.writer import Writer
from pipeline.kafka.consumer import GroupConsumer
from pipeline.kafka.reports import ClientReports
from pipeline.log import workers
from pipeline.log.installation import installation_id
from pipeline.outages import OutageLog, OutagePolicy
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

REPLACED_MAX = 3
"""How often another member may take our place in the group within ``REPLACED_S``."""
REPLACED_S = 60.0
"""See ``REPLACED_MAX``."""


class Ingest:
    """Reads the configured topics into the log until it is stopped.

    Args:
        settings: What to read, and within which bounds.
        engine: The database, with the schema of this program.
        stop: Set it to finish the batch in hand and return.
        until_end: Return when the log holds what Kafka had at the start.
        observe: Called after each poll, from this thread.
        collect_garbage: Called every few seconds, for a process without automatic collection.
        outages: Where outages are logged, for a process that also does other work.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        *,
        stop: threading.Event,
        until_end: bool = False,
        observe: Callable[[Progress], None] = lambda _progress: None,
        collect_garbage: Callable[[], object] = lambda: None,
        outages: OutageLog | None = None,
    ) -> None:
        self._settings = settings
        self._stop = stop
        self._until_end = until_end
        self._written = 0
        self._retention = RetentionDeadline()
        outages = outages or OutageLog()
        self._outages = OutagePolicy(
            waits_forever=not until_end,
            time_left=self._retention.requested_time_left,
            outages=outages,
        )
        self._process = ProcessState(
            engine=engine,
            stop=stop,
            until_end=until_end,
            writer=Writer(engine, segment_span=settings.segment_offsets),
            outages=self._outages,
            kafka_outages=OutagePolicy(
                waits_forever=True, time_left=self._retention.time_left, outages=outages
            ),
            kafka_reports=ClientReports(),
            retention=self._retention,
            halts=HaltLog(),
            count_written=self._count_written,
            observe=observe,
            collect_garbage=collect_garbage,
        )
        self._replaced_at: list[float] = []

    def run(self) -> None:
        """Ingest until stopped, or until caught up.

        Raises:
            RefusedError: Caught up, but a partition is halted to protect data; or the group writes
                to another database.
            GroupFencedError: Another process keeps claiming our partitions, or taking our place in
                the group.
            ConfigurationError: A topic, a login or a right is missing, and stays so.
            TransientError: A one-shot run has waited long enough for a server.
            InvariantError: An invariant is violated.
        """
        with self._process.writer:
            while not self._stop.is_set():
                try:
                    self._serve_membership()
                except (TransientError, ConfigurationError) as error:
                    if not self._has_new_login(error):
                        self._stop.wait(self._outages.on_error(error))
                        self._has_new_login(error)
                except MemberReplacedError as error:
                    self._on_replaced(error)
                else:
                    break

    def _serve_membership(self) -> None:
        """Join the group, ingest, leave."""
        consumer = GroupConsumer(self._settings, self._process.kafka_reports)
        try:
            with transaction(self._process.engine) as db:
                installation, server = installation_id(db), workers.here(db)
            loop = IngestLoop(
                self._process,
                self._settings,
                consumer,
                installation=installation,
                server=server,
                was_replaced=bool(self._replaced_at),
            )
            refusals = loop.run()
        finally:
            self._retention.disconnect()
            consumer.leave()
        if self._until_end and refusals:
            raise refusals[0]

    def _count_written(self, records: int) -> int:
        self._written += records
        return self._written

    def _has_new_login(self, error: PipelineError) -> bool:
        """Whether the login was refused and the settings have another one, which is now used."""
        if not (isinstance(error, ConfigurationError) and error.is_login):
            return False
        before = self._settings.kafka_client()
        self._settings = self._settings.with_fresh_logins()
        if self._settings.kafka_client() == before:
            return False
        log.info("password_reloaded", server="Kafka", effect="the new login is used")
        return True

    def _on_replaced(self, error: MemberReplacedError) -> None:
        """Let the loop join again, unless another process keeps taking our place."""
        now = time.monotonic()
        self._replaced_at = [at for at in self._replaced_at if now - at < REPLACED_S] + [now]
        if len(self._replaced_at) >= REPLACED_MAX:
            raise GroupFencedError(
                f"{error}. Find out whether another process runs with the same "
                "PIPELINE_GROUP_INSTANCE_ID, "
                f"{self._settings.group_instance_id!r}"
            ) from None
        log.warning("member_replaced", reason=str(error), effect="joining the group again")
