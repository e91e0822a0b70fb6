"""The protocol of claim, fence and unknown outcome as a model that is explored to its last state.

Two workers, one log, and everything that may happen to them in any order: Kafka gives a partition
to either or to both, a commit travels, arrives late or never, its answer is lost, a worker lets go
or dies, the database is put back to a backup. Each worker is a real ``Machine`` and the log is the
one in memory that passes the contract of the real one, so what is explored is what runs.

The search is breadth first, so a violation comes with the shortest way to it. Machines decide by
what they hold and not by the clock: all waits are zero here, and a step that may be done now may
also be done after anything else. A machine runs once for each of its states and what it is told;
the rest is looking up, which is what makes hundreds of thousands of states a matter of seconds.
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
from pipeline.ingest.state import Batch, Bounds, Machine, Outcome, Reclaim, Resolve, Write, _Flight
from pipeline.partitions import NextOffset, Partition
from tests.contract.logs import EVERY_GUARD, FakeLog, Guards, row_at

WITHOUT_WAITS = Bounds(
    batch_rows_max=10, backoff=Backoff(0, 0), reclaim_s_min=0, steals_max=2, steals_s=0
)
NOW = 0.0
ALONE_STEPS_MAX = 60
GONE = -1
"""The sender of a commit whose process has died."""


class BlindRetry(Machine):
    """Writes again what may be in the log already: what a client does that retries COMMIT."""

    def failed(self, now: float) -> None:
        super().failed(now)
        self._flight_state = _Flight.READY


@dataclass(frozen=True)
class Protocol:
    """What is switched on; all of it, unless a test wants to see the harm.

    Attributes:
        guards: What the log compares at an append.
        waits: The look at an unknown outcome waits for the worker's own commits on their way.
        machine: Who decides.
    """

    guards: Guards = EVERY_GUARD
    waits: bool = True
    machine: type[Machine] = Machine


@dataclass(frozen=True)
class Space:
    """The bounds of what may happen. Within them everything is explored.

    Attributes:
        kafka: The offsets at which each partition has a record.
        end: The end of each partition.
        claims_max: How often partitions may be claimed, by both workers together.
        deaths_max: How many workers may die.
        on_the_way_max: How many commits may travel at a time.
        restore: Whether the database may be backed up, and put back, once.
    """

    kafka: Sequence[Sequence[int]] = ((0, 2, 3),)
    end: int = 4
    claims_max: int = 3
    deaths_max: int = 1
    on_the_way_max: int = 2
    restore: bool = False

    @cached_property
    def partitions(self) -> list[Partition]:
        """The partitions that there are."""
        return [Partition("orders", number) for number in range(len(self.kafka))]

    def below(self, partition: Partition, end: int) -> list[int]:
        """The offsets of the records below ``end``."""
        return [offset for offset in self.kafka[partition.number] if offset < end]


class Waiting(IntEnum):
    """What a worker has asked of the database and not been told."""

    NOTHING = auto()
    COMMIT = auto()
    COMMITTED = auto()  # the answer is on its way
    FENCED = auto()  # the answer is on its way
    OUTCOME = auto()


class Worker(NamedTuple):
    """One process; ``machine`` is the number of a machine's state."""

    machine: int
    waiting: Waiting = Waiting.NOTHING


class Flight(NamedTuple):
    """A commit on its way; ``batch`` is the number of a batch. Its sender may have given it up."""

    sender: int
    awaited: bool
    batch: int


class State(NamedTuple):
    """Everything; ``log`` and ``backup`` are numbers of the log's states."""

    log: int
    workers: tuple[Worker, Worker]
    flights: tuple[Flight, ...] = ()
    claims: int = 0
    deaths: int = 0
    backup: int | None = None
    restored: bool = False


class Violation(Exception):  # noqa: N818 - what was found, not what went wrong here
    """What must never be, and the shortest way to it."""

    def __init__(self, what: str, way: Sequence[str]) -> None:
        super().__init__(f"{what}, after {len(way)} steps: " + " > ".join(way))
        self.way = way


class _Harm(Exception):  # noqa: N818 - carries the word to where the way is known
    pass


class Explored(NamedTuple):
    """How many states there are within the bounds, and what happened on the way, in words."""

    states: int
    moves: frozenset[str]


Move = tuple[str, State]


class Model:
    """The protocol over a space: ``explore`` looks at every state."""

    def __init__(self, protocol: Protocol, space: Space) -> None:
        self._protocol = protocol
        self._space = space
        self._machines = _Numbered()
        self._batches = _Numbered()
        self._logs = _Numbered()
        # Each of these runs code of the product; what it gives for the same is the same.
        self._told = cache(self._told_anew)
        self._in_hand_of = cache(self._in_hand_anew)
        self._found = cache(self._found_anew)
        self._looked = cache(self._looked_anew)
        self._look_at_log = cache(self._look_at_log_anew)
        self._applied = cache(self._applied_anew)
        self._claimed_log = cache(self._claimed_log_anew)
        self._finishes_alone = cache(self._finishes_alone_anew)
        self._own_moves = cache(self._own_moves_anew)

    def explore(self) -> Explored:
        """Look at every state there is; in none of them is anything wrong.

        Raises:
            Violation: Something is.
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
                self._look_at(state)
                for name, after in self._moves(state):
                    moves.add(name)
                    if after not in came_from:
                        came_from[after] = (state, name)
                        waiting.append(after)
            except _Harm as harm:
                raise Violation(str(harm), _way(came_from, state)) from None
        return Explored(len(came_from), frozenset(moves))

    # ------------------------------------------------------------------------- what must hold

    def _look_at(self, state: State) -> None:
        self._look_at_log(state.log)
        for worker in state.workers:
            machine: Machine = self._machines[worker.machine]
            if machine.is_with_database != (worker.waiting is not Waiting.NOTHING):
                raise _Harm("a worker waits for what nobody does")
            self._finishes_alone(state.log, worker)

    def _look_at_log_anew(self, number: int) -> None:
        log: FakeLog = self._logs[number]
        for partition in self._space.partitions:
            end = log.places[partition].next_offset
            there, due = log.offsets(partition), self._space.below(partition, end)
            if there != due:
                raise _Harm(f"{partition} below {end} holds {there} and not {due}")

    def _look_at_outcome(self, state: State, outcome: Outcome, batch: Batch) -> None:
        """What a worker takes for committed is in the log, unless a restore took it away."""
        if state.restored:
            return
        log: FakeLog = self._logs[state.log]
        for partition, end in outcome.moved.items():
            if log.places[partition].next_offset < end:
                raise _Harm(f"a worker takes {partition} for committed up to {end}")
        if outcome.records and any(
            row.offset not in log.rows[Partition(row.topic, row.partition)] for row in batch.rows
        ):
            raise _Harm("a worker takes rows for written that are not")

    def _finishes_alone_anew(self, log: int, worker: Worker) -> None:
        """Left alone, with every connection cut once, a worker brings everything to its end."""
        if worker.waiting is not Waiting.NOTHING:
            worker = self._tell(worker, "failed")
        state = State(log, (worker, worker))
        for _ in range(ALONE_STEPS_MAX):
            machine: Machine = self._machines[state.workers[0].machine]
            ends = [place.next_offset for place in self._logs[state.log].places.values()]
            if set(ends) == {self._space.end} and machine.is_caught_up and not machine.behind:
                return
            state = self._alone(state)
        raise _Harm("a worker that is left alone never comes to the end")

    def _alone(self, state: State) -> State:
        worker = state.workers[0]
        if worker.waiting is Waiting.OUTCOME:
            return self._with(state, 0, self._find(state, worker))
        if worker.waiting is Waiting.COMMIT:
            batch = self._in_hand(worker)
            log, answer = self._applied(state.log, batch)
            return self._with(state._replace(log=log), 0, self._tell(worker, answer))
        stepped = self._step(state._replace(claims=0), 0)
        if stepped is not None:
            return stepped[1]._replace(flights=())
        machine: Machine = self._machines[worker.machine]
        for partition in self._space.partitions:
            if partition not in machine.owned:
                return self._claim(state, 0, partition)
        for partition in self._space.partitions:
            if (fetched := self._fetch(worker, partition)) is not None:
                return self._with(state, 0, fetched)
        looked = self._look(state, 0)
        if looked is not None:
            return looked
        for partition, held in machine.owned.items():
            if self._logs[state.log].places[partition].epoch > held:
                # The group gave it to the other worker, which is gone: so it comes back.
                return self._claim(state, 0, partition)
        raise _Harm("a worker that is left alone does nothing, and is not at the end")

    # ------------------------------------------------------------------------- what may happen

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
                # The server was down for it: nothing is on its way.
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
                yield f"{who} hears: {worker.waiting.name}", self._hear(state, who)
            case Waiting.OUTCOME if not self._waits_for_its_own(state, who):
                yield f"{who} finds out", self._with(state, who, self._find(state, worker))
            case Waiting.NOTHING if (looked := self._look(state, who)) is not None:
                yield f"{who} looks around", looked
            case _:
                pass
        if worker.waiting is not Waiting.NOTHING:
            cut = state._replace(flights=_given_up(state.flights, who))
            yield f"{who} is cut off", self._with(cut, who, self._tell(worker, "failed"))
        if state.deaths < self._space.deaths_max:
            yield f"{who} dies", self._die(state, who)

    def _own_moves_anew(self, worker: Worker) -> list[tuple[str, Worker]]:
        """What concerns nobody but the worker itself."""
        moves = []
        owned = self._machines[worker.machine].owned
        for partition in self._space.partitions:
            if (fetched := self._fetch(worker, partition)) is not None:
                moves.append((f"fetches {partition.number}", fetched))
            if partition in owned:
                let_go = self._tell(worker, "released", partition)
                moves.append((f"lets go {partition.number}", let_go))
        return moves

    def _claim(self, state: State, who: int, partition: Partition) -> State:
        log = self._claimed_log(state.log, partition)
        epoch, next_offset, _ = self._logs[log].places[partition]
        end = NextOffset(self._space.end)
        worker = self._tell(state.workers[who], "claimed", partition, epoch, next_offset, end)
        after = state._replace(log=log, claims=state.claims + 1)
        return self._with(after, who, worker)

    def _fetch(self, worker: Worker, partition: Partition) -> Worker | None:
        """The next record, or the end behind the last one."""
        machine: Machine = self._machines[worker.machine]
        first = machine.wants_from(partition)
        if first is None or first == self._space.end:
            return None
        following = [at for at in self._space.kafka[partition.number] if at >= first]
        if following:
            return self._tell(worker, "received", partition, (following[0],))
        return self._tell(worker, "reached_end", partition, NextOffset(self._space.end))

    def _step(self, state: State, who: int) -> Move | None:
        """What the machine wants done."""
        worker = state.workers[who]
        machine, step = self._told(worker.machine, "next_step", NOW)
        after = worker._replace(machine=machine)
        match step:
            case Write():
                if len(state.flights) == self._space.on_the_way_max:
                    return None
                flight = Flight(who, True, self._in_hand_of(machine))
                written = self._with(state, who, after._replace(waiting=Waiting.COMMIT))
                flights = tuple(sorted((*state.flights, flight)))
                return f"{who} sends a commit", written._replace(flights=flights)
            case Resolve():
                asked = after._replace(waiting=Waiting.OUTCOME)
                return f"{who} asks for the outcome", self._with(state, who, asked)
            case Reclaim(partition):
                if state.claims == self._space.claims_max:
                    return None
                return f"{who} claims again", self._claim(
                    self._with(state, who, after), who, partition
                )
            case None:
                return None
            case _:
                raise _Harm(f"nobody expects {step}")

    def _arrive(self, state: State, flight: Flight) -> Move:
        log, answer = self._applied(state.log, flight.batch)
        after = state._replace(log=log)
        if flight.awaited:
            waiting = Waiting.COMMITTED if answer == "committed" else Waiting.FENCED
            worker = state.workers[flight.sender]._replace(waiting=waiting)
            after = self._with(after, flight.sender, worker)
        return f"commit of {flight.sender} arrives: {answer}", after

    def _hear(self, state: State, who: int) -> State:
        worker = state.workers[who]
        if worker.waiting is Waiting.FENCED:
            return self._with(state, who, self._tell(worker, "fenced"))
        machine, outcome = self._told(worker.machine, "committed")
        self._look_at_outcome(state, outcome, self._batches[self._in_hand(worker)])
        return self._with(state, who, Worker(machine))

    def _find(self, state: State, worker: Worker) -> Worker:
        machine, outcome = self._found(worker.machine, state.log)
        self._look_at_outcome(state, outcome, self._batches[self._in_hand(worker)])
        return Worker(machine)

    def _look(self, state: State, who: int) -> State | None:
        """Where the worker's partitions stand, if that is any news."""
        worker = state.workers[who]
        looked = self._looked(worker.machine, state.log)
        return None if looked == worker.machine else self._with(state, who, Worker(looked))

    def _waits_for_its_own(self, state: State, who: int) -> bool:
        return self._protocol.waits and any(it.sender == who for it in state.flights)

    def _die(self, state: State, who: int) -> State:
        flights = tuple(
            sorted(
                Flight(GONE, False, it.batch) if it.sender == who else it for it in state.flights
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

    def _in_hand_anew(self, machine: int) -> int:
        return self._batches.number(self._machines[machine]._flight)

    def _in_hand(self, worker: Worker) -> int:
        return self._in_hand_of(worker.machine)

    def _tell(self, worker: Worker, what: str, *rest: Any) -> Worker:
        machine, _ = self._told(worker.machine, what, *rest)
        heard = what in ("committed", "fenced", "failed", "found")
        return Worker(machine, Waiting.NOTHING if heard else worker.waiting)

    def _told_anew(self, number: int, what: str, *rest: Any) -> tuple[int, Any]:
        """The state of a machine after it was told something, and what it said."""
        machine: Machine = copy.deepcopy(self._machines[number])
        said: Any
        match what:
            case "received":
                partition, offsets = rest
                machine.received(partition, [row_at(partition, at) for at in offsets])
                said = None
            case "released":
                said = machine.released(rest)
            case "fenced" | "failed":
                said = getattr(machine, what)(NOW)
            case "found" | "looked":
                said = getattr(machine, what)(dict(rest[0]), NOW)
            case _:
                said = getattr(machine, what)(*rest)
        # How often the database failed decides when to try again, and nothing else.
        machine._failures = min(machine._failures, 1)
        return self._machines.number(machine), said

    def _found_anew(self, number: int, log: int) -> tuple[int, Outcome]:
        batch: Batch = self._batches[self._in_hand_of(number)]
        places = self._logs[log].find(batch.advances)
        told: tuple[int, Outcome] = self._told(number, "found", tuple(places.items()))
        return told

    def _looked_anew(self, number: int, log: int) -> int:
        places = self._logs[log].find(self._machines[number].owned)
        return self._told(number, "looked", tuple(places.items()))[0]

    def _applied_anew(self, number: int, batch_number: int) -> tuple[int, str]:
        log: FakeLog = copy.deepcopy(self._logs[number])
        batch: Batch = self._batches[batch_number]
        try:
            log.append(batch.rows, batch.advances)
        except FencedError:
            return number, "fenced"
        except InvariantError as error:
            raise _Harm(f"what passed the guards was refused: {error}") from error
        return self._logs.number(log), "committed"

    def _claimed_log_anew(self, number: int, partition: Partition) -> int:
        log: FakeLog = copy.deepcopy(self._logs[number])
        log.claim(partition)
        return self._logs.number(log)


class _Numbered:
    """Things that change, by the number of their contents."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._things: list[Any] = []

    def number(self, thing: object) -> int:
        number = self._numbers.setdefault(_contents(thing), len(self._things))
        if number == len(self._things):
            self._things.append(thing)
        return number

    def __getitem__(self, number: int) -> Any:
        return self._things[number]


def _contents(thing: Any) -> Any:
    """Every field of a thing, whichever it has, so that two are one only where all is equal."""
    match thing:
        case EncodedRow():
            return thing.partition, thing.offset
        case Mapping():
            return tuple((_contents(key), _contents(value)) for key, value in thing.items())
        case tuple() | list():
            return tuple(map(_contents, thing))
        case set() | frozenset():
            return frozenset(map(_contents, thing))
        case _ if is_dataclass(thing):
            return tuple(_contents(getattr(thing, it.name)) for it in fields(thing))
        case _:
            return thing


def _given_up(flights: tuple[Flight, ...], who: int) -> tuple[Flight, ...]:
    given_up = (it._replace(awaited=False) if it.sender == who else it for it in flights)
    return tuple(sorted(given_up))


def _way(came_from: Mapping[State, tuple[State, str] | None], state: State) -> list[str]:
    way: list[str] = []
    while (step := came_from[state]) is not None:
        state, name = step
        way.append(name)
    return way[::-1]
