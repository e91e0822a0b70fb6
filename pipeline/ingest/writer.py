"""The thread that talks to the database, so that the next batch fills while this one is written."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import NamedTuple, Self

from sqlalchemy import Engine

from pipeline import failpoints
from pipeline.db import LOG_SCHEMA, metadata, transaction
from pipeline.errors import (
    ConfigurationError,
    FencedError,
    InvariantError,
    MissingSegmentError,
    PipelineError,
    TransientError,
)
from pipeline.foreign_objects import refuse_foreign_objects
from pipeline.ingest.machine import Batch, Resolve, Write
from pipeline.log import ownership
from pipeline.log.append import append
from pipeline.log.ownership import Place
from pipeline.positions import NextOffset, Partition


class Committed(NamedTuple):
    """The batch is in the log."""


class Fenced(NamedTuple):
    """Nothing was written: a partition has another owner or stands elsewhere."""

    error: FencedError


class Replaced(NamedTuple):
    """Nothing was written: these topics are gone, or others have their names."""

    topics: Collection[str]


class Failed(NamedTuple):
    """The database went away; whether the batch is in the log is unknown."""

    error: PipelineError


class Found(NamedTuple):
    """Where the batch's partitions stand."""

    places: Mapping[Partition, Place]


class Broken(NamedTuple):
    """What must not happen has happened, or a defect of ours; the process must stop."""

    error: Exception


Outcome = Committed | Fenced | Replaced | Failed | Found | Broken

Replacement = Callable[[], Collection[str]]
"""Waits for Kafka's word on a batch; the topics that are not those whose records it holds.

Raises:
    TransientError: Kafka does not say.
"""


class _ReplacedError(Exception):
    """Rolls the batch back."""

    def __init__(self, topics: Collection[str]) -> None:
        super().__init__()
        self.topics = topics


class Writer:
    """Does one ``Write`` or ``Resolve`` at a time, in a thread of its own.

    Args:
        engine: The database.
        segment_span: How many offsets a new segment of the log holds.
    """

    def __init__(self, engine: Engine, *, segment_span: int) -> None:
        self._engine = engine
        self._span = segment_span
        self._covered: dict[str, list[tuple[NextOffset, NextOffset]]] = {}
        self._jobs: SimpleQueue[tuple[Write | Resolve, Replacement] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._busy = False
        self._thread = threading.Thread(target=self._serve, name="writer", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the thread end after what it does now. It is not waited for if the database hangs."""
        self._jobs.put(None)
        self._thread.join(timeout=1.0)

    def do(self, job: Write | Resolve, replaced: Replacement = tuple) -> None:
        """Hand over a step; its outcome comes out of ``outcome``.

        A batch is committed only if ``replaced`` names no topic. The question must have been asked
        after the batch's last record had come: what a topic that was made anew has at our offsets
        comes without any error (librdkafka issue 3255).
        """
        self._busy = True
        self._jobs.put((job, replaced))

    def outcome(self, timeout_s: float) -> Outcome | None:
        """The outcome of the step in hand, if it comes within this time."""
        try:
            outcome = self._outcomes.get(block=timeout_s > 0, timeout=timeout_s)
        except Empty:
            return None
        self._busy = False
        return outcome

    def settle(self) -> None:
        """Wait for the step in hand, whose outcome nobody wants any more."""
        while self._busy:
            self.outcome(1.0)

    def _serve(self) -> None:
        while (handed := self._jobs.get()) is not None:
            job, replaced = handed
            try:
                outcome = (
                    self._write(job.batch, replaced)
                    if isinstance(job, Write)
                    else self._find(job.batch)
                )
            except Exception as error:  # noqa: BLE001 - carried to the loop, which raises it
                outcome = Broken(error)
            self._outcomes.put(outcome)

    def _write(self, batch: Batch, replaced: Replacement) -> Outcome:
        try:
            self._make_segments(_likely(batch, ahead=self._span // 10))
            try:
                self._append(batch, replaced)
            except MissingSegmentError:
                # A wide gap in the offsets, or a segment that is gone: look at every single row.
                self._covered.clear()
                self._make_segments((row.topic, NextOffset(row.offset)) for row in batch.rows)
                self._append(batch, replaced)
            failpoints.reach("after_commit_before_ack")
        except FencedError as error:
            return Fenced(error)
        except _ReplacedError as error:
            return Replaced(error.topics)
        except InvariantError as error:
            return self._blamed(error)
        except PipelineError as error:
            return Failed(error) if _may_pass(error) else Broken(error)
        return Committed()

    def _blamed(self, error: InvariantError) -> Outcome:
        """What somebody has put on our tables, if it may be the reason; nothing was written."""
        try:
            with transaction(self._engine) as db:
                refuse_foreign_objects(db, metadata.tables.values(), [LOG_SCHEMA])
        except PipelineError as blamed:
            return Failed(blamed) if _may_pass(blamed) else Broken(error)
        return Broken(error)

    def _append(self, batch: Batch, replaced: Replacement) -> None:
        with transaction(self._engine) as db:
            append(db, batch.rows, batch.advances)
            # Asked before, and answered while PostgreSQL worked.
            if topics := replaced():
                raise _ReplacedError(topics)

    def _find(self, batch: Batch) -> Outcome:
        try:
            with transaction(self._engine) as db:
                return Found(ownership.find(db, batch.advances))
        except PipelineError as error:
            return Failed(error) if _may_pass(error) else Broken(error)

    def _make_segments(self, places: Iterable[tuple[str, NextOffset]]) -> None:
        for topic, offset in places:
            covered = self._covered.setdefault(topic, [])
            if not any(first <= offset < end for first, end in covered):
                with transaction(self._engine) as db:
                    covered.append(ownership.make_segment(db, topic, offset, self._span))


def _may_pass(error: PipelineError) -> bool:
    """Whether waiting may help: a server comes back, a right or a password is mended."""
    return isinstance(error, TransientError | ConfigurationError)


def _likely(batch: Batch, *, ahead: int) -> Iterator[tuple[str, NextOffset]]:
    """Where each partition's part of the batch lies, and a place it will reach before long."""
    for partition, advance in batch.advances.items():
        yield partition.topic, advance.expected
        yield partition.topic, advance.new
        yield partition.topic, NextOffset(advance.new + ahead)
