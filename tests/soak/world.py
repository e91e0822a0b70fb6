"""The system of a soak: its own servers, workers that start and stop, a permanent producer."""

import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

from pipeline import catalogue
from pipeline.partitions import Partition
from pipeline.sandbox.servers.postgres import PostgresServer
from pipeline.sandbox.simulator import Chaos, Keying
from pipeline.schema.migrate import migrate
from tests import waiting
from tests.faults.harness import QUICK_TO_NOTICE, Bench, Worker
from tests.faults.ledger import Feed, LeanLedger
from tests.faults.proxy import Proxy
from tests.servers import KafkaServer
from tests.servers.databases import Database, fresh_database
from tests.soak.journal import BACK_SECONDS_MAX, Journal, patiently

TOPIC = "Notifications"
PARTITIONS = 6
PER_SECOND = 300
ROLES_IN_STORE = 4
SLOTS = ("one", "two", "guest")

SETTINGS = {
    "batch_rows": "200",
    # Shorter than the pause of a worker, longer than a busy machine delays a worker.
    "idle_in_transaction_timeout_ms": "6000",
}
# Maximum time that a restarted Kafka waits for dead members: 5 minutes by default.
CLASSIC = f"{QUICK_TO_NOTICE},max.poll.interval.ms=120000"
PROTOCOLS: dict[str, dict[str, str]] = {
    "cooperative": {"kafka_options": CLASSIC},
    "eager": {"kafka_options": f"{CLASSIC},partition.assignment.strategy=range"},
    "consumer": {"kafka_group_protocol": "consumer"},
}


class Slot:
    """Runs one worker at a time, with a proxy between it and PostgreSQL.

    A thread that does something to the worker holds ``turn``.
    """

    def __init__(self, world: "World", name: str, proxy: Proxy, *, is_static: bool) -> None:
        self.name = name
        self.proxy = proxy
        self.turn = threading.Lock()
        self.worker: Worker | None = None
        self._world = world
        self._is_static = is_static

    def start(self, *, fail: str | None = None) -> Worker:
        """Start a worker; its servers may be unavailable. ``fail`` arms a fail point."""
        assert self.worker is None, f"{self.name} has a worker"
        settings = {**SETTINGS, **PROTOCOLS[self._world.protocol]}
        if self._is_static:
            settings["group_instance_id"] = self.name
        self.worker = self._world.start("run", through=self.proxy.through, fail=fail, **settings)
        return self.worker

    def kill(self) -> None:
        """SIGKILL the worker at any step; a fail point may have done it already."""
        worker = self.worker
        assert worker is not None
        if worker.exit_code not in (None, -signal.SIGKILL):
            self.look()
            return
        self.worker = None
        worker.kill()
        self._world.see_off(worker)

    def stop(self) -> None:
        """SIGTERM the worker as soon as it has started; it must end with 0."""
        worker = self.worker
        assert worker is not None
        worker.wait_for_log("started", seconds_max=BACK_SECONDS_MAX)
        if worker.exit_code is not None:
            self.look()
            return
        self.worker = None
        code = worker.stop(seconds_max=BACK_SECONDS_MAX)
        if code != 0:
            self._world.journal.fail(f"SIGTERM, but exit code {code}\n{worker.tail()}")
        self._world.see_off(worker)

    def look(self) -> None:
        """Report a worker that has ended without a signal."""
        worker = self.worker
        if worker is not None and worker.exit_code is not None:
            self.worker = None
            self._world.journal.fail(f"ended by itself\n{worker.tail()}")


class World:
    """Everything that a soak runs.

    Attributes:
        protocol: How the workers' group divides the partitions, drawn from the seed.
        keying: By what the records are partitioned; by tenant, one partition of six has all.
    """

    def __init__(
        self,
        seed: int,
        journal: Journal,
        postgres: PostgresServer,
        kafka: KafkaServer,
        database: Database,
        folder: Path,
        keying: Keying | None,
    ) -> None:
        chance = random.Random(f"{seed} world")
        self.seed = seed
        self.journal = journal
        self.postgres = postgres
        self.kafka = kafka
        self.protocol = chance.choice(sorted(PROTOCOLS))
        # With a random generator of its own, so that older seeds give the same faults.
        self.keying = keying or random.Random(f"{seed} keying").choice(list(Keying))
        self.bench = Bench(kafka, database, TOPIC, PARTITIONS, folder)
        self.ledger = LeanLedger()
        self.feed: Feed = self.bench.feed(
            seed=seed,
            rate=PER_SECOND,
            chaos=Chaos(),
            keep_values=False,
            keep_books=True,
            into=self.ledger,
            keying=self.keying,
        )
        self.slots: dict[str, Slot] = {}
        self._chance = chance
        # The kernel ends a worker with the thread that started it, so this thread must stay alive.
        self._starter = ThreadPoolExecutor(1, "starter")

    @classmethod
    @contextmanager
    def made(
        cls, seed: int, journal: Journal, folder: Path, keying: Keying | None
    ) -> Iterator["World"]:
        """Servers, topic, database, proxies and two workers, for the length of the block."""
        with ExitStack() as kept:
            # The settings of durability are at their defaults, because the server is crashed.
            postgres = kept.enter_context(PostgresServer())
            kafka = kept.enter_context(KafkaServer())
            kafka.create_topic(TOPIC, PARTITIONS)
            database = kept.enter_context(fresh_database(postgres))
            migrate(database.url)
            world = cls(seed, journal, postgres, kafka, database, folder, keying)
            kept.callback(world._end)
            for name in SLOTS:
                proxy = kept.enter_context(Proxy.before(database.url))
                is_static = world._chance.random() < 0.3
                world.slots[name] = Slot(world, name, proxy, is_static=is_static)
            for name in SLOTS[:2]:
                world.slots[name].start()
            yield world

    def _end(self) -> None:
        """Start the servers, so that everything else can be removed."""
        self.postgres.start()
        self.bench.close()
        self._starter.shutdown()

    def start(self, *command: str, **options: Any) -> Worker:
        """Start a process of the program, also during an outage; see ``Bench.worker``."""

        def start() -> Worker:
            self._stock_roles()
            return self.bench.worker(*command, **options)

        return self._starter.submit(start).result()

    def _stock_roles(self) -> None:
        if self.bench.roles_in_store == 0:
            patiently(self.bench.prepare_role, "a role for a worker")
        while self.bench.roles_in_store < ROLES_IN_STORE:
            try:
                self.bench.prepare_role()
            except psycopg.OperationalError:
                return

    def see_off(self, worker: Worker) -> None:
        """Remove a worker that has ended, with all that it had started."""
        waiting.until(lambda: worker.is_gone, f"worker {worker.pid} left nothing", seconds_max=10)
        self.bench.workers.remove(worker)

    def look(self) -> None:
        """Report every process that has ended unexpectedly."""
        for slot in self.slots.values():
            # The thread that holds the turn checks the worker itself.
            if slot.turn.acquire(blocking=False):
                try:
                    slot.look()
                finally:
                    slot.turn.release()
        if self.feed.failure is not None:
            self.journal.fail(f"the producer ended: {self.feed.failure!r}")

    def ends(self) -> dict[Partition, int]:
        """The ends of Kafka's partitions, by the delivery reports so far."""
        return dict(self.ledger.ends)

    def wait_until_caught_up(self) -> None:
        """Wait until log and read models have all that Kafka has confirmed so far.

        Raises:
            AssertionError: It took too long.
        """
        ends = self.ends()

        def has_all() -> bool:
            self.look()
            if all(slot.worker is None for slot in self.slots.values()):
                raise AssertionError("no worker runs any more")
            with suppress(psycopg.OperationalError):
                stored = self.bench.next_offsets()
                seen = self.bench.checkpoints()
                return all(
                    stored.get(partition, 0) >= end for partition, end in ends.items()
                ) and all(
                    seen.get((model.name, partition), 0) >= end
                    for model in catalogue.load().models
                    for partition, end in ends.items()
                )
            return False

        try:
            waiting.until(
                has_all, "everything is logged and projected", seconds_max=BACK_SECONDS_MAX
            )
        except AssertionError as late:
            raise AssertionError(f"{late}; Kafka ends at {ends}\n{self.bench.tails()}") from None
