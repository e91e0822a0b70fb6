"""The thread that writes to the database: the next batch fills while this one is written."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import NamedTuple, Self, TypeGuard

from sqlalchemy import Engine

from pipeline import failpoints
from pipeline.db import transaction
from pipeline.errors import (
    ConfigurationError,
    FencedError,
    InvariantError,
    MissingSegmentError,
    PipelineError,
    TransientError,
)
from pipeline.foreign_objects import refuse_foreign_objects
from pipeline.ingest.state import Batch, Resolve, Write
from pipeline.log import claims
from pipeline.log.append import append
from pipeline.log.ingest_tables import INGEST_TABLES
from pipeline.log.segments import make_segment
from pipeline.partitions import NextOffset, Ownership, Partition


class Committed(NamedTuple):
    """The batch is in the log."""


class Fenced(NamedTuple):
    """Nothing was written: a partition has another owner or another next offset."""


class TopicsReplaced(NamedTuple):
    """Nothing was written: these topics are deleted or recreated."""

    topics: Collection[str]


class Failed(NamedTuple):
    """The database failed; whether the batch is in the log is unknown."""

    error: TransientError | ConfigurationError


class Resolved(NamedTuple):
    """What is stored of the batch's partitions."""

    stored: Mapping[Partition, Ownership]


class Fatal(NamedTuple):
    """An invariant is violated, or we have a defect; the process must stop."""

    error: Exception


StepOutcome = Committed | Fenced | TopicsReplaced | Failed | Resolved | Fatal

ReplacedTopics = Callable[[], Collection[str]]
"""Waits for Kafka's answer about a batch; returns the topics from which its records did not come.

Raises:
    TransientError: Kafka does not answer.
"""


def no_topics() -> Collection[str]:
    """For a batch whose topics have no ids."""
    return ()


class _TopicsReplacedError(Exception):
    """Rolls the batch back."""

    def __init__(self, topics: Collection[str]) -> None:
        super().__init__()
        self.topics = topics


class Writer:
    """Executes one ``Write`` or ``Resolve`` at a time, in a thread of its own.

    Args:
        engine: The database.
        segment_span: Number of offsets in a new segment of the log.
    """

    def __init__(self, engine: Engine, *, segment_span: int) -> None:
        self._engine = engine
        self._span = segment_span
        self._covered: dict[str, list[tuple[NextOffset, NextOffset]]] = {}
        self._steps: SimpleQueue[tuple[Write | Resolve, ReplacedTopics] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[StepOutcome] = SimpleQueue()
        self._is_busy = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread after its current step. If the database hangs, do not wait for it."""
        self._steps.put(None)
        self._thread.join(timeout=1.0)

    def submit(self, step: Write | Resolve, replaced_topics: ReplacedTopics = no_topics) -> None:
        """Start a step; ``outcome`` returns its outcome.

        A batch is committed only if ``replaced_topics`` returns none. Its request must have been
        sent after the batch's last record arrived: the records of a recreated topic at our offsets
        arrive without any error (librdkafka issue 3255).
        """
        self._is_busy = True
        self._steps.put((step, replaced_topics))

    def outcome(self, timeout_s: float) -> StepOutcome | None:
        """The outcome of the current step, if it arrives within this time."""
        try:
            outcome = self._outcomes.get(block=timeout_s > 0, timeout=timeout_s)
        except Empty:
            return None
        self._is_busy = False
        return outcome

    def wait_until_idle(self) -> None:
        """Wait for the current step and ignore its outcome."""
        while self._is_busy:
            self.outcome(1.0)

    # ------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        while (submitted := self._steps.get()) is not None:
            step, replaced_topics = submitted
            try:
                outcome = (
                    self._write(step.batch, replaced_topics)
                    if isinstance(step, Write)
                    else self._resolve(step.batch)
                )
            except Exception as error:  # noqa: BLE001 - passed to the loop, which raises it
                outcome = Fatal(error)
            self._outcomes.put(outcome)

    def _write(self, batch: Batch, replaced_topics: ReplacedTopics) -> StepOutcome:
        try:
            self._make_segments(_offsets_of(batch, ahead=self._span // 10))
            try:
                self._append(batch, replaced_topics)
            except MissingSegmentError:
                # A wide gap in the offsets, or a segment that was dropped: check every single row.
                self._covered.clear()
                self._make_segments((row.topic, NextOffset(row.offset)) for row in batch.rows)
                self._append(batch, replaced_topics)
            failpoints.reach("after_commit_before_ack")
        except FencedError:
            return Fenced()
        except _TopicsReplacedError as error:
            return TopicsReplaced(error.topics)
        except InvariantError as error:
            return self._explained(error)
        except PipelineError as error:
            return Failed(error) if _may_pass(error) else Fatal(error)
        return Committed()

    def _explained(self, error: InvariantError) -> StepOutcome:
        """What somebody has put on our tables, if it may be the reason; nothing was written."""
        try:
            with transaction(self._engine) as db:
                refuse_foreign_objects(db, INGEST_TABLES)
        except PipelineError as reason:
            return Failed(reason) if _may_pass(reason) else Fatal(error)
        return Fatal(error)

    def _append(self, batch: Batch, replaced_topics: ReplacedTopics) -> None:
        with transaction(self._engine) as db:
            append(db, batch.rows, batch.advances)
            # Requested before, and answered while PostgreSQL worked.
            if topics := replaced_topics():
                raise _TopicsReplacedError(topics)

    def _resolve(self, batch: Batch) -> StepOutcome:
        try:
            with transaction(self._engine) as db:
                return Resolved(claims.lock_ownerships(db, batch.advances))
        except PipelineError as error:
            return Failed(error) if _may_pass(error) else Fatal(error)

    def _make_segments(self, needed: Iterable[tuple[str, NextOffset]]) -> None:
        for topic, offset in needed:
            covered = self._covered.setdefault(topic, [])
            if not any(first <= offset < end for first, end in covered):
                with transaction(self._engine) as db:
                    covered.append(make_segment(db, topic, offset, self._span))


def _may_pass(error: PipelineError) -> TypeGuard[TransientError | ConfigurationError]:
    """Whether waiting may help: a server becomes available, a right or a password is corrected."""
    return isinstance(error, TransientError | ConfigurationError)


def _offsets_of(batch: Batch, *, ahead: int) -> Iterator[tuple[str, NextOffset]]:
    """Where each partition's part of the batch begins and ends, and an offset soon after it."""
    for partition, advance in batch.advances.items():
        yield partition.topic, advance.expected
        yield partition.topic, advance.new
        yield partition.topic, NextOffset(advance.new + ahead)
