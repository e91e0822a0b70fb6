"""Whether a member of our consumer group writes to a copy of this database at this moment.

A copy has the identity of the original, so the identity does not distinguish the two. The members
do: each member of the group must write to this very database, and it registers there
(``log.workers``). A member that is alive and not registered here writes to another database. A
database that was restored, failed over or upgraded has no such member, because no worker writes to
the old one any more.

A worker checks before it joins, so a copy takes nothing from the original, not even for a moment;
and again with its first partitions, for members that have joined at the same time. It checks before
it claims or commits anything. The member that was first never gives way. No clocks are compared: a
member is alive if the brokers list it, and if its heartbeat, which it commits after each
registration, rises.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine

from pipeline.db import transaction
from pipeline.errors import CopiedDatabaseError
from pipeline.kafka.consumer import GroupConsumer
from pipeline.kafka.group import GroupCommit, Member
from pipeline.log import workers
from pipeline.log.workers import Server
from pipeline.partitions import NextOffset, Partition
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

CHECK_S = 5.0
"""How often the periodic checks run; in each round a worker registers and commits a heartbeat."""
RETRY_S = 0.5
"""Pause between two looks at members that are not registered here."""
HEARTBEATS_MIN = 2
"""How many heartbeats prove that a member writes to another database. One may have been sent before
this database replaced the one that it was written to."""
REGISTER_S_MAX = 2 * CHECK_S
"""Maximum time that a worker of this database needs to register after it has joined."""


class CopyCheck:
    """Looks for members of the group that write to a copy, for one membership in it.

    Args:
        engine: The database.
        consumer: The member of the group.
        settings: Group and topics.
        stop: When it is set, the check no longer waits.
        installation: The identity of the database.
        server: Where it runs.
        was_replaced: This process was in the group, and Kafka gave its ``group.instance.id`` to
            another member. That may be an earlier request of our own client, which never registers.
    """

    def __init__(
        self,
        engine: Engine,
        consumer: GroupConsumer,
        settings: Settings,
        stop: threading.Event,
        *,
        installation: UUID,
        server: Server,
        was_replaced: bool,
    ) -> None:
        self._engine = engine
        self._consumer = consumer
        self._settings = settings
        self._stop = stop
        self._installation = installation
        self._was_replaced = was_replaced
        self._last_tried: str = ""
        self._checked: str | None = None
        self._heartbeat = 0
        # A member that checked while the brokers listed nobody, or whose database was replaced
        # while it ran, checks with every heartbeat.
        self._is_unsure = False
        self._heartbeats_seen: dict[str, set[int]] = {}
        self._server = server

    # ------------------------------------------------------------------------------ when it checks

    def before_joining(self) -> None:
        """Wait until no member of the group writes to a copy.

        A member that is listed and does nothing may be dead: wait until the brokers would have
        removed it from the group.

        Raises:
            CopiedDatabaseError: A member does. The group has not seen this process.
            TransientError: A server is unavailable.
        """
        self._wait_until_all_are_registered(
            self._consumer.session_timeout_s + REGISTER_S_MAX, has_joined=False
        )
        if not self._stop.is_set():
            self._log_move_since_last_worker()

    def after_assignment(self) -> None:
        """Check once per member id: with the first partitions, and after the session timed out.

        Raises:
            CopiedDatabaseError: A member writes to a copy, and was first.
            TransientError: A server is unavailable.
        """
        if self._consumer.member_id != self._checked:
            with transaction(self._engine) as db:
                self._register(db)
            self._wait_until_all_are_registered(REGISTER_S_MAX, has_joined=True)
            self._checked = self._consumer.member_id

    # ----------------------------------------------------------------------------------- heartbeat

    @property
    def heartbeat(self) -> int:
        """How often this member has found that its database answers."""
        return self._heartbeat

    def register_new_member_id(self, query: Callable[[Callable[[Connection], None]], None]) -> None:
        """Register soon after the group gives us another id; otherwise this costs nothing.

        If it fails, it is tried again with the next heartbeat, and not in each turn of the loop.
        """
        if self._consumer.member_id != self._last_tried:
            self._last_tried = self._consumer.member_id
            query(self._register)

    def send_heartbeat(self, stored: Mapping[Partition, NextOffset]) -> None:
        """Register, and commit a heartbeat; check the other members if that is unsure.

        Args:
            stored: Our partitions. The heartbeat is committed with the first of them.

        Raises:
            CopiedDatabaseError: A member writes to another database since ours was replaced.
            TransientError: A server is unavailable. This heartbeat is left out.
        """
        with transaction(self._engine) as db:
            self._register(db)
        self._heartbeat += 1
        if stored:
            first = min(stored)
            self._consumer.commit({first: stored[first]}, self._installation, self._heartbeat)
        if self._is_unsure:
            commits = [
                commit
                for commit in self._last_commits()
                if commit.installation == self._installation
            ]
            others = {commit.member for commit in commits} - self._registered_here()
            self._refuse_living(commits, others, None)

    def _register(self, db: Connection) -> None:
        member = self._consumer.member_id
        if not member:
            return
        server = workers.here(db)
        workers.register(db, member, server)
        workers.forget(db)
        if server.running != self._server.running:
            self._is_unsure = True
            if server.location != self._server.location:
                _log_move(self._server, server)
            self._server = server

    # ------------------------------------------------------------------------------------ the check

    def _wait_until_all_are_registered(self, silent_s_max: float, *, has_joined: bool) -> None:
        self._heartbeats_seen = {}
        began = time.monotonic()
        was_logged = False
        while not self._stop.is_set():
            # Read Kafka first: a member with a heartbeat has registered before it, so the database,
            # read afterwards, must have it.
            commits = self._last_commits()
            if any(commit.installation != self._installation for commit in commits):
                return  # another installation: each partition is refused when it is claimed
            members = self._consumer.brokers.group.members()
            registered = self._registered_here()
            unregistered = self._unregistered(commits, members, registered)
            if not unregistered:
                return
            if members is None:
                self._is_unsure = True
            if not was_logged:
                was_logged = True
                log.warning(
                    "unknown_member_found",
                    group=self._settings.group_id,
                    members=sorted(unregistered),
                    hosts=sorted({members[name].host for name in unregistered})
                    if members
                    else None,
                    effect="waiting until they register in this database or leave the group",
                )
            self._refuse_living(commits, unregistered, members)
            if time.monotonic() - began > silent_s_max:
                if members is None or (
                    has_joined and self._was_first(commits, members, registered)
                ):
                    return
                if self._was_replaced and self._have_our_instance_id(unregistered, members):
                    return
                raise self._refusal(min(unregistered), members)
            self._stop.wait(RETRY_S)

    def _last_commits(self) -> list[GroupCommit]:
        brokers = self._consumer.brokers
        counts = brokers.partition_counts()
        partitions = [
            Partition(topic, number)
            for topic in self._settings.topics
            for number in range(counts.get(topic, 0))
        ]
        return list(brokers.group.last_commits(partitions).values())

    def _registered_here(self) -> frozenset[str]:
        with transaction(self._engine) as db:
            return workers.registered(db, workers.here(db)) | {self._consumer.member_id}

    def _unregistered(
        self,
        commits: Collection[GroupCommit],
        members: Mapping[str, Member] | None,
        registered: Collection[str],
    ) -> set[str]:
        """The members that are workers of ours and do not write to this database."""
        committed = {commit.member for commit in commits if commit.member}
        if members is None:
            return committed - set(registered)
        # A worker that has not committed yet has our client's name. Other programs may be members.
        return {
            name
            for name, member in members.items()
            if name not in registered
            and (name in committed or member.client == self._consumer.client_id)
        }

    def _refuse_living(
        self,
        commits: Collection[GroupCommit],
        unregistered: Collection[str],
        members: Mapping[str, Member] | None,
    ) -> None:
        """Raise if the heartbeat of one of these members rises."""
        for commit in commits:
            if commit.member in unregistered:
                seen = self._heartbeats_seen.setdefault(commit.member, set())
                seen.add(commit.heartbeat)
                if len(seen) > HEARTBEATS_MIN:
                    raise self._refusal(commit.member, members)

    def _have_our_instance_id(
        self, unregistered: Collection[str], members: Mapping[str, Member]
    ) -> bool:
        """Whether they are listed under our own instance id, which Kafka gives to one member only.

        None of them sends heartbeats: one that does was refused before.
        """
        ours = self._settings.group_instance_id
        return ours is not None and all(members[name].instance == ours for name in unregistered)

    def _was_first(
        self,
        commits: Collection[GroupCommit],
        members: Mapping[str, Member],
        registered: Collection[str],
    ) -> bool:
        """Of two that join at once: whose database the group wrote to last, else by their ids."""
        if commits:
            return all(commit.member in registered for commit in commits)
        return min(members) in registered

    def _refusal(self, member: str, members: Mapping[str, Member] | None) -> CopiedDatabaseError:
        with transaction(self._engine) as db:
            server = workers.here(db)
            known = workers.find(db, member)
        host = members[member].host if members and member in members else "unknown"
        return CopiedDatabaseError(
            group=self._settings.group_id,
            member=f"{member} (host {host})",
            here=str(server),
            installation=self._installation,
            other=f"{known.server}, since {known.since:%Y-%m-%d %H:%M:%S%z}, "
            f"as process {known.pid} of host {known.host}"
            if known
            else None,
        )

    def _log_move_since_last_worker(self) -> None:
        with transaction(self._engine) as db:
            last = workers.newest(db)
        if last is not None and last.server.location != self._server.location:
            _log_move(last.server, self._server)


def _log_move(was: Server, now: Server) -> None:
    log.warning(
        "database_moved",
        was=str(was),
        now=str(now),
        effect="no worker of the former database is in the group, so this one continues; if this "
        "database is a copy of one that is only stopped, give it a PIPELINE_GROUP_ID of its own",
    )
