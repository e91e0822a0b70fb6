"""The same protocol on a real PostgreSQL: two workers, real transactions, and read models.

Each worker is a real ``IngestMachine``; the code of the product executes its steps, in a
transaction of its own that is left open before COMMIT, because its outcome is another step.
Hypothesis generates the steps and prints those that fail.
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
from pipeline.ingest.state import Batch, IngestMachine, Reclaim, Resolve, Write
from pipeline.log import claims, offsets
from pipeline.log.append import append
from pipeline.log.claims import Owner
from pipeline.log.copying import encode
from pipeline.log.segments import make_segment
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection import checkpoints, registry
from pipeline.projection.one_pass import Result, project
from pipeline.projectors.orders import orders
from pipeline.rebuild.rebuild import check, rebuild
from tests.given import order_event, some_id
from tests.model.protocol import NOW, WITHOUT_WAITS, BlindRetry
from tests.servers.databases import Database
from tests.waiting import until

pytestmark = [pytest.mark.timeout(600), pytest.mark.faults]

PARTITION = Partition("Notifications", 0)
OFFSETS = (0, 1, 3, 4, 7, 8, 9, 12)
END = NextOffset(14)
# Three orders, with events in another order than that of their times.
TIMES = (5, 2, 9, 1, 7, 3, 8, 4)
EVENTS = {
    offset: order_event(
        "PROCESSING", at=at, order=f"order {nth % 3}", client_reference=f"at {offset}"
    )
    for nth, (offset, at) in enumerate(zip(OFFSETS, TIMES, strict=True))
}
RESET = """
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
    """One process: its machine, its open transaction, and what it waits for."""

    machine: IngestMachine
    commit: Connection | None = None
    resolving: Batch | None = None
    wants_to_claim: bool = False


@dataclass
class Bench:
    """The database and the active guards; without read models a history is much shorter."""

    database: Database
    machine: type[IngestMachine] = IngestMachine
    waits: bool = True
    read_models: bool = True
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        # A lock is always held by another step of this thread.
        limits = SessionLimits(lock_wait=timedelta(milliseconds=30))
        self.engine = open_engine(
            self.database.url, application="model", limits=limits, pool_size=12
        )
        self.waiting_engine = open_engine(self.database.url, application="model, waiting")

    def execute(self, statements: str) -> None:
        with self.database.connect(autocommit=False) as db:
            db.execute(statements)

    def close(self) -> None:
        self.engine.dispose()
        self.waiting_engine.dispose()


who = st.sampled_from([0, 1])


class ProtocolOnPostgres(RuleBasedStateMachine):
    """Two workers on one partition, and the read model that follows."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench
        self.workers = [Worker(self._machine()), Worker(self._machine())]
        # Transactions for which no worker waits any more; the server may still end them either way.
        self.abandoned: list[tuple[int, Connection]] = []
        self.backed_up = False
        bench.execute(RESET)
        with transaction(bench.engine) as db:
            offsets.begin(db, PARTITION, NextOffset(0))
            make_segment(db, PARTITION.topic, NextOffset(0), 1000)
            registry.register(db, [orders.name])
            checkpoints.progress(db, [orders.name])

    def _machine(self) -> IngestMachine:
        return self.bench.machine(WITHOUT_WAITS)

    # ------------------------------------------------------------------------------ the workers

    @rule(who=who)
    def assign(self, who):
        self._claim(self.workers[who])

    @rule(who=who, records=st.integers(1, 3))
    def fetch(self, who, records):
        machine = self.workers[who].machine
        first = machine.first_wanted(PARTITION)
        if first is None:
            return
        found = [offset for offset in OFFSETS if offset >= first][:records]
        rows = [
            read(Record(*PARTITION, at, json.dumps(EVENTS[at]).encode(), None, None, None, 0))
            for at in found
        ]
        machine.received(PARTITION, [encode(row) for row in rows])
        if not found:
            machine.reached_end(PARTITION, END)

    @rule(who=who, records=st.integers(1, 3))
    def work(self, who, records):
        """A turn of the loop."""
        if PARTITION not in self.workers[who].machine.owned:
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
    def commit_and_answer(self, who):
        if (commit := self._take_commit(who)) is not None:
            _end(commit, commits=True)
            self.workers[who].machine.committed()

    @precondition(lambda self: any(worker.commit for worker in self.workers))
    @rule(who=who, commits=st.booleans())
    def commit_or_not_without_an_answer(self, who, commits):
        if (commit := self._take_commit(who)) is not None:
            _end(commit, commits=commits)
            self.workers[who].machine.failed(NOW)

    @precondition(lambda self: any(worker.commit for worker in self.workers))
    @rule(who=who)
    def abandon_the_commit(self, who):
        if (commit := self._take_commit(who)) is not None:
            self.abandoned.append((who, commit))
            self.workers[who].machine.failed(NOW)

    @precondition(lambda self: self.abandoned)
    @rule(commits=st.booleans())
    def late_commit_ends(self, commits):
        _end(self.abandoned.pop()[1], commits=commits)

    @precondition(lambda self: any(worker.resolving for worker in self.workers))
    @rule(who=who, commits=st.booleans())
    def resolve(self, who, commits):
        worker = self.workers[who]
        if worker.resolving is None:
            return
        batch, worker.resolving = worker.resolving, None
        own = [commit for commit in self.abandoned if commit[0] == who]
        if not self.bench.waits:
            read = partial(claims.ownerships, partitions=batch.advances)
        elif own:
            self._resolve_while_open(worker, batch, own[0], commits=commits)
            return
        else:
            read = partial(claims.lock_ownerships, partitions=batch.advances)
        try:
            with transaction(self.bench.engine) as db:
                stored = read(db)
        except TransientError:
            worker.machine.failed(NOW)
        else:
            worker.machine.resolved(stored, NOW)

    def _resolve_while_open(self, worker, batch, own, *, commits):
        """Resolving waits for the commit that is still open, however it ends."""

        def read():
            with transaction(self.bench.waiting_engine) as db:
                return claims.lock_ownerships(db, batch.advances)

        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(read)
            until(self._a_session_waits, "resolving waits", seconds_max=60)
            assert not answer.done()
            self.abandoned.remove(own)
            _end(own[1], commits=commits)
            worker.machine.resolved(answer.result(), NOW)

    def _a_session_waits(self) -> bool:
        with transaction(self.bench.engine) as db:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            return bool(db.execute(text(waiting)).scalar_one())

    @rule(who=who)
    def check(self, who):
        worker = self.workers[who]
        if not worker.machine.awaits_outcome:
            with transaction(self.bench.engine) as db:
                stored = claims.ownerships(db, worker.machine.owned)
            worker.machine.checked(stored, NOW)

    @rule(who=who)
    def release(self, who):
        self.workers[who].machine.released([PARTITION])
        self.workers[who].wants_to_claim = False

    @rule(who=who)
    def die(self, who):
        if (commit := self._take_commit(who)) is not None:
            _end(commit, commits=False)
        # No worker ever resolves what it has sent.
        self.abandoned = [
            (-1 if sender == who else sender, connection) for sender, connection in self.abandoned
        ]
        self.workers[who] = Worker(self._machine())

    def _claim(self, worker: Worker) -> None:
        worker.wants_to_claim = True
        try:
            with transaction(self.bench.engine) as db:
                claim = claims.claim(db, PARTITION, Owner("model", "worker"))
        except TransientError:
            return
        worker.wants_to_claim = False
        worker.machine.claimed(PARTITION, claim.epoch, claim.next_offset, END)

    def _write(self, worker: Worker, batch: Batch) -> None:
        connection = self.bench.engine.connect()
        try:
            with translated():
                append(connection, batch.rows, batch.advances)
        except FencedError:
            _end(connection, commits=False)
            worker.machine.append_refused(NOW)
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
    def restore(self):
        """Every session ends, then the database is restored."""
        for number, worker in enumerate(self.workers):
            if (commit := self._take_commit(number)) is not None:
                _end(commit, commits=False)
                worker.machine.failed(NOW)
        while self.abandoned:
            _end(self.abandoned.pop()[1], commits=False)
        self.bench.execute(RESTORE)
        self.backed_up = False

    def _busy(self) -> bool:
        return bool(self.abandoned) or any(worker.commit for worker in self.workers)

    # ---------------------------------------------------------------------------- the read model

    @precondition(lambda self: self.bench.read_models)
    @rule(offsets=st.integers(1, 9))
    def project_some(self, offsets):
        with transaction(self.bench.engine) as db:
            [standing] = checkpoints.progress(db, [orders.name])
        if standing.lag:
            chunk: OffsetRange = standing.next_range(offsets)
            results = project(self.bench.engine, [orders], PARTITION, chunk, rejected_max=10)
            assert results == {orders.name: Result.DONE}

    @precondition(lambda self: self.bench.read_models)
    @rule()
    def truncate(self):
        self.bench.execute("TRUNCATE upvest.orders")

    @precondition(lambda self: self.bench.read_models)
    @rule()
    def rebuild(self):
        assert rebuild(self.bench.waiting_engine, orders).differing == 0

    # -------------------------------------------------------------------------- invariants

    @invariant()
    def log_is_a_prefix_of_the_records(self):
        with transaction(self.bench.engine) as db:
            rows = db.execute(
                text('SELECT "offset" FROM pipeline.events ORDER BY "offset"')
            ).scalars()
            logged = list(rows)
            row = claims.ownerships(db, [PARTITION])[PARTITION]
            checkpoint = checkpoints.next_offsets(db, orders.name).get(PARTITION, 0)
        due = [offset for offset in OFFSETS if offset < row.next_offset]
        assert logged == due, f"the log below {row.next_offset}"
        assert checkpoint <= row.next_offset

    def teardown(self):
        """Close every transaction; bring the read models to the end and compare them."""
        for connection in [
            *(connection for _, connection in self.abandoned),
            *(worker.commit for worker in self.workers),
        ]:
            if connection is not None:
                _end(connection, commits=False)
        for worker in self.workers:
            worker.commit = None
        self.abandoned.clear()
        if self.bench.read_models:
            self._finish()

    def _finish(self) -> None:
        self._read_to_the_end()
        self.log_is_a_prefix_of_the_records()
        while self._has_lag():
            self.project_some(100)
        assert statuses(self.bench.engine) == folded()
        difference = check(self.bench.waiting_engine, orders)
        assert (difference.rows, difference.differing) == (len(folded()), 0)

    def _read_to_the_end(self) -> None:
        """A new process takes the partition and reads to its end."""
        self.workers[0] = Worker(self._machine())
        self.assign(0)
        for _ in range(20):
            self.fetch(0, 3)
            self.step(0)
            self.commit_and_answer(0)
        assert self.workers[0].machine.stored == {PARTITION: END}

    def _has_lag(self) -> bool:
        with transaction(self.bench.engine) as db:
            return any(progress.lag for progress in checkpoints.progress(db, [orders.name]))


def _end(connection: Connection, *, commits: bool) -> None:
    if commits:
        connection.commit()
    else:
        connection.rollback()
    connection.close()


def folded() -> dict[str, str]:
    """The reference of each order's newest event, computed in Python."""
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


VIOLATION = "the log below|UniqueViolation"
ANY = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
UNTIL_FOUND = settings(ANY, max_examples=2000, phases=[Phase.generate], derandomize=True)


def run(bench: Bench, how: settings) -> None:
    """Run histories against this database, until one fails or the maximum is reached."""

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


def _stale_batch(protocol: ProtocolOnPostgres) -> None:
    protocol.assign(1)
    protocol.fetch(1, 2)
    protocol.work(0, 2)
    protocol.commit_and_answer(0)
    protocol.step(1)


def _restored_database(protocol: ProtocolOnPostgres) -> None:
    protocol.assign(0)
    protocol.back_up()
    protocol.work(0, 2)
    protocol.commit_and_answer(0)
    protocol.restore()
    protocol.work(0, 2)
    protocol.commit_and_answer(0)
    protocol.log_is_a_prefix_of_the_records()


@pytest.mark.parametrize("history", [_stale_batch, _restored_database])
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
    protocol = ProtocolOnPostgres(bench)

    try:
        if guarded:
            history(protocol)
            protocol.log_is_a_prefix_of_the_records()
        else:
            with pytest.raises((AssertionError, InvariantError), match=VIOLATION):
                history(protocol)
    finally:
        protocol.teardown()
        bench.close()


def test_real_transactions_without_a_guard_violate_the_invariants(database, monkeypatch):
    """The offsets are not compared, and a worker without an answer writes again."""
    guard = "AND o.next_offset = b.expected"
    assert guard in str(offsets.ADVANCE)
    monkeypatch.setattr(offsets, "ADVANCE", text(str(offsets.ADVANCE).replace(guard, "")))
    bench = Bench(database, machine=BlindRetry, read_models=False)

    try:
        with pytest.raises((AssertionError, InvariantError)) as found:
            run(bench, UNTIL_FOUND)
    finally:
        bench.close()

    # The error that ends the history, or one before it if the end failed too.
    errors: list[BaseException] = [found.value]
    while (earlier := errors[-1].__context__) is not None:
        errors.append(earlier)
    assert re.search(VIOLATION, " ".join(map(str, errors)))
