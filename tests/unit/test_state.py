"""The decisions of the ingest loop, for every order of events that hypothesis generates.

Two workers run the production state machine against one log in memory. Commits travel: they may
arrive late, never, or arrive and lose their answer; partitions are claimed by both, revoked and
lost at any moment, workers crash, and the log is restored from a backup. After every step the log
must have the records below the next offset: all, in order, once.

The same histories, run against a log without its guards, must find violations: otherwise they would
prove nothing.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.backoff import Backoff
from pipeline.errors import FencedError, InvariantError
from pipeline.ingest.state import Batch, Bounds, Contested, IngestMachine, Reclaim, Resolve, Write
from pipeline.partitions import Epoch, NextOffset, Ownership, Partition
from tests.contract.logs import EVERY_GUARD, FakeLog, Guards, advance, owned_at, row_at

PARTITIONS = [Partition("orders", 0), Partition("orders", 1)]
NEVER_CONTESTED = Bounds(
    batch_rows_max=3, takeovers_max=10**9, reclaim_s_min=0.5, backoff=Backoff(0.1, 0.4)
)
END = 14


@dataclass
class Commit:
    """A transaction: not yet at the log, or executed and with an answer that travels back."""

    batch: Batch
    answer: str | None = None


@dataclass
class Worker:
    """One process: its machine, its position in each partition, and what it waits for."""

    machine: IngestMachine = field(default_factory=lambda: IngestMachine(NEVER_CONTESTED))
    reading: dict[Partition, int] = field(default_factory=dict)
    assigned: set[Partition] = field(default_factory=set)
    commit: Commit | None = None
    resolving: Batch | None = None


class Fate(Enum):
    """What happens to a step that was sent to the database."""

    ANSWERED = auto()
    ARRIVES = auto()  # and its answer still travels
    STAYS = auto()
    BREAKS_LATE = auto()  # the connection breaks; the commit arrives, or not, some time later
    BREAKS_NEVER = auto()


class Kind(Enum):
    """The actions of the workers and of the log."""

    WORK = auto()
    WAIT = auto()
    ASSIGN = auto()
    REVOKE = auto()
    LOSE = auto()
    FETCH_AGAIN = auto()
    LATE_COMMIT_ARRIVES = auto()
    LATE_COMMIT_IS_LOST = auto()
    CRASH = auto()
    BACK_UP = auto()
    RESTORE = auto()


class Action(NamedTuple):
    """One action; each kind uses the other fields that it needs."""

    kind: Kind
    who: int
    partition: Partition
    records: int
    then: Fate


class History:
    """Two workers, one log, and the actions on them.

    Args:
        kafka: The offsets at which each partition has a record.
        guards: What the log compares at an append.
        waits: Claims and resolving wait for open commits.
        resolves: The outcome of a commit is read from the log; else it counts as not committed.
    """

    def __init__(
        self,
        kafka: Sequence[Collection[int]],
        *,
        guards: Guards = EVERY_GUARD,
        waits: bool = True,
        resolves: bool = True,
    ) -> None:
        self.kafka = {
            partition: sorted(offsets) for partition, offsets in zip(PARTITIONS, kafka, strict=True)
        }
        self.waits = waits
        self.resolves = resolves
        self.log = FakeLog(guards)
        self.workers = [Worker(), Worker()]
        self.now = 0.0
        # Commits for which no worker waits any more; they may still arrive.
        self.abandoned: list[Batch] = []
        self.backup: FakeLog | None = None
        self.was_restored = False
        for partition in PARTITIONS:
            self.log.begin(partition, 0)
            self.assign(0, partition)

    def execute(self, action: Action) -> None:
        """Execute an action, then check the invariants."""
        match action.kind:
            case Kind.WORK:
                self.work(action.who, action.records, action.then)
            case Kind.WAIT:
                self.wait(action.who, action.then)
            case Kind.ASSIGN:
                self.assign(action.who, action.partition)
            case Kind.REVOKE | Kind.LOSE:
                self.take_away(action.who, action.partition, graceful=action.kind is Kind.REVOKE)
            case Kind.FETCH_AGAIN:
                self.fetch_again(action.who, action.partition, action.records)
            case Kind.LATE_COMMIT_ARRIVES if self.abandoned:
                self._apply(self.abandoned.pop(action.records % len(self.abandoned)))
            case Kind.LATE_COMMIT_IS_LOST if self.abandoned:
                self.abandoned.pop()
            case Kind.CRASH:
                self.crash(action.who)
            case Kind.BACK_UP:
                self.backup = copy.deepcopy(self.log)
            case Kind.RESTORE:
                self.restore()
            case _:
                pass
        self.check()

    # ------------------------------------------------------------------------------ the actions

    def assign(self, who, partition):
        """The group assigns a partition; the other worker may not know yet that it lost it."""
        self.workers[who].assigned.add(partition)
        self._claim(self.workers[who], partition)

    def take_away(self, who, partition, *, graceful):
        """Revoked, after a drain; or lost, at once."""
        worker = self.workers[who]
        for _ in range(6 if graceful else 0):
            self._step(worker)
            self._answer(worker)
        worker = self.workers[who]
        worker.machine.released([partition])
        worker.assigned.discard(partition)
        worker.reading.pop(partition, None)

    def work(self, who, records, then):
        """Poll once, and do the next step of the machine; what happens to it is ``then``."""
        worker = self.workers[who]
        for partition, begin in worker.reading.items():
            if worker.machine.room:
                found = [offset for offset in self.kafka[partition] if offset >= begin][:records]
                worker.reading[partition] = found[-1] + 1 if found else END
                self._receive(worker, partition, found)
                if not found:
                    worker.machine.reached_end(partition, NextOffset(END))
        self._step(worker)
        self._finish(worker, then)

    def wait(self, who, then):
        """Time passes; the machine repeats, resolves up or reclaims, and that meets its fate."""
        self.now += 1.0
        self._step(self.workers[who])
        self._finish(self.workers[who], then)

    def fetch_again(self, who, partition, records):
        """Records that were fetched before arrive again."""
        begin = self.workers[who].reading.get(partition, 0)
        again = [offset for offset in self.kafka[partition] if offset < begin][-records:]
        self._receive(self.workers[who], partition, again)

    def crash(self, who):
        worker = self.workers[who]
        if worker.commit is not None and worker.commit.answer is None:
            self.abandoned.append(worker.commit.batch)
        self.workers[who] = Worker()

    def restore(self):
        """The backup is restored; the server was stopped for it, so no commit is open."""
        is_idle = not self.abandoned and all(worker.commit is None for worker in self.workers)
        if self.backup is not None and is_idle:
            self.log, self.backup = self.backup, None
            self.was_restored = True

    # --------------------------------------------------------------------- between loop and log

    def _claim(self, worker, partition):
        if self.waits:
            # The claim's UPDATE waits for a transaction that holds the row.
            self._finish_open_commits(partition)
        stored = self.log.claim(partition)
        worker.machine.claimed(partition, stored.epoch, stored.next_offset, NextOffset(END))
        worker.reading[partition] = stored.next_offset

    @staticmethod
    def _receive(worker, partition, offsets):
        first = worker.machine.first_wanted(partition)
        if first is not None:
            wanted = [row_at(partition, offset) for offset in offsets if offset >= first]
            worker.machine.received(partition, wanted)

    def _step(self, worker):
        match worker.machine.next_step(self.now):
            case Write(batch):
                assert worker.commit is None
                assert worker.resolving is None
                assert batch.advances
                worker.commit = Commit(batch)
            case Resolve(batch):
                assert worker.commit is None
                worker.resolving = batch
            case Reclaim(partition):
                assert partition in worker.assigned
                self._claim(worker, partition)
            case Contested():
                raise AssertionError("no partition is contested here")
            case _:
                pass

    def _finish(self, worker, fate):
        commit = worker.commit
        match fate:
            case Fate.ANSWERED:
                self._answer(worker)
            case Fate.ARRIVES if commit is not None and commit.answer is None:
                commit.answer = self._apply(commit.batch)
            case Fate.BREAKS_LATE | Fate.BREAKS_NEVER if commit is not None:
                if commit.answer is None and fate is Fate.BREAKS_LATE:
                    self.abandoned.append(commit.batch)
                worker.commit = None
                worker.machine.failed(self.now)
            case Fate.BREAKS_LATE | Fate.BREAKS_NEVER if worker.resolving is not None:
                worker.resolving = None
                worker.machine.failed(self.now)
            case _:
                pass

    def _answer(self, worker):
        """The log executes the step, and its answer arrives."""
        if worker.commit is not None:
            commit, worker.commit = worker.commit, None
            match commit.answer or self._apply(commit.batch):
                case "committed":
                    worker.machine.committed()
                case "fenced":
                    worker.machine.append_refused(self.now)
                case _:
                    self.workers[self.workers.index(worker)] = Worker()
        elif worker.resolving is not None:
            batch, worker.resolving = worker.resolving, None
            worker.machine.resolved(self._stored(batch), self.now)

    def _stored(self, batch):
        if self.waits:
            for partition in batch.advances:
                self._finish_open_commits(partition)
        if not self.resolves:
            return {
                partition: Ownership(advance.held, advance.expected)
                for partition, advance in batch.advances.items()
            }
        return self.log.find(batch.advances)

    def _finish_open_commits(self, partition):
        """A commit that has locked the partition's row ends before the row can be read."""
        for batch in [batch for batch in self.abandoned if partition in batch.advances]:
            self.abandoned.remove(batch)
            self._apply(batch)

    def _apply(self, batch):
        try:
            self.log.append(batch.rows, batch.advances)
        except FencedError:
            return "fenced"
        except InvariantError:
            # A duplicate key ends the process. After a restore the log may give the same epoch out
            # again, to a process whose first batch under it is still open.
            assert self.was_restored
            return "fatal"
        return "committed"

    # ----------------------------------------------------------------------------------- invariants

    def check(self):
        """The log has every record below the next offset, in order and once."""
        for partition in PARTITIONS:
            next_offset = self.log.ownerships[partition].next_offset
            below = [offset for offset in self.kafka[partition] if offset < next_offset]
            assert self.log.offsets(partition) == below, f"{partition} below {next_offset}"
        for worker in self.workers:
            is_waiting = worker.commit is not None or worker.resolving is not None
            assert worker.machine.awaits_outcome == is_waiting

    def end(self):
        """One worker runs alone: it reaches the end, whatever happened before."""
        self.abandoned.clear()
        for _ in range(60):
            # A process that ended is started again.
            for partition in set(PARTITIONS) - self.workers[0].assigned:
                self.assign(0, partition)
            self.work(0, 4, Fate.ANSWERED)
            self.now += 0.6
        self.check()
        machine = self.workers[0].machine
        assert machine.is_caught_up
        assert machine.lag == 0
        assert not machine.is_failing


kafkas = st.lists(
    st.sets(st.integers(0, END - 1), max_size=5).map(lambda gaps: set(range(END)) - gaps),
    min_size=len(PARTITIONS),
    max_size=len(PARTITIONS),
)
actions = st.builds(
    Action,
    st.sampled_from([*Kind, *[Kind.WORK] * 7, *[Kind.WAIT] * 3, Kind.LATE_COMMIT_ARRIVES]),
    st.sampled_from([0, 1]),
    st.sampled_from(PARTITIONS),
    st.integers(1, 4),
    st.sampled_from([*Fate, Fate.ANSWERED, Fate.ANSWERED]),
)
histories = st.lists(actions, min_size=15, max_size=60)
ALWAYS_THE_SAME = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"waits": False},
        # The comparison of offsets refuses even blind repeats.
        {"guards": Guards(epoch=False, primary_key=False), "waits": False, "resolves": False},
    ],
    ids=["all guards", "no waiting", "offsets alone"],
)
def test_the_log_has_every_record_once_whatever_happens(setting):
    @ALWAYS_THE_SAME
    @given(kafkas, histories)
    def run(kafka, actions):
        history = History(kafka, **setting)
        for action in actions:
            history.execute(action)
        if setting.get("resolves", True):
            history.end()

    run()


@pytest.mark.parametrize(
    "setting",
    [
        {"guards": Guards(epoch=False, expected=False, primary_key=False)},
        {"guards": Guards(expected=False, primary_key=False), "waits": False},
        {"guards": Guards(expected=False, primary_key=False), "resolves": False},
    ],
    ids=["no guards", "no offsets, no waiting", "no offsets, no resolving"],
)
def test_without_its_guards_the_same_histories_find_a_violation(setting):
    @settings(ALWAYS_THE_SAME, max_examples=3000, phases=[Phase.generate])
    @given(kafkas, histories)
    def run(kafka, actions):
        history = History(kafka, **setting)
        for action in actions:
            history.execute(action)

    with pytest.raises(AssertionError, match=r"orders:\d below"):
        run()


# ------------------------------------------------------------------------------- single decisions

A, B = PARTITIONS


def owning(*partitions: Partition, bounds: Bounds | None = None, end: int = END) -> IngestMachine:
    machine = IngestMachine(bounds or Bounds(batch_rows_max=3))
    for partition in partitions:
        machine.claimed(partition, Epoch(1), NextOffset(0), NextOffset(end))
    return machine


def receive(
    machine: IngestMachine, partition: Partition, *offsets: int, value: bytes = b""
) -> None:
    machine.received(partition, [row_at(partition, offset, value) for offset in offsets])


def write(machine: IngestMachine, now: float = 0.0) -> Batch:
    step = machine.next_step(now)
    assert isinstance(step, Write)
    return step.batch


def test_a_batch_expects_what_was_stored_and_never_the_first_record():
    machine = owning(A)
    receive(machine, A, 4, 9)

    batch = write(machine)

    assert batch.advances == {A: advance(1, 0, 10)}


def test_the_next_batch_fills_while_the_database_writes_the_last():
    machine = owning(A, B)
    receive(machine, A, 0)
    first = write(machine)
    receive(machine, A, 1)
    receive(machine, B, 0)

    assert machine.next_step(0.0) is None
    machine.committed()
    second = write(machine)

    assert [row.offset for row in first.rows] == [0]
    assert second.advances == {A: advance(1, 1, 2), B: advance(1, 0, 1)}


def test_the_buffer_accepts_records_up_to_the_bounds_of_rows_and_bytes():
    by_rows = owning(A, bounds=Bounds(batch_rows_max=3))
    receive(by_rows, A, 0, 1)
    by_bytes = owning(A, bounds=Bounds(batch_rows_max=100, batch_bytes_max=10_000))
    receive(by_bytes, A, 0, value=b"x" * 10_000)

    assert by_rows.room == 1
    assert by_bytes.room == 0
    receive(by_rows, A, 2, 3)
    assert by_rows.room == 0
    write(by_bytes)
    assert by_bytes.room == 100


def test_the_end_of_a_partition_is_stored_although_no_record_precedes_it():
    machine = owning(A)
    machine.reached_end(A, NextOffset(7))
    machine.reached_end(A, NextOffset(5))
    machine.reached_end(B, NextOffset(5))

    assert write(machine) == Batch([], {A: advance(1, 0, 7)})


def test_a_failed_write_is_retried_after_growing_waits():
    machine = owning(A, bounds=Bounds(backoff=Backoff(1.0, 5.0)))
    receive(machine, A, 0)
    batch, now, waits = write(machine), 0.0, []

    for _ in range(5):
        machine.failed(now)
        begin = now
        while machine.next_step(now) is None:
            now += 0.25
        waits.append(now - begin)

    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert machine.is_failing
    machine.resolved({A: owned_at(1, 0)}, now)
    assert write(machine, now) == batch
    machine.committed()
    assert not machine.is_failing


@pytest.mark.parametrize("end", ["revoked", "fenced"])
def test_a_failure_is_forgotten_with_its_batch(end):
    machine = owning(A)
    receive(machine, A, 0)
    write(machine)
    machine.failed(0.0)

    if end == "revoked":
        machine.released([A])
    else:
        machine.next_step(1.0)
        machine.resolved({A: owned_at(2, 0)}, 1.0)

    assert not machine.is_failing
    machine.claimed(B, Epoch(1), NextOffset(0), NextOffset(END))
    receive(machine, B, 0)
    assert machine.next_step(1.0) is not None
    assert not machine.is_failing, "this batch was not tried yet"


def test_an_unknown_outcome_is_resolved_by_the_stored_next_offset():
    found = {}
    for next_offset in (0, 1, 5):
        machine = owning(A)
        receive(machine, A, 0)
        write(machine)
        machine.failed(0.0)
        assert isinstance(machine.next_step(1.0), Resolve)
        found[next_offset] = machine.resolved({A: owned_at(1, next_offset)}, 1.0)

    assert found[0] == (0, {}, set())
    assert found[1] == (1, {A: 1}, set())
    assert found[5] == (0, {}, {A})


def test_the_rest_of_a_fenced_batch_is_written_without_the_fenced_partition():
    machine = owning(A, B)
    receive(machine, A, 0)
    receive(machine, B, 0)
    write(machine)
    machine.append_refused(0.0)
    assert isinstance(machine.next_step(0.0), Resolve)

    outcome = machine.resolved({A: owned_at(2, 0), B: owned_at(1, 0)}, 0.0)

    assert outcome.fenced == {A}
    assert write(machine).advances == {B: advance(1, 0, 1)}
    assert machine.owned == {B: 1}
    assert not machine.is_caught_up


def test_a_fenced_partition_is_claimed_later_and_a_moved_partition_at_once():
    reclaims = {}
    for name, stored in (("taken", owned_at(2, 0)), ("moved", owned_at(1, 9))):
        machine = owning(A, bounds=Bounds(reclaim_s_min=5.0))
        receive(machine, A, 0)
        write(machine)
        machine.append_refused(0.0)
        machine.next_step(0.0)
        machine.resolved({A: stored}, 0.0)
        reclaims[name] = [machine.next_step(now) for now in (0.0, 4.9, 5.0, 5.1)]

    assert reclaims == {
        "taken": [None, None, Reclaim(A), None],
        "moved": [Reclaim(A), None, None, None],
    }


def test_a_partition_that_is_taken_again_and_again_is_contested():
    machine = IngestMachine(Bounds(takeovers_max=3, takeovers_s=60.0, reclaim_s_min=5.0))
    steps, now = [], 0.0
    for epoch in (1, 3, 5):
        machine.claimed(A, Epoch(epoch), NextOffset(0), NextOffset(END))
        receive(machine, A, 0)
        write(machine, now)
        machine.append_refused(now)
        machine.next_step(now)
        machine.resolved({A: owned_at(epoch + 1, 0)}, now)
        now += 5.0
        steps.append(machine.next_step(now))

    assert steps == [Reclaim(A), Reclaim(A), Contested(A)]


def test_old_takeovers_are_forgotten():
    machine = IngestMachine(Bounds(takeovers_max=2, takeovers_s=60.0, reclaim_s_min=5.0))
    steps, now = [], 0.0
    for epoch in (1, 3, 5):
        machine.claimed(A, Epoch(epoch), NextOffset(0), NextOffset(END))
        receive(machine, A, 0)
        write(machine, now)
        machine.append_refused(now)
        machine.next_step(now)
        machine.resolved({A: owned_at(epoch + 1, 0)}, now)
        now += 70.0
        steps.append(machine.next_step(now))

    assert steps == [Reclaim(A)] * 3


def test_rows_of_a_released_partition_are_dropped_from_every_buffer():
    machine = owning(A, B)
    receive(machine, A, 0)
    receive(machine, B, 0)
    write(machine)
    machine.failed(0.0)
    receive(machine, A, 1)

    dropped = machine.released([A])

    assert dropped == 2
    resolve = machine.next_step(1.0)
    assert isinstance(resolve, Resolve)
    assert resolve.batch.advances.keys() == {B}
    assert machine.first_wanted(A) is None
    assert machine.is_drained([A])


def test_a_reclaim_is_detected_by_the_previous_epoch():
    """A database that was restored from a backup gives an epoch out again."""
    machine = owning(A)
    receive(machine, A, 0)
    write(machine)
    machine.released([A])
    machine.claimed(A, Epoch(1), NextOffset(0), NextOffset(END))
    receive(machine, A, 0, 1)
    machine.failed(0.0)
    assert isinstance(machine.next_step(1.0), Resolve)

    machine.resolved({A: owned_at(1, 0)}, 1.0)

    assert [row.offset for row in write(machine, 1.0).rows] == [0, 1]


def test_an_idle_worker_reads_again_after_the_database_was_restored():
    machine = owning(A, B)
    receive(machine, A, 0)
    write(machine)
    machine.committed()

    assert machine.checked({A: owned_at(1, 1), B: owned_at(1, 0)}, 0.0) == set()
    assert machine.checked({A: owned_at(1, 0), B: owned_at(2, 0)}, 0.0) == {A}, (
        "a new owner that still reads"
    )
    assert machine.next_step(0.0) == Reclaim(A)
    assert machine.owned == {B: 1}


def test_an_idle_worker_reclaims_what_another_process_claimed_and_released():
    """No takeover: a run in another group that ends at once may happen every minute."""
    machine = owning(A)

    for epoch in range(2, 2 + 2 * machine.bounds.takeovers_max):
        released = Ownership(Epoch(epoch), NextOffset(0), is_owned=False)
        assert machine.checked({A: released}, 0.0) == {A}
        assert machine.next_step(0.0) == Reclaim(A)
        machine.claimed(A, Epoch(epoch), NextOffset(0), NextOffset(END))


def test_a_check_ignores_partitions_during_a_batch():
    machine = owning(A)
    receive(machine, A, 0)
    write(machine)

    assert machine.checked({A: owned_at(1, 9)}, 0.0) == ()
    assert machine.awaits_outcome


def test_a_batch_whose_partition_is_released_is_neither_ours_nor_repeated():
    machine = owning(A)
    receive(machine, A, 0)
    write(machine)
    machine.released([A])
    machine.claimed(A, Epoch(2), NextOffset(0), NextOffset(END))

    outcome = machine.committed()

    assert outcome.next_offsets == {}
    assert machine.stored == {A: 0}
    assert machine.next_step(0.0) is None


def test_an_abandoned_machine_owns_nothing_and_has_no_step():
    machine = owning(A, B)
    receive(machine, A, 0)
    write(machine)

    machine.abandon()

    assert machine.owned == {}
    assert machine.next_step(100.0) is None
    assert not machine.awaits_outcome


def test_caught_up_means_the_end_of_kafka_at_the_claim():
    machine = owning(A, B, end=2)
    seen = [(machine.is_caught_up, machine.lag)]
    for partition in (A, B):
        receive(machine, partition, 0, 1)
    seen.append((machine.is_caught_up, machine.lag))
    write(machine)
    machine.committed()
    seen.append((machine.is_caught_up, machine.lag))
    machine.end_reported(A, 10, now=0.0)
    seen.append((machine.is_caught_up, machine.lag))

    assert seen == [(False, 4), (False, 4), (True, 0), (True, 8)]
