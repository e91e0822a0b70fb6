"""The same protocol on a real PostgreSQL: two workers, real transactions, and read models of it.

Each worker is a real ``Machine``; what it wants done is done by the code of the product, in a
transaction of its own that is left open before COMMIT, for what becomes of it is another step.
Hypothesis draws the steps and prints those that fail.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, Engine, text

from pipeline.db import SessionLimits, open_engine, transaction, translated
from pipeline.errors import FencedError, InvariantError, TransientError
from pipeline.events import Record, read
from pipeline.ingest.state import Batch, Machine, Reclaim, Resolve, Write
from pipeline.log import offsets
from pipeline.log.append import append
from pipeline.log.copying import encode
from pipeline.log.offsets import Owner
from pipeline.log.segments import make_segment
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection import checkpoints
from pipeline.projection.one_pass import Result, project
from pipeline.projectors.orders import orders
from pipeline.rebuild.rebuild import check, rebuild
from tests.given import order_event, some_id
from tests.model.protocol import NOW, WITHOUT_WAITS, BlindRetry
from tests.servers.databases import Database
from tests.waiting import until

pytestmark = pytest.mark.timeout(600)

PLACE = Partition("Notifications", 0)
OFFSETS = (0, 1, 3, 4, 7, 8, 9, 12)
END = NextOffset(14)
# Three orders, told of in another order than that of their times.
TIMES = (5, 2, 9, 1, 7, 3, 8, 4)
EVENTS = {
    offset: order_event(
        "PROCESSING", at=at, order=f"order {nth % 3}", client_reference=f"at {offset}"
    )
    for nth, (offset, at) in enumerate(zip(OFFSETS, TIMES, strict=True))
}
FORGET_EVERYTHING = """
SET LOCAL session_replication_role = replica;
TRUNCATE pipeline.events, pipeline.consumer_offsets, pipeline.projection_checkpoints,
    pipeline.dead_letters, upvest.orders;
DROP SCHEMA IF EXISTS backup CASCADE;
"""
BACK_UP = """
DROP SCHEMA IF EXISTS backup CASCADE;
CREATE SCHEMA backup;
CREATE TABLE backup.consumer_offsets AS TABLE pipeline.consumer_offsets;
CREATE TABLE backup.projection_checkpoints AS TABLE pipeline.projection_checkpoints;
CREATE TABLE backup.orders AS TABLE upvest.orders;
"""
RESTORE = """
SET LOCAL session_replication_role = replica;
TRUNCATE pipeline.consumer_offsets, pipeline.projection_checkpoints, upvest.orders;
INSERT INTO pipeline.consumer_offsets TABLE backup.consumer_offsets;
INSERT INTO pipeline.projection_checkpoints TABLE backup.projection_checkpoints;
INSERT INTO upvest.orders TABLE backup.orders;
DELETE FROM pipeline.events e USING pipeline.consumer_offsets o WHERE e."offset" >= o.next_offset;
"""


@dataclass
class Worker:
    """One process: its machine, its open transaction, and what it asks for."""

    machine: Machine
    commit: Connection | None = None
    resolving: Batch | None = None
    wants_to_claim: bool = False


@dataclass
class Bench:
    """The database and what is switched on; without read models a history is much shorter."""

    database: Database
    machine: type[Machine] = Machine
    waits: bool = True
    read_models: bool = True
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        # A lock that is held is held by another step of this thread.
        limits = SessionLimits(lock_wait=timedelta(milliseconds=30))
        self.engine = open_engine(
            self.database.url, application="model", limits=limits, pool_size=12
        )
        self.patient = open_engine(self.database.url, application="model, waiting")

    def execute(self, statements: str) -> None:
        with self.database.connect(autocommit=False) as db:
            db.execute(statements)

    def close(self) -> None:
        self.engine.dispose()
        self.patient.dispose()


who = st.sampled_from([0, 1])


class ProtocolOnPostgres(RuleBasedStateMachine):
    """Two workers on one partition, and the read model that follows."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench
        self.workers = [Worker(self._machine()), Worker(self._machine())]
        # Transactions whose worker has given them up; the server may still end them either way.
        self.adrift: list[tuple[int, Connection]] = []
        self.backed_up = False
        bench.execute(FORGET_EVERYTHING)
        with transaction(bench.engine) as db:
            offsets.begin(db, PLACE, NextOffset(0))
            make_segment(db, PLACE.topic, NextOffset(0), 1000)
            checkpoints.register(db, [orders.name])
            checkpoints.progress(db, [orders.name])

    def _machine(self) -> Machine:
        return self.bench.machine(WITHOUT_WAITS)

    # ------------------------------------------------------------------------------ the workers

    @rule(who=who)
    def assign(self, who):
        self._claim(self.workers[who])

    @rule(who=who, records=st.integers(1, 3))
    def fetch(self, who, records):
        machine = self.workers[who].machine
        first = machine.first_wanted(PLACE)
        if first is None:
            return
        found = [offset for offset in OFFSETS if offset >= first][:records]
        rows = [
            read(Record(*PLACE, at, json.dumps(EVENTS[at]).encode(), None, None, None, 0))
            for at in found
        ]
        machine.received(PLACE, [encode(row) for row in rows])
        if not found:
            machine.reached_end(PLACE, END)

    @rule(who=who, records=st.integers(1, 3))
    def work(self, who, records):
        """What a turn of the loop does."""
        if PLACE not in self.workers[who].machine.owned:
            self.assign(who)
        self.fetch(who, records)
        self.step(who)

    @rule(who=who)
    def step(self, who):
        worker = self.workers[who]
        if worker.wants_to_claim:
            self._claim(worker)
            return
        match worker.machine.next_step(NOW):
            case Write(batch):
                self._write(worker, batch)
            case Resolve(batch):
                worker.resolving = batch
            case Reclaim():
                self._claim(worker)
            case _:
                pass

    @precondition(lambda self: any(worker.commit for worker in self.workers))
    @rule(who=who)
    def commit_and_hear(self, who):
        if (commit := self._take_commit(who)) is not None:
            _end(commit, commits=True)
            self.workers[who].machine.committed()

    @precondition(lambda self: any(worker.commit for worker in self.workers))
    @rule(who=who, commits=st.booleans())
    def commit_or_not_and_hear_nothing(self, who, commits):
        if (commit := self._take_commit(who)) is not None:
            _end(commit, commits=commits)
            self.workers[who].machine.failed(NOW)

    @precondition(lambda self: any(worker.commit for worker in self.workers))
    @rule(who=who)
    def give_the_commit_up(self, who):
        if (commit := self._take_commit(who)) is not None:
            self.adrift.append((who, commit))
            self.workers[who].machine.failed(NOW)

    @precondition(lambda self: self.adrift)
    @rule(commits=st.booleans())
    def late_commit_ends(self, commits):
        _end(self.adrift.pop()[1], commits=commits)

    @precondition(lambda self: any(worker.resolving for worker in self.workers))
    @rule(who=who, commits=st.booleans())
    def find_out(self, who, commits):
        worker = self.workers[who]
        if worker.resolving is None:
            return
        batch, worker.resolving = worker.resolving, None
        own = [it for it in self.adrift if it[0] == who]
        if not self.bench.waits:
            look = partial(offsets.ownerships, partitions=batch.advances)
        elif own:
            self._find_while_in_flight(worker, batch, own[0], commits=commits)
            return
        else:
            look = partial(offsets.lock_ownerships, partitions=batch.advances)
        try:
            with transaction(self.bench.engine) as db:
                places = look(db)
        except TransientError:
            worker.machine.failed(NOW)
        else:
            worker.machine.resolved(places, NOW)

    def _find_while_in_flight(self, worker, batch, own, *, commits):
        """The question waits for the commit that is still on its way, whichever way that ends."""

        def find():
            with transaction(self.bench.patient) as db:
                return offsets.lock_ownerships(db, batch.advances)

        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(find)
            until(self._somebody_waits, "the question waits", seconds_max=60)
            assert not answer.done()
            self.adrift.remove(own)
            _end(own[1], commits=commits)
            worker.machine.resolved(answer.result(), NOW)

    def _somebody_waits(self) -> bool:
        with transaction(self.bench.engine) as db:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            return bool(db.execute(text(waiting)).scalar_one())

    @rule(who=who)
    def look_around(self, who):
        worker = self.workers[who]
        if not worker.machine.awaits_outcome:
            with transaction(self.bench.engine) as db:
                places = offsets.ownerships(db, worker.machine.owned)
            worker.machine.checked(places, NOW)

    @rule(who=who)
    def let_go(self, who):
        self.workers[who].machine.released([PLACE])
        self.workers[who].wants_to_claim = False

    @rule(who=who)
    def die(self, who):
        if (commit := self._take_commit(who)) is not None:
            _end(commit, commits=False)
        # What it has sent it never asks for again.
        self.adrift = [(-1 if sender == who else sender, it) for sender, it in self.adrift]
        self.workers[who] = Worker(self._machine())

    def _claim(self, worker: Worker) -> None:
        worker.wants_to_claim = True
        try:
            with transaction(self.bench.engine) as db:
                claim = offsets.claim(db, PLACE, Owner("model", "worker"))
        except TransientError:
            return
        worker.wants_to_claim = False
        worker.machine.claimed(PLACE, claim.epoch, claim.next_offset, END)

    def _write(self, worker: Worker, batch: Batch) -> None:
        connection = self.bench.engine.connect()
        try:
            with translated():
                append(connection, batch.rows, batch.advances)
        except FencedError:
            _end(connection, commits=False)
            worker.machine.fenced(NOW)
        except TransientError:
            _end(connection, commits=False)
            worker.machine.failed(NOW)
        except BaseException:
            _end(connection, commits=False)
            raise
        else:
            worker.commit = connection

    def _take_commit(self, who: int) -> Connection | None:
        worker = self.workers[who]
        commit, worker.commit = worker.commit, None
        return commit

    # ------------------------------------------------------------------------------ the database

    @precondition(lambda self: not self.backed_up and not self._busy())
    @rule()
    def back_up(self):
        self.bench.execute(BACK_UP)
        self.backed_up = True

    @precondition(lambda self: self.backed_up)
    @rule()
    def put_back(self):
        """Every session ends, then all is as it was."""
        for number, worker in enumerate(self.workers):
            if (commit := self._take_commit(number)) is not None:
                _end(commit, commits=False)
                worker.machine.failed(NOW)
        while self.adrift:
            _end(self.adrift.pop()[1], commits=False)
        self.bench.execute(RESTORE)
        self.backed_up = False

    def _busy(self) -> bool:
        return bool(self.adrift) or any(worker.commit for worker in self.workers)

    # ---------------------------------------------------------------------------- the read model

    @precondition(lambda self: self.bench.read_models)
    @rule(offsets=st.integers(1, 9))
    def project_some(self, offsets):
        with transaction(self.bench.engine) as db:
            [standing] = checkpoints.progress(db, [orders.name])
        if standing.lag:
            chunk: OffsetRange = standing.next_range(offsets)
            results = project(self.bench.engine, [orders], PLACE, chunk, rejected_max=10)
            assert results == {orders.name: Result.DONE}

    @precondition(lambda self: self.bench.read_models)
    @rule()
    def truncate(self):
        self.bench.execute("TRUNCATE upvest.orders")

    @precondition(lambda self: self.bench.read_models)
    @rule()
    def rebuild(self):
        assert rebuild(self.bench.patient, orders).differing == 0

    # -------------------------------------------------------------------------- what must hold

    @invariant()
    def log_is_a_prefix_of_the_ledger(self):
        with transaction(self.bench.engine) as db:
            there = db.execute(
                text('SELECT "offset" FROM pipeline.events ORDER BY "offset"')
            ).scalars()
            logged = list(there)
            place = offsets.ownerships(db, [PLACE])[PLACE]
            checkpoint = checkpoints.next_offsets(db, orders.name).get(PLACE, 0)
        due = [offset for offset in OFFSETS if offset < place.next_offset]
        assert logged == due, f"the log below {place.next_offset}"
        assert checkpoint <= place.next_offset

    def teardown(self):
        """Nothing stays open, and read models are brought to their end and compared."""
        for connection in [*(it for _, it in self.adrift), *(it.commit for it in self.workers)]:
            if connection is not None:
                _end(connection, commits=False)
        for worker in self.workers:
            worker.commit = None
        self.adrift.clear()
        if self.bench.read_models:
            self._finish()

    def _finish(self) -> None:
        self._read_to_the_end()
        self.log_is_a_prefix_of_the_ledger()
        while self._is_behind():
            self.project_some(100)
        assert statuses(self.bench.engine) == folded()
        difference = check(self.bench.patient, orders)
        assert (difference.rows, difference.differing) == (len(folded()), 0)

    def _read_to_the_end(self) -> None:
        """A new process takes the partition and reads to its end."""
        self.workers[0] = Worker(self._machine())
        self.assign(0)
        for _ in range(20):
            self.fetch(0, 3)
            self.step(0)
            self.commit_and_hear(0)
        assert self.workers[0].machine.stored == {PLACE: END}

    def _is_behind(self) -> bool:
        with transaction(self.bench.engine) as db:
            return any(it.lag for it in checkpoints.progress(db, [orders.name]))


def _end(connection: Connection, *, commits: bool) -> None:
    if commits:
        connection.commit()
    else:
        connection.rollback()
    connection.close()


def folded() -> dict[str, str]:
    """The reference of each order's newest event, by plain Python."""
    newest: dict[str, tuple[float, str]] = {}
    for nth, (offset, at) in enumerate(zip(OFFSETS, TIMES, strict=True)):
        order = some_id(f"order {nth % 3}")
        newest[order] = max(newest.get(order, (-1, "")), (at, f"at {offset}"))
    return {order: reference for order, (_, reference) in newest.items()}


def statuses(engine: Engine) -> dict[str, str]:
    """The reference of each order as the read model has it."""
    query = "SELECT CAST(order_id AS text) AS order_id, client_reference FROM upvest.orders"
    with transaction(engine) as db:
        return {row.order_id: row.client_reference for row in db.execute(text(query))}


HARM = "the log below|UniqueViolation"
ANY = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
UNTIL_FOUND = settings(ANY, max_examples=2000, phases=[Phase.generate], derandomize=True)


def run(bench: Bench, how: settings) -> None:
    """Histories against this database, until one fails or there have been enough."""

    class Here(ProtocolOnPostgres):
        def __init__(self) -> None:
            super().__init__(bench)

    run_state_machine_as_test(Here, settings=how)


def test_real_transactions_write_every_record_once_whatever_happens(database):
    bench = Bench(database)
    try:
        run(bench, ANY)
    finally:
        bench.close()


def _stale_batch(it: ProtocolOnPostgres) -> None:
    it.assign(1)
    it.fetch(1, 2)
    it.work(0, 2)
    it.commit_and_hear(0)
    it.step(1)


def _restore(it: ProtocolOnPostgres) -> None:
    it.assign(0)
    it.back_up()
    it.work(0, 2)
    it.commit_and_hear(0)
    it.put_back()
    it.work(0, 2)
    it.commit_and_hear(0)
    it.log_is_a_prefix_of_the_ledger()


@pytest.mark.parametrize("history", [_stale_batch, _restore])
@pytest.mark.parametrize("guarded", [True, False])
def test_the_shortest_violations_are_prevented_by_the_guards(
    database, monkeypatch, history, guarded
):
    if not guarded:
        blind = str(offsets.ADVANCE).replace(
            "o.epoch = b.held AND o.next_offset = b.expected", "true"
        )
        monkeypatch.setattr(offsets, "ADVANCE", text(blind))
    bench = Bench(database, read_models=False)
    it = ProtocolOnPostgres(bench)

    try:
        if guarded:
            history(it)
            it.log_is_a_prefix_of_the_ledger()
        else:
            with pytest.raises((AssertionError, InvariantError), match=HARM):
                history(it)
    finally:
        it.teardown()
        bench.close()


def test_real_transactions_without_a_guard_violate_the_invariants(database, monkeypatch):
    """The offsets are not compared, and whoever hears nothing writes again."""
    guard = "AND o.next_offset = b.expected"
    assert guard in str(offsets.ADVANCE)
    monkeypatch.setattr(offsets, "ADVANCE", text(str(offsets.ADVANCE).replace(guard, "")))
    bench = Bench(database, machine=BlindRetry, read_models=False)

    try:
        with pytest.raises((AssertionError, InvariantError)) as found:
            run(bench, UNTIL_FOUND)
    finally:
        bench.close()

    # What ends the history, or what had failed in it before its end failed too.
    errors: list[BaseException] = [found.value]
    while (earlier := errors[-1].__context__) is not None:
        errors.append(earlier)
    assert re.search(HARM, " ".join(map(str, errors)))
