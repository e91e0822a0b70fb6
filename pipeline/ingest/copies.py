"""Whether a copy of this database is fed by the same consumer group at this moment.

A copy has the identity of the original, so the identity cannot tell the two apart. What tells them
apart is who is alive: each living member of the group must write to this very database, and it
registers there (``log.workers``). A member that does not register here, and lives, feeds another
database. A database that was restored, failed over or upgraded has no such member, since the old
one is gone or writes here now.

A worker looks before it joins, so a copy takes nothing from the original, not even for a moment;
and once more with its first partitions, for what has joined at the same time. It looks before it
claims or commits anything. Who was there first never gives way. No clocks are compared: a member
lives if the brokers list it, and its beat, which it commits after each registration, moves.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping

import structlog
from sqlalchemy import Connection, Engine

from pipeline.db import transaction
from pipeline.errors import CopiedDatabaseError
from pipeline.kafka import GroupCommit, GroupConsumer, Member
from pipeline.kafka.client import consumer_config
from pipeline.log import workers
from pipeline.log.installation import installation_id
from pipeline.log.workers import Server
from pipeline.partitions import NextOffset, Partition
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

BEAT_S = 5.0
"""How often a worker registers and beats: with each look around of the loop."""
LOOK_AGAIN_S = 0.5
"""How often somebody who does not register here is looked at."""
BEATS_MIN = 2
"""How many beats prove that a member writes to another database. One may have been on its way when
this database took over from the one that it was written to."""
REGISTER_S_MAX = 2 * BEAT_S
"""How long a worker of this database needs at most to register after it has joined."""
SESSION_MS_DEFAULT = 45_000


class CopyCheck:
    """Looks for members of the group that feed a copy, for one membership in it.

    Args:
        engine: The database.
        source: Kafka, as this membership reads it.
        settings: Group and topics.
        stop: When it is set, nothing is waited for any more.
        was_replaced: This process was in the group, and Kafka gave its ``group.instance.id`` to
            another member. That may be an earlier request of our own client, which never registers.
    """

    def __init__(
        self,
        engine: Engine,
        source: GroupConsumer,
        settings: Settings,
        stop: threading.Event,
        *,
        was_replaced: bool = False,
    ) -> None:
        self._engine = engine
        self._source = source
        self._settings = settings
        self._stop = stop
        self._was_replaced = was_replaced
        self._tried_to_register = ""
        self._checked: str | None = None
        self._beat = 0
        # A member that was looked for where nobody could be listed, or whose database was replaced
        # under it, goes on looking.
        self._is_unsure = False
        self._beats: dict[str, set[int]] = {}
        with transaction(engine) as db:
            self._installation = installation_id(db)
            self._here = workers.here(db)

    @property
    def beat(self) -> int:
        """How often this member has found that its database answers."""
        return self._beat

    def before_joining(self) -> None:
        """Find nobody in the group who feeds a copy, or wait until nobody does.

        A member that is listed and does nothing may be dead: it is waited for until the brokers
        would have taken it from the group.

        Raises:
            CopiedDatabaseError: Somebody does. The group has not seen this process.
            TransientError: A server is unavailable.
        """
        session_s = self._session_ms() / 1000
        self._watch(session_s + REGISTER_S_MAX, has_joined=False)
        if not self._stop.is_set():
            self._record_move()

    def when_assigned(self) -> None:
        """The same with the first partitions, and again when Kafka has taken us for gone.

        Raises:
            CopiedDatabaseError: Somebody feeds a copy, and was there first.
            TransientError: A server is unavailable.
        """
        if self._source.member_id != self._checked:
            with transaction(self._engine) as db:
                self._register(db)
            self._watch(REGISTER_S_MAX, has_joined=True)
            self._checked = self._source.member_id

    def register_new_id(self, query: Callable[[Callable[[Connection], None]], None]) -> None:
        """Register soon after the group knows us by another id; else it costs nothing.

        What fails is tried again with the next beat, and not with each turn of the loop.
        """
        if self._source.member_id != self._tried_to_register:
            self._tried_to_register = self._source.member_id
            query(self._register)

    def _register(self, db: Connection) -> None:
        member = self._source.member_id
        if not member:
            return
        now_here = workers.here(db)
        workers.register(db, member, now_here)
        workers.forget(db)
        if now_here.running != self._here.running:
            self._is_unsure = True
            if now_here.place != self._here.place:
                _tell_move(self._here, now_here)
            self._here = now_here

    def keep_up(self, stored: Mapping[Partition, NextOffset]) -> None:
        """Register and beat; if it is unsure who else is there, look.

        Args:
            stored: Our partitions. The beat is committed with the first of them.

        Raises:
            CopiedDatabaseError: Another database is fed by this group since ours was replaced.
            TransientError: A server is unavailable. This beat is left out.
        """
        with transaction(self._engine) as db:
            self._register(db)
        self._beat += 1
        if stored:
            first = min(stored)
            self._source.commit({first: stored[first]}, self._installation, self._beat)
        if self._is_unsure:
            fed = self._committed()
            self._note_beats(fed, {one.member for one in fed} - self._own(), None)

    def _watch(self, silent_s_max: float, *, has_joined: bool) -> None:
        self._beats = {}
        began = time.monotonic()
        told = False
        while not self._stop.is_set():
            # Kafka first: who beats has registered before, so it must be found here afterwards.
            everything = self._fed()
            if any(one.installation != self._installation for one in everything):
                return  # another installation: refused for each partition, when it is claimed
            members = self._source.brokers.group.members()
            own = self._own()
            strangers = self._strangers(everything, members, own)
            if not strangers:
                return
            if members is None:
                self._is_unsure = True
            if not told:
                told = True
                log.warning(
                    "group_has_unknown_member",
                    group=self._settings.group_id,
                    members=sorted(strangers),
                    hosts=sorted({members[one].host for one in strangers}) if members else None,
                    effect="waiting until they register in this database or leave the group",
                )
            self._note_beats(everything, strangers, members)
            if time.monotonic() - began > silent_s_max:
                if members is None or (has_joined and self._was_first(everything, members, own)):
                    return
                if self._was_replaced and self._hold_our_place(strangers, members):
                    return
                raise self._refusal(min(strangers), members)
            self._stop.wait(LOOK_AGAIN_S)

    def _strangers(
        self,
        fed: Collection[GroupCommit],
        members: Mapping[str, Member] | None,
        own: Collection[str],
    ) -> set[str]:
        """The members that live, work as we do, and do not write to this database."""
        committed = {one.member for one in fed if one.member}
        if members is None:
            return committed - set(own)
        # One that has not committed yet is known by its client's name; other programs may look.
        client = str(consumer_config(self._settings)["client.id"])
        return {
            name
            for name, member in members.items()
            if name not in own and (name in committed or member.client == client)
        }

    def _note_beats(
        self,
        fed: Collection[GroupCommit],
        strangers: Collection[str],
        members: Mapping[str, Member] | None,
    ) -> None:
        for one in fed:
            if one.member in strangers:
                seen = self._beats.setdefault(one.member, set())
                seen.add(one.heartbeat)
                if len(seen) > BEATS_MIN:
                    raise self._refusal(one.member, members)

    def _hold_our_place(self, strangers: Collection[str], members: Mapping[str, Member]) -> bool:
        """Whether they are listed under our own instance id, which Kafka gives to one member only.

        None of them beats: whoever does was refused before.
        """
        ours = self._settings.group_instance_id
        return ours is not None and all(members[one].instance == ours for one in strangers)

    def _was_first(
        self, fed: Collection[GroupCommit], members: Mapping[str, Member], own: Collection[str]
    ) -> bool:
        """Of two that join at once: whose database the group fed last, else by their ids."""
        if fed:
            return all(one.member in own for one in fed)
        return min(members) in own

    def _own(self) -> frozenset[str]:
        with transaction(self._engine) as db:
            return workers.registered(db, workers.here(db)) | {self._source.member_id}

    def _committed(self) -> list[GroupCommit]:
        return [one for one in self._fed() if one.installation == self._installation]

    def _fed(self) -> list[GroupCommit]:
        brokers = self._source.brokers
        counts = brokers.partition_counts()
        partitions = [
            Partition(topic, number)
            for topic in self._settings.topics
            for number in range(counts.get(topic, 0))
        ]
        return list(brokers.group.last_commits(partitions).values())

    def _refusal(self, member: str, members: Mapping[str, Member] | None) -> CopiedDatabaseError:
        with transaction(self._engine) as db:
            at = workers.here(db)
            known = workers.find(db, member)
        host = members[member].host if members and member in members else "unknown"
        return CopiedDatabaseError(
            group=self._settings.group_id,
            member=f"{member} (host {host})",
            here=str(at),
            installation=self._installation,
            other=f"{known.server}, since {known.since:%Y-%m-%d %H:%M:%S%z}, "
            f"as process {known.pid} of host {known.host}"
            if known
            else None,
        )

    def _record_move(self) -> None:
        with transaction(self._engine) as db:
            last = workers.newest(db)
        if last is not None and last.server.place != self._here.place:
            _tell_move(last.server, self._here)

    def _session_ms(self) -> int:
        chosen = consumer_config(self._settings).get("session.timeout.ms")
        return int(chosen) if chosen is not None else SESSION_MS_DEFAULT


def _tell_move(was: Server, now: Server) -> None:
    log.warning(
        "database_moved",
        was=str(was),
        now=str(now),
        effect="no worker of the former database is in the group, so this one continues; if it is "
        "a copy of a database that is only stopped, give it a PIPELINE_GROUP_ID of its own",
    )
