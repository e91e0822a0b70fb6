"""What lives as long as the process, and outlives a membership in the group."""

import threading
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import Engine

from pipeline.ingest.halts import HaltLog
from pipeline.ingest.retention import RetentionDeadline
from pipeline.ingest.writer import Writer
from pipeline.kafka.reports import ClientReports
from pipeline.outages import OutagePolicy


class Progress(NamedTuple):
    """The progress of an ingest.

    Attributes:
        written: Records appended by this process.
        lag: Offsets between the log and Kafka's ends as last reported, over all owned partitions.
    """

    written: int
    lag: int


class ProcessState(NamedTuple):
    """What lives as long as the process.

    Attributes:
        engine: The database.
        stop: When it is set, finish the batch in hand and return.
        until_end: Return when the log holds what Kafka had at the start.
        writer: The writer's thread.
        outages: How long to wait for the database, and for Kafka where it is needed.
        kafka_outages: How to log that Kafka does not answer the checks; waits forever.
        kafka_reports: What the Kafka clients report about their connections.
        retention: When Kafka deletes the oldest record that is not in the log.
        halts: Logs which partitions are halted and resumed.
        count_written: Adds to the number of records written; returns the total.
        observe: Called with the progress after each poll.
        collect_garbage: Called every few seconds: the command turns automatic collection off.
    """

    engine: Engine
    stop: threading.Event
    until_end: bool
    writer: Writer
    outages: OutagePolicy
    kafka_outages: OutagePolicy
    kafka_reports: ClientReports
    retention: RetentionDeadline
    halts: HaltLog
    count_written: Callable[[int], int]
    observe: Callable[[Progress], None]
    collect_garbage: Callable[[], object]
