"""The decisions of the ingest loop, under every order of events that hypothesis thinks of.

Two workers run the production state machine against one log in memory. Commits travel: they may
arrive late, never, or arrive and their answer be lost; partitions are claimed by both, revoked and
lost at any moment, workers crash, and the log is restored from a backup. After every step the log
must hold the records below the next offset: all, in order, once.

The same histories, run against a log without its guards, must find the harm: otherwise they would
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
from pipeline.ingest.state import Batch, Bounds, Machine, Reclaim, Resolve, Stolen, Write
from pipeline.partitions import Epoch, NextOffset, Ownership, Partition
from tests.contract.logs import EVERY_GUARD, FakeLog, Guards, advance, place, row_at

PARTITIONS = [Partition("orders", 0), Partition("orders", 1)]
NEVER_STOLEN = Bounds(
    batch_rows_max=3, steals_max=10**9, reclaim_s_min=0.5, backoff=Backoff(0.1, 0.4)
)
END = 14


@dataclass
class Commit:
    """A transaction on its way: not yet at the log, or arrived with an answer to give."""

    batch: Batch
    answer: str | None = None


@dataclass
class Worker:
    """One process: a machine, where it reads each partition, and what it waits for."""

    machine: Machine = field(default_factory=lambda: Machine(NEVER_STOLEN))
    reading: dict[Partition, int] = field(default_factory=dict)
    assigned: set[Partition] = field(default_factory=set)
    commit: Commit | None = None
    resolving: Batch | None = None


class Fate(Enum):
    """What becomes of a step that was handed to the database."""

    ANSWERED = auto()
    ARRIVES = auto()  # and its answer is still on its way
    STAYS = auto()
    BREAKS_LATE = auto()  # the connection breaks; the commit arrives, or not, some time later
    BREAKS_NEVER = auto()


class Kind(Enum):
    """What may happen to the workers and to the log."""

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


class Happening(NamedTuple):
    """One thing that happens; a kind makes of the rest what it needs."""

    kind: Kind
    who: int
    partition: Partition
    records: int
    then: Fate


class History:
    """Two workers, one log, and what happens to them.

    Args:
        kafka: The offsets at which each partition has a record.
        guards: What the log compares at an append.
        waits: A claim, and a look at an unknown outcome, wait for what is still on its way.
        looks: The outcome of a commit is looked up; else it is taken for not committed.
    """

    def __init__(
        self,
        kafka: Sequence[Collection[int]],
        *,
        guards: Guards = EVERY_GUARD,
        waits: bool = True,
        looks: bool = True,
    ) -> None:
        self.kafka = {place: sorted(at) for place, at in zip(PARTITIONS, kafka, strict=True)}
        self.waits = waits
        self.looks = looks
        self.log = FakeLog(guards)
        self.workers = [Worker(), Worker()]
        self.now = 0.0
        # Commits whose worker has stopped waiting; they may still arrive.
        self.adrift: list[Batch] = []
        self.backup: FakeLog | None = None
        self.was_restored = False
        for partition in PARTITIONS:
            self.log.begin(partition, 0)
            self.assign(0, partition)

    def happens(self, it: Happening) -> None:
        """One thing happens, and what must hold is looked at."""
        match it.kind:
            case Kind.WORK:
                self.work(it.who, it.records, it.then)
            case Kind.WAIT:
                self.wait(it.who, it.then)
            case Kind.ASSIGN:
                self.assign(it.who, it.partition)
            case Kind.REVOKE | Kind.LOSE:
                self.take_away(it.who, it.partition, graceful=it.kind is Kind.REVOKE)
            case Kind.FETCH_AGAIN:
                self.fetch_again(it.who, it.partition, it.records)
            case Kind.LATE_COMMIT_ARRIVES if self.adrift:
                self._apply(self.adrift.pop(it.records % len(self.adrift)))
            case Kind.LATE_COMMIT_IS_LOST if self.adrift:
                self.adrift.pop()
            case Kind.CRASH:
                self.crash(it.who)
            case Kind.BACK_UP:
                self.backup = copy.deepcopy(self.log)
            case Kind.RESTORE:
                self.restore()
            case _:
                pass
        self.check()

    # ------------------------------------------------------------------------------ what happens

    def assign(self, who, partition):
        """The group gives a partition; the other worker may not know yet that it lost it."""
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
        """Poll once, do what the machine says, and let that meet its fate."""
        worker = self.workers[who]
        for partition, begin in worker.reading.items():
            if worker.machine.room:
                found = [offset for offset in self.kafka[partition] if offset >= begin][:records]
                worker.reading[partition] = found[-1] + 1 if found else END
                self._receive(worker, partition, found)
                if not found:
                    worker.machine.reached_end(partition, NextOffset(END))
        self._step(worker)
        self._meet(worker, then)

    def wait(self, who, then):
        """Time passes; the machine repeats, looks up or reclaims, and that meets its fate."""
        self.now += 1.0
        self._step(self.workers[who])
        self._meet(self.workers[who], then)

    def fetch_again(self, who, partition, records):
        """Records that were fetched before come once more."""
        begin = self.workers[who].reading.get(partition, 0)
        again = [offset for offset in self.kafka[partition] if offset < begin][-records:]
        self._receive(self.workers[who], partition, again)

    def crash(self, who):
        worker = self.workers[who]
        if worker.commit is not None and worker.commit.answer is None:
            self.adrift.append(worker.commit.batch)
        self.workers[who] = Worker()

    def restore(self):
        """The backup comes back; the server was down for it, so nothing is on its way."""
        idle = not self.adrift and all(worker.commit is None for worker in self.workers)
        if self.backup is not None and idle:
            self.log, self.backup = self.backup, None
            self.was_restored = True

    # --------------------------------------------------------------------- between loop and log

    def _claim(self, worker, partition):
        if self.waits:
            # The claim's UPDATE waits for a transaction that holds the row.
            self._let_arrive(partition)
        place = self.log.claim(partition)
        worker.machine.claimed(partition, place.epoch, place.next_offset, NextOffset(END))
        worker.reading[partition] = place.next_offset

    @staticmethod
    def _receive(worker, partition, offsets):
        first = worker.machine.wants_from(partition)
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
            case Stolen():
                raise AssertionError("nobody steals here so often")
            case _:
                pass

    def _meet(self, worker, fate):
        commit = worker.commit
        match fate:
            case Fate.ANSWERED:
                self._answer(worker)
            case Fate.ARRIVES if commit is not None and commit.answer is None:
                commit.answer = self._apply(commit.batch)
            case Fate.BREAKS_LATE | Fate.BREAKS_NEVER if commit is not None:
                if commit.answer is None and fate is Fate.BREAKS_LATE:
                    self.adrift.append(commit.batch)
                worker.commit = None
                worker.machine.failed(self.now)
            case Fate.BREAKS_LATE | Fate.BREAKS_NEVER if worker.resolving is not None:
                worker.resolving = None
                worker.machine.failed(self.now)
            case _:
                pass

    def _answer(self, worker):
        """The log does what it was asked and says so."""
        if worker.commit is not None:
            commit, worker.commit = worker.commit, None
            match commit.answer or self._apply(commit.batch):
                case "committed":
                    worker.machine.committed()
                case "fenced":
                    worker.machine.fenced(self.now)
                case _:
                    self.workers[self.workers.index(worker)] = Worker()
        elif worker.resolving is not None:
            batch, worker.resolving = worker.resolving, None
            worker.machine.found(self._places(batch), self.now)

    def _places(self, batch):
        if self.waits:
            for partition in batch.advances:
                self._let_arrive(partition)
        if not self.looks:
            return {
                partition: Ownership(advance.held, advance.expected)
                for partition, advance in batch.advances.items()
            }
        return self.log.find(batch.advances)

    def _let_arrive(self, partition):
        """What holds the partition's row ends before anybody else gets it."""
        for batch in [batch for batch in self.adrift if partition in batch.advances]:
            self.adrift.remove(batch)
            self._apply(batch)

    def _apply(self, batch):
        try:
            self.log.append(batch.rows, batch.advances)
        except FencedError:
            return "fenced"
        except InvariantError:
            # The primary key's refusal ends the process. After a restore an epoch may be given
            # out a second time, to a process whose first batch under it is still on its way.
            assert self.was_restored
            return "broken"
        return "committed"

    # -------------------------------------------------------------------------------- what holds

    def check(self):
        """The log holds every record below the next offset, in order and once."""
        for partition in PARTITIONS:
            next_offset = self.log.places[partition].next_offset
            below = [offset for offset in self.kafka[partition] if offset < next_offset]
            assert self.log.offsets(partition) == below, f"{partition} below {next_offset}"
        for worker in self.workers:
            busy = worker.commit is not None or worker.resolving is not None
            assert worker.machine.is_with_database == busy

    def end(self):
        """One worker is left alone: it brings everything to its end, however it went before."""
        self.adrift.clear()
        for _ in range(60):
            # A process that broke is started anew.
            for partition in set(PARTITIONS) - self.workers[0].assigned:
                self.assign(0, partition)
            self.work(0, 4, Fate.ANSWERED)
            self.now += 0.6
        self.check()
        machine = self.workers[0].machine
        assert machine.is_caught_up
        assert machine.behind == 0
        assert not machine.is_troubled


kafkas = st.lists(
    st.sets(st.integers(0, END - 1), max_size=5).map(lambda gaps: set(range(END)) - gaps),
    min_size=len(PARTITIONS),
    max_size=len(PARTITIONS),
)
happenings = st.builds(
    Happening,
    st.sampled_from([*Kind, *[Kind.WORK] * 7, *[Kind.WAIT] * 3, Kind.LATE_COMMIT_ARRIVES]),
    st.sampled_from([0, 1]),
    st.sampled_from(PARTITIONS),
    st.integers(1, 4),
    st.sampled_from([*Fate, Fate.ANSWERED, Fate.ANSWERED]),
)
histories = st.lists(happenings, min_size=15, max_size=60)
ALWAYS_THE_SAME = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"waits": False},
        # The comparison of offsets refuses even blind repeats.
        {"guards": Guards(epoch=False, primary_key=False), "waits": False, "looks": False},
    ],
    ids=["as it is", "nobody waits", "offsets alone"],
)
def test_the_log_holds_every_record_once_whatever_happens(setting):
    @ALWAYS_THE_SAME
    @given(kafkas, histories)
    def run(kafka, happenings):
        history = History(kafka, **setting)
        for happening in happenings:
            history.happens(happening)
        if setting.get("looks", True):
            history.end()

    run()


@pytest.mark.parametrize(
    "setting",
    [
        {"guards": Guards(epoch=False, expected=False, primary_key=False)},
        {"guards": Guards(expected=False, primary_key=False), "waits": False},
        {"guards": Guards(expected=False, primary_key=False), "looks": False},
    ],
    ids=["no guards", "no offsets, nobody waits", "no offsets, nobody looks"],
)
def test_without_its_guards_the_same_histories_find_the_harm(setting):
    @settings(ALWAYS_THE_SAME, max_examples=3000, phases=[Phase.generate])
    @given(kafkas, histories)
    def run(kafka, happenings):
        history = History(kafka, **setting)
        for happening in happenings:
            history.happens(happening)

    with pytest.raises(AssertionError, match=r"orders\[\d\] below"):
        run()


# ------------------------------------------------------------------------------- single decisions

A, B = PARTITIONS


def owning(*partitions: Partition, bounds: Bounds | None = None, end: int = END) -> Machine:
    machine = Machine(bounds or Bounds(batch_rows_max=3))
    for partition in partitions:
        machine.claimed(partition, Epoch(1), NextOffset(0), NextOffset(end))
    return machine


def receive(machine: Machine, partition: Partition, *offsets: int, value: bytes = b"") -> None:
    machine.received(partition, [row_at(partition, offset, value) for offset in offsets])


def write(machine: Machine, now: float = 0.0) -> Batch:
    step = machine.next_step(now)
    assert isinstance(step, Write)
    return step.batch


def test_a_batch_expects_what_was_stored_and_never_the_first_record():
    machine = owning(A)
    receive(machine, A, 4, 9)

    batch = write(machine)

    assert batch.advances == {A: advance(1, 0, 10)}


def test_the_next_batch_fills_while_one_is_with_the_database():
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


def test_there_is_room_up_to_the_bounds_of_rows_and_of_bytes():
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


def test_the_end_of_a_partition_is_stored_though_no_record_lies_before_it():
    machine = owning(A)
    machine.reached_end(A, NextOffset(7))
    machine.reached_end(A, NextOffset(5))
    machine.reached_end(B, NextOffset(5))

    assert write(machine) == Batch([], {A: advance(1, 0, 7)})


def test_a_failing_database_is_tried_again_ever_more_rarely():
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
    assert machine.is_troubled
    machine.found({A: place(1, 0)}, now)
    assert write(machine, now) == batch
    machine.committed()
    assert not machine.is_troubled


@pytest.mark.parametrize("end", ["revoked", "fenced"])
def test_a_failure_is_forgotten_with_the_batch_that_met_it(end):
    machine = owning(A)
    receive(machine, A, 0)
    write(machine)
    machine.failed(0.0)

    if end == "revoked":
        machine.released([A])
    else:
        machine.next_step(1.0)
        machine.found({A: place(2, 0)}, 1.0)

    assert not machine.is_troubled
    machine.claimed(B, Epoch(1), NextOffset(0), NextOffset(END))
    receive(machine, B, 0)
    assert machine.next_step(1.0) is not None
    assert not machine.is_troubled, "this batch was not tried yet"


def test_an_unknown_outcome_is_told_by_where_the_partition_stands():
    found = {}
    for next_offset in (0, 1, 5):
        machine = owning(A)
        receive(machine, A, 0)
        write(machine)
        machine.failed(0.0)
        assert isinstance(machine.next_step(1.0), Resolve)
        found[next_offset] = machine.found({A: place(1, next_offset)}, 1.0)

    assert found[0] == (0, {}, set())
    assert found[1] == (1, {A: 1}, set())
    assert found[5] == (0, {}, {A})


def test_the_rest_of_a_fenced_batch_is_written_without_the_fenced_partition():
    machine = owning(A, B)
    receive(machine, A, 0)
    receive(machine, B, 0)
    write(machine)
    machine.fenced(0.0)
    assert isinstance(machine.next_step(0.0), Resolve)

    outcome = machine.found({A: place(2, 0), B: place(1, 0)}, 0.0)

    assert outcome.foreign == {A}
    assert write(machine).advances == {B: advance(1, 0, 1)}
    assert machine.owned == {B: 1}
    assert not machine.is_caught_up


def test_a_partition_that_was_taken_rests_and_one_that_was_moved_is_claimed_at_once():
    reclaims = {}
    for name, at in (("taken", place(2, 0)), ("moved", place(1, 9))):
        machine = owning(A, bounds=Bounds(reclaim_s_min=5.0))
        receive(machine, A, 0)
        write(machine)
        machine.fenced(0.0)
        machine.next_step(0.0)
        machine.found({A: at}, 0.0)
        reclaims[name] = [machine.next_step(now) for now in (0.0, 4.9, 5.0, 5.1)]

    assert reclaims == {
        "taken": [None, None, Reclaim(A), None],
        "moved": [Reclaim(A), None, None, None],
    }


def test_a_partition_that_is_stolen_again_and_again_ends_the_work():
    machine = Machine(Bounds(steals_max=3, steals_s=60.0, reclaim_s_min=5.0))
    steps, now = [], 0.0
    for epoch in (1, 3, 5):
        machine.claimed(A, Epoch(epoch), NextOffset(0), NextOffset(END))
        receive(machine, A, 0)
        write(machine, now)
        machine.fenced(now)
        machine.next_step(now)
        machine.found({A: place(epoch + 1, 0)}, now)
        now += 5.0
        steps.append(machine.next_step(now))

    assert steps == [Reclaim(A), Reclaim(A), Stolen(A)]


def test_steals_long_ago_are_forgotten():
    machine = Machine(Bounds(steals_max=2, steals_s=60.0, reclaim_s_min=5.0))
    steps, now = [], 0.0
    for epoch in (1, 3, 5):
        machine.claimed(A, Epoch(epoch), NextOffset(0), NextOffset(END))
        receive(machine, A, 0)
        write(machine, now)
        machine.fenced(now)
        machine.next_step(now)
        machine.found({A: place(epoch + 1, 0)}, now)
        now += 70.0
        steps.append(machine.next_step(now))

    assert steps == [Reclaim(A)] * 3


def test_what_is_let_go_is_dropped_from_every_place_where_it_waits():
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
    assert machine.wants_from(A) is None
    assert machine.is_drained([A])


def test_a_claim_of_the_same_epoch_is_told_from_the_one_before_it():
    """A database that was put back to a backup gives an epoch out a second time."""
    machine = owning(A)
    receive(machine, A, 0)
    write(machine)
    machine.released([A])
    machine.claimed(A, Epoch(1), NextOffset(0), NextOffset(END))
    receive(machine, A, 0, 1)
    machine.failed(0.0)
    assert isinstance(machine.next_step(1.0), Resolve)

    machine.found({A: place(1, 0)}, 1.0)

    assert [row.offset for row in write(machine, 1.0).rows] == [0, 1]


def test_an_idle_worker_reads_again_where_the_database_was_put_back():
    machine = owning(A, B)
    receive(machine, A, 0)
    write(machine)
    machine.committed()

    assert machine.looked({A: place(1, 1), B: place(1, 0)}, 0.0) == set()
    assert machine.looked({A: place(1, 0), B: place(2, 0)}, 0.0) == {A}, "a new owner is no news"
    assert machine.next_step(0.0) == Reclaim(A)
    assert machine.owned == {B: 1}


def test_an_idle_worker_claims_again_what_another_process_claimed_and_released():
    """Not a theft: a run of another group that ends at once may come every minute."""
    machine = owning(A)

    for epoch in range(2, 2 + 2 * machine.bounds.steals_max):
        released = Ownership(Epoch(epoch), NextOffset(0), is_owned=False)
        assert machine.looked({A: released}, 0.0) == {A}
        assert machine.next_step(0.0) == Reclaim(A)
        machine.claimed(A, Epoch(epoch), NextOffset(0), NextOffset(END))


def test_a_look_says_nothing_of_a_batch_in_hand():
    machine = owning(A)
    receive(machine, A, 0)
    write(machine)

    assert machine.looked({A: place(1, 9)}, 0.0) == ()
    assert machine.is_with_database


def test_what_is_with_the_database_when_it_is_let_go_is_neither_ours_nor_repeated():
    machine = owning(A)
    receive(machine, A, 0)
    write(machine)
    machine.released([A])
    machine.claimed(A, Epoch(2), NextOffset(0), NextOffset(END))

    outcome = machine.committed()

    assert outcome.moved == {}
    assert machine.stored == {A: 0}
    assert machine.next_step(0.0) is None


def test_an_abandoned_machine_owns_nothing_and_asks_for_nothing():
    machine = owning(A, B)
    receive(machine, A, 0)
    write(machine)

    machine.abandon()

    assert machine.owned == {}
    assert machine.next_step(100.0) is None
    assert not machine.is_with_database


def test_caught_up_is_what_was_there_at_the_claim():
    machine = owning(A, B, end=2)
    told = [(machine.is_caught_up, machine.behind)]
    for partition in (A, B):
        receive(machine, partition, 0, 1)
    told.append((machine.is_caught_up, machine.behind))
    write(machine)
    machine.committed()
    told.append((machine.is_caught_up, machine.behind))
    machine.saw_end(A, 10, now=0.0)
    told.append((machine.is_caught_up, machine.behind))

    assert told == [(False, 4), (False, 4), (True, 0), (True, 8)]
