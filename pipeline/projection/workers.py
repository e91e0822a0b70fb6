"""Which worker projects what: the live workers share the partitions of the log.

Correctness does not depend on it: the checkpoint's row is the lock, and any worker may project. It
keeps N workers from running the same queries N times and from waiting for each other.

Each worker has a row, whose heartbeat is valid for ``EXPIRES_AFTER`` by the database's clock. The
shares follow from these rows alone, so nothing is claimed and nothing released: of the workers that
have a projector, in the order of their start, the n-th takes every n-th partition. Projectors stay
together, so that for each partition all read models move in one transaction.
"""

import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    Interval,
    Table,
    Text,
    Uuid,
    bindparam,
    delete,
    func,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from pipeline.db import LOG_SCHEMA, metadata, transaction
from pipeline.log.ranges import ranges
from pipeline.partitions import Partition
from pipeline.projection.checkpoints import ProjectorProgress

EXPIRES_AFTER = timedelta(seconds=10)
"""How long a worker without a heartbeat counts: killed, stopped, or cut off from the database."""
HEARTBEAT_S = 2.0
"""How often a worker writes its heartbeat and reads the others'."""

projection_workers = Table(
    "projection_workers",
    metadata,
    Column("worker", Uuid, primary_key=True, comment="Id of the worker, new at each start."),
    Column("host", Text, nullable=False, comment="Where the process runs."),
    Column("pid", Integer, nullable=False, comment="Its process id there."),
    Column("projectors", ARRAY(Text), nullable=False, comment="The projectors of its program."),
    Column(
        "since",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.now(),
        comment="When it started. Workers are ordered by it.",
    ),
    Column(
        "expires_at",
        DateTime(timezone=True),
        nullable=False,
        comment="When its last heartbeat expires.",
    ),
    schema=LOG_SCHEMA,
    comment="The workers that share the partitions for projection. Correctness does not depend on "
    "it: it may be emptied at any time.",
    # A few rows, each rewritten every two seconds: room for the new version on the same page.
    postgresql_with={"fillfactor": "50"},
)

_row = insert(projection_workers).values(expires_at=func.now() + bindparam("life", type_=Interval))
HEARTBEAT = _row.on_conflict_do_update(
    index_elements=["worker"],
    set_={"expires_at": _row.excluded.expires_at, "projectors": _row.excluded.projectors},
)
# SKIP LOCKED: no worker waits for another one that removes the same rows.
REMOVE_EXPIRED = text("""
DELETE FROM pipeline.projection_workers WHERE worker IN (
    SELECT worker FROM pipeline.projection_workers WHERE expires_at < now() FOR UPDATE SKIP LOCKED)
""")
LIVING = (
    select(
        projection_workers.c.worker,
        projection_workers.c.host,
        projection_workers.c.pid,
        projection_workers.c.since,
        projection_workers.c.projectors,
    )
    .where(projection_workers.c.expires_at >= func.now())
    # Written before the server's clock was set back, or before a restore: not by a living worker.
    .where(projection_workers.c.expires_at <= func.now() + 3 * EXPIRES_AFTER)
    .order_by(projection_workers.c.since, projection_workers.c.worker)
)
LEAVE = delete(projection_workers).where(projection_workers.c.worker == bindparam("of_worker"))


class LiveWorker(NamedTuple):
    """A live worker.

    Attributes:
        since: When it started, by the database's clock.
        projectors: Those of its program; they differ while a new version is rolled out.
    """

    worker: UUID
    host: str
    pid: int
    since: datetime
    projectors: Sequence[str]


def living(db: Connection) -> list[LiveWorker]:
    """The live workers, in the order of their start."""
    return [LiveWorker(*row) for row in db.execute(LIVING)]


def shared_out(
    members: Sequence[LiveWorker], projector: str, partitions: Collection[Partition]
) -> Mapping[Partition, UUID]:
    """The owner of each partition, for one projector; shares differ by one at most.

    Args:
        members: In the order of their start.
        projector: Its name.
        partitions: All partitions of the log.

    Returns:
        Every partition with its owner; empty if no worker has the projector.
    """
    able = [member.worker for member in members if projector in member.projectors]
    if not able:
        return {}
    shares: dict[Partition, UUID] = {}
    shift = 0
    by_topic = groupby(sorted(partitions), lambda partition: partition.topic)
    for topic_number, (_topic, of_topic) in enumerate(by_topic):
        # Keyed by tenant, the busy partition has the same number in each topic. Where all shares
        # are equal so far, the next topic may begin with another worker.
        if topic_number and len(shares) % len(able) == 0:
            shift += 1
        begin = len(shares) + shift
        shares |= {
            partition: able[(begin + number) % len(able)]
            for number, partition in enumerate(of_topic)
        }
    return shares


class WorkerRegistry:
    """This worker's row among the live workers, and its share of the partitions.

    Args:
        engine: The database.
        projectors: The names of its projectors.
    """

    def __init__(self, engine: Engine, projectors: Iterable[str]) -> None:
        self._engine = engine
        self._worker = uuid4()
        self._projectors = sorted(projectors)
        self._owners: Mapping[str, Mapping[Partition, UUID]] = {}
        self._heartbeat_at = 0.0

    def heartbeat(self) -> None:
        """Write our heartbeat and read the others', every ``HEARTBEAT_S``; in between do nothing.

        Raises:
            TransientError: The server is unavailable.
        """
        if time.monotonic() < self._heartbeat_at:
            return
        with transaction(self._engine) as db:
            db.execute(
                HEARTBEAT,
                {
                    "worker": self._worker,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "projectors": self._projectors,
                    "life": EXPIRES_AFTER,
                },
            )
            db.execute(REMOVE_EXPIRED)
            members, partitions = living(db), list(ranges(db))
        self._owners = {name: shared_out(members, name, partitions) for name in self._projectors}
        self._heartbeat_at = time.monotonic() + HEARTBEAT_S

    def share(self, lagging: Sequence[ProjectorProgress]) -> list[ProjectorProgress]:
        """What of the work is ours, as of the last heartbeat.

        A partition that is newer belongs to every worker until the next heartbeats.
        """
        return [
            progress
            for progress in lagging
            if self._owners[progress.projector].get(progress.partition, self._worker)
            == self._worker
        ]

    def serve(self, projectors: Iterable[str]) -> None:
        """Take a share in these projectors alone, from the next heartbeat on, which is due now.

        Of a projector that this worker leaves out, the other workers have all partitions.
        """
        if sorted(projectors) != self._projectors:
            self._projectors = sorted(projectors)
            self._heartbeat_at = 0.0
            self.heartbeat()

    def leave(self) -> None:
        """Delete our row, so that the others take over at once."""
        with transaction(self._engine) as db:
            db.execute(LEAVE, {"of_worker": self._worker})
