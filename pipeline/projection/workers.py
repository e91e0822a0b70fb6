"""Who projects what: the workers that live share the partitions of the log.

Nothing that is right hangs on it: the checkpoint's row is the lock, and any worker may project. It
keeps N workers from doing the same look-ups N times and standing in each other's way.

Each worker says in a row of its own that it lives, for ``LIFE`` by the database's clock. What is
whose follows from these rows alone, so there is nothing to claim and nothing to give back: of the
workers that have a projector, in the order of their start, the n-th takes every n-th partition.
Projectors stay together, so that for each partition all read models move in one transaction.
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
from pipeline.partitions import Partition
from pipeline.projection.checkpoints import Standing

LIFE = timedelta(seconds=10)
"""How long a worker counts that says nothing: killed, stopped, or cut off from the database."""
SAY_S = 2.0
"""How often a worker says that it lives, and looks who else does."""

projection_workers = Table(
    "projection_workers",
    metadata,
    Column("worker", Uuid, primary_key=True, comment="Its own for each start."),
    Column("host", Text, nullable=False, comment="Where the process runs."),
    Column("pid", Integer, nullable=False, comment="Its process id there."),
    Column("projectors", ARRAY(Text), nullable=False, comment="The projectors that it has."),
    Column(
        "since",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.now(),
        comment="When it started; their order.",
    ),
    Column(
        "expires_at",
        DateTime(timezone=True),
        nullable=False,
        comment="Until when it counts, unless it says again that it lives.",
    ),
    schema=LOG_SCHEMA,
    comment="The workers that project, and so share the partitions. Nothing that is right hangs on "
    "it: it may be emptied at any time.",
    # A few rows, each rewritten every two seconds: room for the new version on the same page.
    postgresql_with={"fillfactor": "50"},
)

_row = insert(projection_workers).values(expires_at=func.now() + bindparam("life", type_=Interval))
SAY = _row.on_conflict_do_update(
    index_elements=["worker"], set_={"expires_at": _row.excluded.expires_at}
)
# Skips what another worker removes, so that nobody waits for anybody.
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
    .where(projection_workers.c.expires_at <= func.now() + 3 * LIFE)
    .order_by(projection_workers.c.since, projection_workers.c.worker)
)
PARTITIONS = text('SELECT topic, "partition" FROM pipeline.consumer_offsets')
LEAVE = delete(projection_workers).where(projection_workers.c.worker == bindparam("of_worker"))


class Member(NamedTuple):
    """A worker that lives.

    Attributes:
        since: When it started, by the database's clock.
        projectors: Those that it has; while a new version is rolled out not all have the same.
    """

    worker: UUID
    host: str
    pid: int
    since: datetime
    projectors: Sequence[str]


def living(db: Connection) -> list[Member]:
    """The workers that project, in the order of their start."""
    return [Member(*row) for row in db.execute(LIVING)]


def known_partitions(db: Connection) -> list[Partition]:
    """The partitions of the log."""
    return [Partition(*row) for row in db.execute(PARTITIONS)]


def shared_out(
    members: Sequence[Member], projector: str, partitions: Collection[Partition]
) -> Mapping[Partition, UUID]:
    """Whose each partition is, for one projector: everyone's share differs by one at most.

    Args:
        members: In the order of their start.
        projector: Its name.
        partitions: All that there are.

    Returns:
        Every partition, unless nobody has the projector: then none.
    """
    able = [member.worker for member in members if projector in member.projectors]
    if not able:
        return {}
    shares: dict[Partition, UUID] = {}
    shift = 0
    for turn, (_topic, same) in enumerate(groupby(sorted(partitions), lambda one: one.topic)):
        # Keyed by tenant, the busy partition has one number in each topic. Where all shares are
        # equal so far, the next topic may begin with another worker.
        if turn and len(shares) % len(able) == 0:
            shift += 1
        begin = len(shares) + shift
        shares |= {one: able[(begin + place) % len(able)] for place, one in enumerate(same)}
    return shares


class Crew:
    """This worker among those that project.

    Args:
        engine: The database.
        projectors: The names of those that it has.
    """

    def __init__(self, engine: Engine, projectors: Iterable[str]) -> None:
        self._engine = engine
        self._worker = uuid4()
        self._projectors = sorted(projectors)
        self._owners: Mapping[str, Mapping[Partition, UUID]] = {}
        self._say_at = 0.0

    def check_in(self) -> None:
        """Say that we live and see who else does, if it is time; else it costs nothing.

        Raises:
            TransientError: The server went away.
        """
        if time.monotonic() < self._say_at:
            return
        with transaction(self._engine) as db:
            db.execute(
                SAY,
                {
                    "worker": self._worker,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "projectors": self._projectors,
                    "life": LIFE,
                },
            )
            db.execute(REMOVE_EXPIRED)
            members, partitions = living(db), known_partitions(db)
        self._owners = {name: shared_out(members, name, partitions) for name in self._projectors}
        self._say_at = time.monotonic() + SAY_S

    def share(self, standings: Sequence[Standing]) -> list[Standing]:
        """What of the work is ours, by what we saw when we last checked in.

        A partition that has come since is everybody's, until everybody has seen it.
        """
        return [
            one
            for one in standings
            if self._owners[one.projector].get(one.partition, self._worker) == self._worker
        ]

    def leave(self) -> None:
        """Have the others take over at once."""
        with transaction(self._engine) as db:
            db.execute(LEAVE, {"of_worker": self._worker})
