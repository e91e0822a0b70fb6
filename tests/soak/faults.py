"""The faults of a soak: parallel lanes, each with one fault after another.

Everything is drawn from the seed, lane by lane: which faults, when, how long, on what. Faults of
different lanes overlap at random. All lanes run during a storm; between storms the system must
recover by itself.
"""

import json
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import psycopg
from psycopg.sql import SQL

from pipeline import catalogue
from pipeline.errors import ExitCode
from pipeline.readmodel import Projector
from tests import waiting
from tests.faults.harness import Worker
from tests.faults.proxy import CAN_DROP, Loss
from tests.given import full
from tests.soak.analyst import Analyst
from tests.soak.journal import BACK_SECONDS_MAX, Journal, MissedError, patiently
from tests.soak.world import Slot, World

LOCK_ATTEMPTS_MAX = 10
REBUILDS_MAX = 20
"""Maximum attempts of a rebuild whose server was unavailable or whose predecessor still ends."""
REBUILD_RETRY_SECONDS = 1.0
STEP_SECONDS_MAX = 40.0
"""Maximum time until a worker reaches its fail point; other faults may prevent it."""
STEPS = ("after_poll", "after_begin", "after_fence", "mid_copy", "after_copy", "before_commit")
MORE_STEPS = (
    *("after_commit_before_ack", "after_commit", "after_kafka_commit", "after_projection"),
    *("in_on_assign", "in_on_revoke"),
)
LOSS_SECONDS_MAX = 10.0
"""Maximum wait for a COMMIT that is to be lost; its worker may have nothing to commit."""


class Kind(NamedTuple):
    """A kind of fault: its weight within its lane, and its function."""

    name: str
    weight: int
    inflict: Callable[["Lane"], None]


class Lane:
    """One fault after another, in a thread of its own.

    Args:
        name: Seeds the lane's random generator, with the seed.
        kinds: The faults it draws from.
        rest: Minimum and maximum time between two faults, in seconds.
        slot: The slot of the worker that the faults are for, if any.
    """

    def __init__(
        self,
        name: str,
        kinds: list[Kind],
        rest: tuple[float, float],
        *,
        world: World,
        analyst: Analyst,
        slot: Slot | None = None,
    ) -> None:
        self.world = world
        self.analyst = analyst
        self.chance = random.Random(f"{world.seed} {name}")
        self._kinds = kinds
        self._rest = rest
        self._slot = slot
        self._calm = threading.Event()
        self._calm.set()
        self._thread: threading.Thread | None = None
        self._name = name

    @property
    def journal(self) -> Journal:
        """Where every fault is recorded."""
        return self.world.journal

    @property
    def slot(self) -> Slot:
        """The worker's slot."""
        assert self._slot is not None
        return self._slot

    def storm(self) -> None:
        """Begin or resume the faults."""
        self._calm.clear()
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def calm(self) -> None:
        """Begin no other fault."""
        self._calm.set()

    def join(self) -> None:
        """Wait until the fault in hand is over."""
        if self._thread is not None:
            self._thread.join()

    def last(self, low: float, high: float) -> None:
        """Let a fault last for a random time between two numbers of seconds."""
        self.journal.failed.wait(self.chance.uniform(low, high))

    def _run(self) -> None:
        try:
            while not self._calm.wait(self.chance.uniform(*self._rest)):
                if self.journal.failed.is_set():
                    return
                weights = [kind.weight for kind in self._kinds]
                [kind] = self.chance.choices(self._kinds, weights)
                with self.journal.fault(kind.name):
                    kind.inflict(self)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the soak has failed by it
            self.journal.fail(f"{type(failure).__name__}: {failure}")


# ------------------------------------------------------------------------------------- the workers


def _kill(lane: Lane) -> None:
    with lane.slot.turn:
        lane.slot.kill()
        lane.last(0, 2)
        lane.slot.start()


def _restart(lane: Lane) -> None:
    with lane.slot.turn:
        lane.slot.stop()
        lane.last(0, 3)
        lane.slot.start()


def _doze(lane: Lane) -> None:
    _pause(lane, 0.2, 1.5)


def _oversleep(lane: Lane) -> None:
    # Longer than the session of either protocol; half of them also longer than PostgreSQL allows.
    _pause(lane, 7, 15)


def _pause(lane: Lane, low: float, high: float) -> None:
    with lane.slot.turn:
        worker = lane.slot.worker
        assert worker is not None
        if worker.exit_code is not None:
            lane.slot.look()
            raise MissedError
        worker.pause()
        try:
            lane.last(low, high)
        finally:
            worker.resume()


def _freeze(lane: Lane) -> None:
    """It is stopped during a batch, and resumes when another worker has its partitions."""
    with lane.slot.turn:
        worker = _armed(lane, lane.chance.choice(STEPS), "stop")
        try:
            worker.wait_until_stopped(seconds_max=STEP_SECONDS_MAX)
        except AssertionError:
            _disarm(lane)
        lane.last(7, 15)
        worker.resume()


def _die_in_a_batch(lane: Lane) -> None:
    with lane.slot.turn:
        worker = _armed(lane, lane.chance.choice([*STEPS, *MORE_STEPS]), "kill")
        try:
            worker.wait(seconds_max=STEP_SECONDS_MAX)
        except AssertionError:
            _disarm(lane)
        lane.slot.kill()
        lane.slot.start()


def _cut_in_a_batch(lane: Lane) -> None:
    """Its own end of the connection is closed during a batch; it must continue by itself."""
    with lane.slot.turn:
        _armed(lane, lane.chance.choice(STEPS[1:]), "disconnect")


def _armed(lane: Lane, step: str, action: str) -> Worker:
    lane.slot.kill()
    passing = 1 if step.startswith("in_on") else lane.chance.randint(2, 20)
    return lane.slot.start(fail=f"{step}@{passing}:{action}")


def _disarm(lane: Lane) -> None:
    """The worker did not reach its fail point in time; it must not reach it later."""
    lane.slot.kill()
    lane.slot.start()
    raise MissedError


def _visit(lane: Lane) -> None:
    """A third worker starts and stops: two rebalances."""
    with lane.slot.turn:
        lane.slot.start()
        lane.last(3, 12)
        leave = lane.slot.kill if lane.chance.random() < 0.3 else lane.slot.stop
        leave()


WORKER = [
    Kind("worker killed (SIGKILL)", 4, _kill),
    Kind("worker stopped and started (SIGTERM)", 3, _restart),
    Kind("worker paused for a moment (SIGSTOP)", 2, _doze),
    Kind("worker paused past its session (SIGSTOP)", 2, _oversleep),
    Kind("worker paused in the middle of a batch", 4, _freeze),
    Kind("worker killed in the middle of a batch", 3, _die_in_a_batch),
    Kind("worker started, and cut off in the middle of a batch", 1, _cut_in_a_batch),
]
GUEST = [Kind("worker more comes and goes", 1, _visit)]


# -------------------------------------------------------------------------------------- PostgreSQL


def _crash_postgres(lane: Lane) -> None:
    lane.world.postgres.restart("immediate")


def _take_postgres_away(lane: Lane) -> None:
    lane.world.postgres.stop("immediate")
    try:
        lane.last(1, 8)
    finally:
        lane.world.postgres.start()


def _restart_postgres(lane: Lane) -> None:
    lane.world.postgres.restart()


def _end_sessions(lane: Lane) -> None:
    ended = 0
    for _ in range(lane.chance.randint(1, 4)):
        ended += lane.world.bench.end_sessions()
        lane.last(0.1, 1)
    if not ended:
        raise MissedError


POSTGRES = [
    Kind("PostgreSQL crashed and restarted", 3, _crash_postgres),
    Kind("PostgreSQL crashed and away for seconds", 2, _take_postgres_away),
    Kind("PostgreSQL restarted in order", 1, _restart_postgres),
    Kind("PostgreSQL ended all sessions", 3, _end_sessions),
]


# ------------------------------------------------------------------------------------- the network


def _some_slot(lane: Lane) -> Slot:
    slots = [slot for slot in lane.world.slots.values() if slot.worker is not None]
    if not slots:
        raise MissedError
    return lane.chance.choice(slots)


def _cut(lane: Lane) -> None:
    if not _some_slot(lane).proxy.cut():
        raise MissedError


def _lose_request(lane: Lane) -> None:
    _lose(lane, Loss.REQUEST)


def _lose_answer(lane: Lane) -> None:
    _lose(lane, Loss.ANSWER)


def _lose_client(lane: Lane) -> None:
    _lose(lane, Loss.CLIENT)


def _lose(lane: Lane, loss: Loss) -> None:
    proxy = _some_slot(lane).proxy
    proxy.lose(loss)
    with suppress(AssertionError):
        waiting.until(
            lambda: not proxy.is_to_lose, "a COMMIT is lost", seconds_max=LOSS_SECONDS_MAX
        )
    if proxy.is_to_lose:
        proxy.forgive()
        raise MissedError


def _black_hole(lane: Lane) -> None:
    proxy = _some_slot(lane).proxy
    proxy.black_hole(for_newcomers=True)
    try:
        lane.last(3, 15)
    finally:
        proxy.restore()


NETWORK = [
    Kind("connections to PostgreSQL cut", 2, _cut),
    Kind("COMMIT lost on its way", 2, _lose_request),
    Kind("COMMIT's answer lost", 3, _lose_answer),
    Kind("COMMIT sent by a client that is cut off", 2, _lose_client),
    *([Kind("network silent for seconds", 1, _black_hole)] if CAN_DROP else []),
]


# ------------------------------------------------------------------------------------------- Kafka


def _restart_kafka(lane: Lane) -> None:
    lane.world.kafka.stop()
    try:
        lane.last(0, 6)
    finally:
        lane.world.kafka.start()


def _kill_kafka(lane: Lane) -> None:
    lane.world.kafka.kill()
    try:
        lane.last(0, 6)
    finally:
        lane.world.kafka.start()


def _pause_kafka(lane: Lane) -> None:
    lane.world.kafka.pause()
    try:
        lane.last(1, 12)
    finally:
        lane.world.kafka.resume()


KAFKA = [
    Kind("Kafka stopped and started", 1, _restart_kafka),
    Kind("Kafka killed and started", 1, _kill_kafka),
    Kind("Kafka paused (SIGSTOP)", 1, _pause_kafka),
]


# --------------------------------------------------------------------------------- the read models


def _truncate(lane: Lane) -> None:
    projector = _any_projector(lane)
    table = lane.chance.choice([table.name for table in projector.tables])
    emptied = SQL(f"TRUNCATE {full(table)}")
    with lane.analyst.announced(projector.name):

        def truncate() -> None:
            with lane.world.bench.database.connect() as db:
                db.execute("SET lock_timeout = '3s'")
                db.execute(emptied)

        _retry_lock(truncate)


def _rebuild(lane: Lane) -> None:
    _rebuild_to_the_end(lane, _any_projector(lane))


def _rebuild_killed(lane: Lane) -> None:
    projector = _any_projector(lane)
    failpoint = lane.chance.choice(["mid_rebuild", "mid_rebuild@2", "before_swap", "after_swap"])
    dying = _rebuild_of(lane, projector, fail=f"{failpoint}:kill")
    code = dying.wait(seconds_max=BACK_SECONDS_MAX)
    lane.world.see_off(dying)
    if code not in (-signal.SIGKILL, 0, ExitCode.UNAVAILABLE):
        lane.journal.fail(f"a rebuild that was to die ended with {code}\n{dying.tail()}")
    _rebuild_to_the_end(lane, projector)
    if code != -signal.SIGKILL:  # PostgreSQL died first, or there was too little to compute
        raise MissedError


def _rebuild_to_the_end(lane: Lane, projector: Projector) -> None:
    """Repeat it until it is complete; it must find no difference."""
    for _ in range(REBUILDS_MAX):
        running = _rebuild_of(lane, projector)
        code = running.wait(seconds_max=BACK_SECONDS_MAX)
        lane.world.see_off(running)
        if code == 0:
            [found] = json.loads(running.output.read_text())
            if found["differing"] and not found["lag"]:
                lane.journal.fail(f"a rebuild has found {found}")
            return
        # Its server was unavailable, or the session of its predecessor still runs.
        if code not in (ExitCode.UNAVAILABLE, ExitCode.FENCED):
            lane.journal.fail(f"a rebuild ended with {code}\n{running.tail()}")
            return
        time.sleep(REBUILD_RETRY_SECONDS)
    lane.journal.fail(f"{projector.name} was not rebuilt in {REBUILDS_MAX} attempts")


def _rebuild_of(lane: Lane, projector: Projector, *, fail: str | None = None) -> Worker:
    """As the owner of the tables, past the proxies."""
    url = lane.world.bench.database.url
    return lane.world.start("rebuild", projector.name, "--json", fail=fail, through=lambda _: url)


def _lock(lane: Lane) -> None:
    table = lane.chance.choice([table.name for table in _any_projector(lane).tables])
    mode = lane.chance.choice(["ACCESS EXCLUSIVE", "SHARE ROW EXCLUSIVE", "SHARE"])
    lock = SQL(f"LOCK TABLE {full(table)} IN {mode} MODE")

    def hold() -> None:
        with lane.world.bench.database.connect(autocommit=False) as db:
            db.execute("SET LOCAL lock_timeout = '3s'")
            db.execute(lock)
            lane.last(1, 6)

    _retry_lock(hold)


def _analyse_long(lane: Lane) -> None:
    """A transaction that keeps its snapshot; what it reads must not change."""
    table = lane.chance.choice([table.name for table in _any_projector(lane).tables])
    count = SQL(
        "SELECT count(*), (SELECT count(*) FROM upvest.orders), "
        f"(SELECT sum(next_offset) FROM pipeline.consumer_offsets) FROM {full(table)}"
    )
    try:
        with lane.world.bench.database.connect(autocommit=False) as db:
            db.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            db.execute("SET LOCAL lock_timeout = '3s'")
            first = db.execute(count).fetchone()
            lane.last(5, 20)
            if db.execute(count).fetchone() != first:
                lane.journal.fail(f"a snapshot has changed: {table} was {first}")
    except psycopg.OperationalError:
        raise MissedError from None


def _any_projector(lane: Lane) -> Projector:
    return lane.chance.choice(sorted(catalogue.load().models, key=lambda model: model.name))


def _retry_lock(work: Callable[[], None]) -> None:
    """Do something that waits for a lock, a few times."""
    for _ in range(LOCK_ATTEMPTS_MAX):
        try:
            patiently(work, "PostgreSQL is there")
        except psycopg.errors.LockNotAvailable:
            continue
        return
    raise MissedError


READ_MODELS = [
    Kind("read model truncated", 4, _truncate),
    Kind("read model rebuilt", 3, _rebuild),
    Kind("read model's rebuild killed, and again", 2, _rebuild_killed),
    Kind("read model locked by somebody else", 2, _lock),
    Kind("analyst's long transaction", 1, _analyse_long),
]


def lanes(world: World, analyst: Analyst) -> list[Lane]:
    """All lanes, not yet started."""
    slots = world.slots
    made: list[tuple[str, list[Kind], tuple[float, float], Slot | None]] = [
        ("worker one", WORKER, (2, 14), slots["one"]),
        ("worker two", WORKER, (2, 14), slots["two"]),
        ("guest", GUEST, (4, 20), slots["guest"]),
        ("PostgreSQL", POSTGRES, (5, 20), None),
        ("network", NETWORK, (2, 10), None),
        ("Kafka", KAFKA, (15, 60), None),
        ("read models", READ_MODELS, (1, 8), None),
    ]
    return [
        Lane(name, kinds, rest, world=world, analyst=analyst, slot=slot)
        for name, kinds, rest, slot in made
    ]
