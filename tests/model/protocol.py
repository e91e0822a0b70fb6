"""A model of the protocol of claim, fence and unknown outcome; every state is explored.

Two workers, one log, and everything that may happen to them in any order: Kafka assigns a partition
to either or to both, a commit travels, arrives late or never, its answer is lost, a worker releases
a partition or dies, the database is restored from a backup. Each worker is a real
``IngestMachine``, and the log is the one in memory that passes the contract of the real one: the
code that is explored is the code that runs.

The search is breadth first, so a violation is reported with the shortest sequence that leads to it.
Machines decide by their state and not by the clock: all waits are zero here, and a step that is
possible now is also possible after anything else. A machine is called once for each of its states
and each call; the rest is looked up. So hundreds of thousands of states take seconds.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum, auto
from functools import cache, cached_property
from typing import Any, NamedTuple

from pipeline.backoff import Backoff
from pipeline.errors import FencedError, InvariantError
from pipeline.events import EncodedRow
from pipeline.ingest.state import (
    Batch,
    BatchResult,
    Bounds,
    IngestMachine,
    Reclaim,
    Resolve,
    Write,
    _BatchState,
)
from pipeline.partitions import NextOffset, Partition
from tests.contract.logs import EVERY_GUARD, FakeLog, Guards, row_at

WITHOUT_WAITS = Bounds(
    batch_rows_max=10,
    backoff=Backoff(0, 0),
    reclaim_s_min=0,
    takeovers_max=2,
    takeovers_s=0,
)
NOW = 0.0
STEPS_ALONE_MAX = 60
DEAD = -1
"""The sender of a commit whose process has died."""


class BlindRetry(IngestMachine):
    """Writes again what may be in the log already, like a client that retries COMMIT."""

    def failed(self, now: float) -> None:
        super().failed(now)
        self._batch_state = _BatchState.READY


@dataclass(frozen=True)
class Protocol:
    """The active guards; all of them, unless a test needs a violation.

    Attributes:
        guards: What the log compares at an append.
        waits: Resolving an unknown outcome waits for the worker's own open commits.
        machine: The class that decides.
    """

    guards: Guards = EVERY_GUARD
    waits: bool = True
    machine: type[IngestMachine] = IngestMachine


@dataclass(frozen=True)
class Space:
    """The bounds of the model. Within them everything is explored.

    Attributes:
        kafka: The offsets at which each partition has a record.
        end: The end of each partition.
        claims_max: Maximum number of claims, by both workers together.
        deaths_max: Maximum number of workers that die.
        open_commits_max: Maximum number of commits that travel at a time.
        restore: Whether the database may be backed up, and restored, once.
    """

    kafka: Sequence[Sequence[int]] = ((0, 2, 3),)
    end: int = 4
    claims_max: int = 3
    deaths_max: int = 1
    open_commits_max: int = 2
    restore: bool = False

    @cached_property
    def partitions(self) -> list[Partition]:
        """All partitions."""
        return [Partition("orders", number) for number in range(len(self.kafka))]

    def below(self, partition: Partition, end: int) -> list[int]:
        """The offsets of the records below ``end``."""
        return [offset for offset in self.kafka[partition.number] if offset < end]


class Waiting(IntEnum):
    """The answer of the database that a worker waits for."""

    NOTHING = auto()
    COMMIT = auto()
    COMMITTED = auto()  # the answer is on its way
    FENCED = auto()  # the answer is on its way
    OUTCOME = auto()


class Worker(NamedTuple):
    """One process; ``machine`` is the number of the state of its machine."""

    machine: int
    waiting: Waiting = Waiting.NOTHING


class Flight(NamedTuple):
    """A commit that travels; ``batch`` is the number of a batch. Its sender may not wait for it."""

    sender: int
    awaited: bool
    batch: int


class State(NamedTuple):
    """The whole state; ``log`` and ``backup`` are numbers of states of the log."""

    log: int
    workers: tuple[Worker, Worker]
    flights: tuple[Flight, ...] = ()
    claims: int = 0
    deaths: int = 0
    backup: int | None = None
    restored: bool = False


class Violation(Exception):  # noqa: N818 - a finding, not an error of this code
    """An invariant that does not hold, and the shortest sequence of moves that leads there."""

    def __init__(self, invariant: str, moves: Sequence[str]) -> None:
        super().__init__(f"{invariant}, after {len(moves)} steps: " + " > ".join(moves))
        self.moves = moves


class _Violated(Exception):  # noqa: N818 - raised where the moves are not known
    pass


class Explored(NamedTuple):
    """The number of states within the bounds, and the names of the moves between them."""

    states: int
    moves: frozenset[str]


Move = tuple[str, State]


class Model:
    """The protocol within bounds: ``explore`` visits every state."""

    def __init__(self, protocol: Protocol, space: Space) -> None:
        self._protocol = protocol
        self._space = space
        self._machines = _Numbered()
        self._batches = _Numbered()
        self._logs = _Numbered()
        # Each of these calls code of the product, which returns the same for the same arguments.
        self._call = cache(self._compute_call)
        self._batch_of_machine = cache(self._compute_batch_of_machine)
        self._resolved = cache(self._compute_resolved)
        self._checked = cache(self._compute_checked)
        self._check_log = cache(self._compute_check_log)
        self._applied = cache(self._compute_applied)
        self._claimed_log = cache(self._compute_claimed_log)
        self._finishes_alone = cache(self._compute_finishes_alone)
        self._own_moves = cache(self._compute_own_moves)

    def explore(self) -> Explored:
        """Visit every state and check its invariants.

        Raises:
            Violation: An invariant does not hold.
        """
        log = FakeLog(self._protocol.guards)
        for partition in self._space.partitions:
            log.begin(partition, 0)
        fresh = Worker(self._fresh())
        start = State(self._logs.number(log), (fresh, fresh))
        came_from: dict[State, tuple[State, str] | None] = {start: None}
        moves = set()
        waiting = deque([start])
        while waiting:
            state = waiting.popleft()
            try:
                self._check(state)
                for name, after in self._moves(state):
                    moves.add(name)
                    if after not in came_from:
                        came_from[after] = (state, name)
                        waiting.append(after)
            except _Violated as violated:
                raise Violation(str(violated), _moves_to(came_from, state)) from None
        return Explored(len(came_from), frozenset(moves))

    # ----------------------------------------------------------------------------------- invariants

    def _check(self, state: State) -> None:
        self._check_log(state.log)
        for worker in state.workers:
            machine: IngestMachine = self._machines[worker.machine]
            if machine.awaits_outcome != (worker.waiting is not Waiting.NOTHING):
                raise _Violated("a worker waits for an answer that never comes")
            self._finishes_alone(state.log, worker)

    def _compute_check_log(self, number: int) -> None:
        log: FakeLog = self._logs[number]
        for partition in self._space.partitions:
            end = log.ownerships[partition].next_offset
            logged, due = log.offsets(partition), self._space.below(partition, end)
            if logged != due:
                raise _Violated(f"{partition} below {end} holds {logged} and not {due}")

    def _check_outcome(self, state: State, outcome: BatchResult, batch: Batch) -> None:
        """What a worker treats as committed is in the log, unless a restore removed it."""
        if state.restored:
            return
        log: FakeLog = self._logs[state.log]
        for partition, end in outcome.next_offsets.items():
            if log.ownerships[partition].next_offset < end:
                raise _Violated(f"a worker treats {partition} as committed up to {end}")
        if outcome.records and any(
            row.offset not in log.rows[Partition(row.topic, row.partition)] for row in batch.rows
        ):
            raise _Violated("a worker treats rows as written that are not")

    def _compute_finishes_alone(self, log: int, worker: Worker) -> None:
        """Running alone, after a lost connection, a worker reaches the end."""
        if worker.waiting is not Waiting.NOTHING:
            worker = self._report(worker, "failed")
        state = State(log, (worker, worker))
        for _ in range(STEPS_ALONE_MAX):
            machine: IngestMachine = self._machines[state.workers[0].machine]
            ends = [
                ownership.next_offset for ownership in self._logs[state.log].ownerships.values()
            ]
            if set(ends) == {self._space.end} and machine.is_caught_up and not machine.lag:
                return
            state = self._alone(state)
        raise _Violated("a worker that runs alone never reaches the end")

    def _alone(self, state: State) -> State:
        worker = state.workers[0]
        if worker.waiting is Waiting.OUTCOME:
            return self._with(state, 0, self._resolve(state, worker))
        if worker.waiting is Waiting.COMMIT:
            batch = self._batch_of(worker)
            log, answer = self._applied(state.log, batch)
            return self._with(state._replace(log=log), 0, self._report(worker, answer))
        stepped = self._step(state._replace(claims=0), 0)
        if stepped is not None:
            return stepped[1]._replace(flights=())
        machine: IngestMachine = self._machines[worker.machine]
        for partition in self._space.partitions:
            if partition not in machine.owned:
                return self._claim(state, 0, partition)
        for partition in self._space.partitions:
            if (fetched := self._fetch(worker, partition)) is not None:
                return self._with(state, 0, fetched)
        looked = self._check_stored(state, 0)
        if looked is not None:
            return looked
        for partition, held in machine.owned.items():
            if self._logs[state.log].ownerships[partition].epoch > held:
                # The group gave it to the other worker, which died: it is assigned again.
                return self._claim(state, 0, partition)
        raise _Violated("a worker that runs alone does nothing, and is not at the end")

    # ------------------------------------------------------------------------- moves

    def _moves(self, state: State) -> Iterator[Move]:
        for who in (0, 1):
            yield from self._moves_of(state, who)
        for nth, flight in enumerate(state.flights):
            rest = state.flights[:nth] + state.flights[nth + 1 :]
            yield self._arrive(state._replace(flights=rest), flight)
            yield f"commit of {flight.sender} is lost", state._replace(flights=rest)
        if self._space.restore and not state.restored:
            if state.backup is None:
                yield "backup", state._replace(backup=state.log)
            elif not state.flights:
                # The server was stopped for it: no commit is open.
                yield "restore", state._replace(log=state.backup, backup=None, restored=True)

    def _moves_of(self, state: State, who: int) -> Iterator[Move]:
        worker = state.workers[who]
        for partition in self._space.partitions:
            at = partition.number
            if state.claims < self._space.claims_max:
                yield f"{who} claims {at}", self._claim(state, who, partition)
        for name, moved in self._own_moves(worker):
            yield f"{who} {name}", self._with(state, who, moved)
        if (stepped := self._step(state, who)) is not None:
            yield stepped
        match worker.waiting:
            case Waiting.COMMITTED | Waiting.FENCED:
                yield f"{who} receives {worker.waiting.name}", self._receive_answer(state, who)
            case Waiting.OUTCOME if not self._has_open_commits(state, who):
                yield f"{who} resolves", self._with(state, who, self._resolve(state, worker))
            case Waiting.NOTHING if (checked := self._check_stored(state, who)) is not None:
                yield f"{who} checks", checked
            case _:
                pass
        if worker.waiting is not Waiting.NOTHING:
            lost = state._replace(flights=_not_awaited(state.flights, who))
            yield (
                f"{who} loses its connection",
                self._with(lost, who, self._report(worker, "failed")),
            )
        if state.deaths < self._space.deaths_max:
            yield f"{who} dies", self._die(state, who)

    def _compute_own_moves(self, worker: Worker) -> list[tuple[str, Worker]]:
        """Moves that depend on the worker alone."""
        moves = []
        owned = self._machines[worker.machine].owned
        for partition in self._space.partitions:
            if (fetched := self._fetch(worker, partition)) is not None:
                moves.append((f"fetches {partition.number}", fetched))
            if partition in owned:
                released = self._report(worker, "released", partition)
                moves.append((f"releases {partition.number}", released))
        return moves

    def _claim(self, state: State, who: int, partition: Partition) -> State:
        log = self._claimed_log(state.log, partition)
        epoch, next_offset, _ = self._logs[log].ownerships[partition]
        end = NextOffset(self._space.end)
        worker = self._report(state.workers[who], "claimed", partition, epoch, next_offset, end)
        after = state._replace(log=log, claims=state.claims + 1)
        return self._with(after, who, worker)

    def _fetch(self, worker: Worker, partition: Partition) -> Worker | None:
        """The next record, or the end after the last one."""
        machine: IngestMachine = self._machines[worker.machine]
        first = machine.first_wanted(partition)
        if first is None or first == self._space.end:
            return None
        following = [at for at in self._space.kafka[partition.number] if at >= first]
        if following:
            return self._report(worker, "received", partition, (following[0],))
        return self._report(worker, "reached_end", partition, NextOffset(self._space.end))

    def _step(self, state: State, who: int) -> Move | None:
        """The next step of the machine."""
        worker = state.workers[who]
        machine, step = self._call(worker.machine, "next_step", NOW)
        after = worker._replace(machine=machine)
        match step:
            case Write():
                if len(state.flights) == self._space.open_commits_max:
                    return None
                flight = Flight(who, True, self._batch_of_machine(machine))
                written = self._with(state, who, after._replace(waiting=Waiting.COMMIT))
                flights = tuple(sorted((*state.flights, flight)))
                return f"{who} sends a commit", written._replace(flights=flights)
            case Resolve():
                requested = after._replace(waiting=Waiting.OUTCOME)
                return f"{who} requests the outcome", self._with(state, who, requested)
            case Reclaim(partition):
                if state.claims == self._space.claims_max:
                    return None
                return f"{who} reclaims", self._claim(self._with(state, who, after), who, partition)
            case None:
                return None
            case _:
                raise _Violated(f"unexpected step {step}")

    def _arrive(self, state: State, flight: Flight) -> Move:
        log, answer = self._applied(state.log, flight.batch)
        after = state._replace(log=log)
        if flight.awaited:
            waiting = Waiting.COMMITTED if answer == "committed" else Waiting.FENCED
            worker = state.workers[flight.sender]._replace(waiting=waiting)
            after = self._with(after, flight.sender, worker)
        return f"commit of {flight.sender} arrives: {answer}", after

    def _receive_answer(self, state: State, who: int) -> State:
        worker = state.workers[who]
        if worker.waiting is Waiting.FENCED:
            return self._with(state, who, self._report(worker, "append_refused"))
        machine, outcome = self._call(worker.machine, "committed")
        self._check_outcome(state, outcome, self._batches[self._batch_of(worker)])
        return self._with(state, who, Worker(machine))

    def _resolve(self, state: State, worker: Worker) -> Worker:
        machine, outcome = self._resolved(worker.machine, state.log)
        self._check_outcome(state, outcome, self._batches[self._batch_of(worker)])
        return Worker(machine)

    def _check_stored(self, state: State, who: int) -> State | None:
        """The worker after it has checked what is stored; None if that changes nothing."""
        worker = state.workers[who]
        checked = self._checked(worker.machine, state.log)
        return None if checked == worker.machine else self._with(state, who, Worker(checked))

    def _has_open_commits(self, state: State, who: int) -> bool:
        return self._protocol.waits and any(flight.sender == who for flight in state.flights)

    def _die(self, state: State, who: int) -> State:
        flights = tuple(
            sorted(
                Flight(DEAD, False, flight.batch) if flight.sender == who else flight
                for flight in state.flights
            )
        )
        dead = state._replace(flights=flights, deaths=state.deaths + 1)
        return self._with(dead, who, Worker(self._fresh()))

    @staticmethod
    def _with(state: State, who: int, worker: Worker) -> State:
        first, second = state.workers
        return State(state.log, (worker, second) if who == 0 else (first, worker), *state[2:])

    # ------------------------------------------------------------------------ code of the product

    def _fresh(self) -> int:
        return self._machines.number(self._protocol.machine(WITHOUT_WAITS))

    def _compute_batch_of_machine(self, machine: int) -> int:
        return self._batches.number(self._machines[machine]._batch)

    def _batch_of(self, worker: Worker) -> int:
        return self._batch_of_machine(worker.machine)

    def _report(self, worker: Worker, method: str, *arguments: Any) -> Worker:
        machine, _ = self._call(worker.machine, method, *arguments)
        is_answer = method in ("committed", "append_refused", "failed", "resolved")
        return Worker(machine, Waiting.NOTHING if is_answer else worker.waiting)

    def _compute_call(self, number: int, method: str, *arguments: Any) -> tuple[int, Any]:
        """The state of a machine after a call of a method, and what the method returned."""
        machine: IngestMachine = copy.deepcopy(self._machines[number])
        returned: Any
        match method:
            case "received":
                partition, offsets = arguments
                machine.received(partition, [row_at(partition, at) for at in offsets])
                returned = None
            case "released":
                returned = machine.released(arguments)
            case "append_refused" | "failed":
                returned = getattr(machine, method)(NOW)
            case "resolved" | "checked":
                returned = getattr(machine, method)(dict(arguments[0]), NOW)
            case _:
                returned = getattr(machine, method)(*arguments)
        # The number of failures decides only when to try again.
        machine._failures = min(machine._failures, 1)
        return self._machines.number(machine), returned

    def _compute_resolved(self, number: int, log: int) -> tuple[int, BatchResult]:
        batch: Batch = self._batches[self._batch_of_machine(number)]
        stored = self._logs[log].find(batch.advances)
        called: tuple[int, BatchResult] = self._call(number, "resolved", tuple(stored.items()))
        return called

    def _compute_checked(self, number: int, log: int) -> int:
        stored = self._logs[log].find(self._machines[number].owned)
        return self._call(number, "checked", tuple(stored.items()))[0]

    def _compute_applied(self, number: int, batch_number: int) -> tuple[int, str]:
        log: FakeLog = copy.deepcopy(self._logs[number])
        batch: Batch = self._batches[batch_number]
        try:
            log.append(batch.rows, batch.advances)
        except FencedError:
            return number, "append_refused"
        except InvariantError as error:
            raise _Violated(f"the log refused what passed its guards: {error}") from error
        return self._logs.number(log), "committed"

    def _compute_claimed_log(self, number: int, partition: Partition) -> int:
        log: FakeLog = copy.deepcopy(self._logs[number])
        log.claim(partition)
        return self._logs.number(log)


class _Numbered:
    """Numbers mutable objects by their contents."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._objects: list[Any] = []

    def number(self, value: object) -> int:
        number = self._numbers.setdefault(_contents(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        return number

    def __getitem__(self, number: int) -> Any:
        return self._objects[number]


def _contents(value: Any) -> Any:
    """All fields of an object: two objects get one number only if all of them are equal."""
    match value:
        case EncodedRow():
            return value.partition, value.offset
        case Mapping():
            return tuple((_contents(key), _contents(value)) for key, value in value.items())
        case tuple() | list():
            return tuple(map(_contents, value))
        case set() | frozenset():
            return frozenset(map(_contents, value))
        case _ if is_dataclass(value):
            return tuple(_contents(getattr(value, field.name)) for field in fields(value))
        case _:
            return value


def _not_awaited(flights: tuple[Flight, ...], who: int) -> tuple[Flight, ...]:
    changed = (
        flight._replace(awaited=False) if flight.sender == who else flight for flight in flights
    )
    return tuple(sorted(changed))


def _moves_to(came_from: Mapping[State, tuple[State, str] | None], state: State) -> list[str]:
    moves: list[str] = []
    while (step := came_from[state]) is not None:
        state, name = step
        moves.append(name)
    return moves[::-1]
