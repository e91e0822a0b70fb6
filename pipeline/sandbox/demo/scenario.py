"""What the demo does, step by step, and the checks at its end."""

import time
from collections.abc import Callable, Iterable
from itertools import islice

from pipeline import catalogue, log_events
from pipeline.errors import ExitCode, PipelineError
from pipeline.health.status import read_status
from pipeline.rebuild.rebuild import rebuild
from pipeline.sandbox.demo import queries
from pipeline.sandbox.demo.environment import PARTITIONS, TOPIC, DemoError, Environment, Worker
from pipeline.sandbox.demo.load import Feed, Ledger
from pipeline.sandbox.demo.proof import Proof
from pipeline.sandbox.demo.screen import Screen
from pipeline.sandbox.simulator import Chaos, Record, Simulation
from pipeline.schema.migrate import migrate

DEFAULT_SEED = 7
DEFAULT_EVENTS = 24_000

DAY_RATE = 2_500.0
"""Records per second in normal operation."""
FAULT_RATE = 1_000.0
"""Records per second during faults, which then last long enough to be seen."""
WAIT_S_MAX = 120.0
"""Maximum wait for a condition; the machine may be busy."""
LOOK_S = 0.1
TYPES_SHOWN = 12


def run_demo(
    seed: int = DEFAULT_SEED, events: int = DEFAULT_EVENTS, *, stay: bool | None = None
) -> ExitCode:
    """Show everything on servers of its own, and check every claim.

    Args:
        seed: The same seed and number give the same records.
        events: How many events the simulated broker sends; chaos adds to them.
        stay: Keep the servers until Ctrl-C; None does so on a terminal only.

    Returns:
        DONE, or FOUND if a check failed.

    Raises:
        ConfigurationError: There is no PostgreSQL on this machine, or a server did not start.
        PipelineError: A server or a worker failed.
        KeyboardInterrupt: Ctrl-C before the end. Nothing is left on the machine.
    """
    log_events.configure("auto", "error")
    screen = Screen()
    try:
        with Environment() as environment:
            scenario = _Scenario(screen, environment, seed, events)
            try:
                scenario.run()
                if screen.is_terminal if stay is None else stay:
                    scenario.stay()
            except PipelineError:
                scenario.show_folder_of_logs()
                raise
            return ExitCode.DONE if scenario.proof.holds else ExitCode.FOUND
    except KeyboardInterrupt:
        screen.section("Stopped. Servers, workers and their folder are removed.")
        raise


class _Stopwatch:
    """Seconds since its start, for people."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()

    def __str__(self) -> str:
        return f"{time.monotonic() - self._started_at:.1f} s"


class _Scenario:
    def __init__(self, screen: Screen, environment: Environment, seed: int, events: int) -> None:
        self._screen = screen
        self._environment = environment
        self._clock = _Stopwatch()
        self._seed = seed
        self._later_events = events // 3
        self._day_events = events - self._later_events
        self._day = _simulation(seed, self._day_events)
        # Of another seed, so that its customers and their entities are new.
        self._later = _simulation(f"{seed} later", self._later_events)
        self._ledger = Ledger()
        self.proof = Proof()

    def run(self) -> None:
        """All steps, in order."""
        self._screen.title(
            "Upvest's events, exactly once, in PostgreSQL",
            "Broker and Kafka are simulated, the rest is real. Ctrl-C removes everything.",
        )
        self._start()
        self._live()
        self._screen.section("3  The data now")
        self._show_events()
        self._show_read_models()
        self._show_bad_records()
        self._show_freshness()
        self._screen.section("4  Faults, on purpose, while more events arrive")
        self._truncate_and_rebuild()
        self._kill()
        self._screen.section("5  All data compared")
        with self._screen.waiting("comparing"):
            self.proof.compare(self._engine, self._ledger, [self._day, self._later])
        self._sum_up()

    # ---------------------------------------------------------------------------------- the servers

    def _start(self) -> None:
        screen, environment = self._screen, self._environment
        screen.section("1  Servers and workers")
        took = _Stopwatch()
        postgres = environment.start_postgres()
        screen.fact(f"PostgreSQL {postgres.version}", f"127.0.0.1:{postgres.port}", str(took))
        took = _Stopwatch()
        broker = environment.start_broker()
        screen.fact("Kafka (a mock)", broker.bootstrap_servers, str(took))
        took = _Stopwatch()
        with screen.waiting("migrating"):
            applied = migrate(postgres.url()).applied
        screen.fact("pipeline migrate", f"{len(applied)} migrations", str(took))
        self._engine = environment.open_engine()
        self._start_workers()
        screen.say("To query it meanwhile:")
        screen.copyable(f"{environment.psql} {postgres.dsn()}")

    def _start_workers(self) -> None:
        took = _Stopwatch()
        self._workers = [self._environment.start_worker() for _ in range(2)]

        def shares() -> list[int]:
            owned = queries.owners(self._engine)
            return [len(owned.get(worker.pid, ())) for worker in self._workers]

        with self._screen.waiting("two workers start"):
            self._until(
                lambda: all(shares()) and sum(shares()) == PARTITIONS,
                "two workers share the partitions",
            )
        share = " and ".join(map(str, shares()))
        self._screen.fact("pipeline run", f"2 workers read {share} partitions", str(took))

    # --------------------------------------------------------------------------------- a whole day

    def _live(self) -> None:
        screen, events = self._screen, self._day_events
        screen.section(f"2  A day at a broker: {events:,} events, chaos added, seed {self._seed}")
        took = _Stopwatch()
        with screen.progress(round(events * _SHARE_WITH_CHAOS)) as bars:

            def arrived(feed: Feed) -> bool:
                counts = self._counts()
                bars.show(counts)
                return feed.is_done and len(set(counts.values())) == 1

            with self._feed(self._day, DAY_RATE) as feed:
                self._until(lambda: arrived(feed), "the read models have all events")
        for name, count in self._counts().items():
            screen.fact(name, count)
        screen.say(f"{took} from the first record to the last row.")

    def _counts(self) -> dict[str, int]:
        now = queries.standing(self._engine, [model.name for model in catalogue.load().models])
        return {
            "records produced": len(self._ledger),
            "in the log": now.logged,
            "in the read models": now.projected,
        }

    # ------------------------------------------------------------------------------------ the data

    def _show_events(self) -> None:
        types = queries.rows(self._engine, queries.EVENTS_BY_TYPE)
        shown, rest = types[:TYPES_SHOWN], types[TYPES_SHOWN:]
        self._screen.caption("Events by type")
        half = (len(shown) + 1) // 2
        right = [(row.event_type, row.events) for row in shown[half:]] + [("", None)]
        self._screen.table(
            ["type", "events", "type ", "events "],
            [(row.event_type, row.events, *right[n]) for n, row in enumerate(shown[:half])],
        )
        if rest:
            self._screen.say(f"and {sum(row.events for row in rest):,} of {len(rest)} more types")

    def _show_read_models(self) -> None:
        screen = self._screen
        screen.caption("Orders by status")
        screen.table(
            ["status", "orders", "executions", "filled, EUR"],
            map(tuple, queries.rows(self._engine, queries.ORDERS_BY_STATUS)),
        )
        screen.caption("Most held instruments")
        screen.table(
            ["instrument", "isin", "accounts", "units"],
            map(tuple, queries.rows(self._engine, queries.TOP_HOLDINGS)),
        )
        screen.caption("Cash: the last reported balances, and the sums of all entries")
        screen.table(
            ["currency", "balances", "entries", "balances sum to", "entries sum to", "breaks"],
            map(tuple, queries.rows(self._engine, queries.CASH)),
        )
        cash = queries.compare_cash(self._engine, [self._day.books])
        screen.say(
            f"The simulator's books agree to the cent: {cash.balances:,} balances compared, "
            f"{cash.differing:,} differ."
        )

    def _show_bad_records(self) -> None:
        screen = self._screen
        screen.caption(
            "Bad records: rows with the reason, and with their bytes if they are not JSON"
        )
        screen.table(
            ["problem", "rows", "bytes kept"],
            map(tuple, queries.rows(self._engine, queries.PROBLEMS)),
        )
        screen.caption("Events with a bad amount: dead letters of their read model")
        screen.table(
            ["read model", "column", "sqlstate", "events"],
            map(tuple, queries.rows(self._engine, queries.DEAD_LETTERS)),
        )
        screen.say("")
        repeats = queries.number(self._engine, queries.REPEATS)
        screen.say(f"Repeats recognized, without effect: {repeats:,}.")

    def _show_freshness(self) -> None:
        screen = self._screen
        now = read_status(self._engine, catalogue.load())
        median, most = queries.delay_ms(self._engine)
        screen.caption("Freshness")
        screen.fact("ingest lag", now.lag, f"records, in {len(now.partitions)} partitions")
        lag = max(projector.lag for projector in now.projectors)
        screen.fact("projection lag", lag, f"records, in {len(now.projectors)} models")
        screen.fact("ms from Kafka to log", median, f"median; {most:,} ms for 99 of 100")

    # -------------------------------------------------------------------------------------- faults

    def _truncate_and_rebuild(self) -> None:
        records = islice(self._later, self._later_events // 2)
        with self._feed(records, FAULT_RATE) as feed:
            self._until_produced(self._later_events // 8)
            self._truncate()
            self._rebuild()
            with self._screen.waiting("producing the rest"):
                self._until(lambda: feed.is_done, "the broker has everything")

    def _truncate(self) -> None:
        screen = self._screen
        screen.caption("TRUNCATE upvest.orders")
        took = _Stopwatch()
        cut = queries.truncate_orders(self._engine)
        with screen.waiting("orders is filled again"):
            self._until(
                lambda: queries.orders_reach(self._engine, cut.log_ends), "orders is complete again"
            )
        repaired_in = str(took)
        repaired = queries.number(self._engine, queries.COUNT_ORDERS)
        more = queries.logged(self._engine) - cut.logged
        screen.fact("rows before", cut.before)
        screen.fact("rows right after", cut.after)
        screen.fact("rows repaired", repaired, f"in {repaired_in}, while {more:,} records arrived")
        self.proof.found(
            "after TRUNCATE",
            repaired,
            f"rows of orders, repaired in {repaired_in}",
            ok=cut.after == 0 and repaired >= cut.before > 0,
        )

    def _rebuild(self) -> None:
        screen = self._screen
        screen.caption("Rebuild of orders from the log, beside the live table")
        took = _Stopwatch()
        orders = catalogue.load().by_name["orders"]
        with screen.waiting("rebuilding"):
            rebuilt = rebuild(self._engine, orders)
        screen.fact("rows built from the log", rebuilt.rows, f"in {took}")
        screen.fact("rows that differed", rebuilt.differing)
        self.proof.found(
            "after rebuild",
            rebuilt.rows,
            f"rows of orders, {rebuilt.differing:,} differed",
            ok=not rebuilt.differing,
        )

    def _kill(self) -> None:
        screen = self._screen
        screen.caption("kill -9 of a worker that is writing")
        with (
            self._feed(self._later, FAULT_RATE) as feed,
            screen.waiting("the other worker takes over"),
        ):
            self._until_produced(self._later_events // 8)
            owned = queries.owners(self._engine)
            victim = max(self._workers, key=lambda worker: len(owned.get(worker.pid, ())))
            [successor] = [worker for worker in self._workers if worker is not victim]
            in_flight = len(self._ledger) - queries.logged(self._engine)
            victim.kill()
            took = _Stopwatch()
            self._until(lambda: self._owns_all(successor), f"{successor.name} has taken over")
            taken_over_in = str(took)
            self._until(lambda: feed.is_done, "the broker has everything")
            self._until(lambda: len(set(self._counts().values())) == 1, "all is in the read models")
        lost = ", ".join(map(str, owned[victim.pid]))
        screen.fact("killed", f"{victim.name}, reading partitions {lost}")
        screen.fact("not in the log yet", in_flight, "records that Kafka had at that moment")
        read = f"{successor.name} reads all {PARTITIONS} partitions"
        screen.fact("taken over", read, f"{taken_over_in}; Kafka waits 6 s")
        self.proof.found(
            "after kill -9",
            len(queries.owners(self._engine)[successor.pid]),
            f"partitions, taken over in {taken_over_in}",
            ok=self._owns_all(successor),
        )

    def _owns_all(self, worker: Worker) -> bool:
        return len(queries.owners(self._engine).get(worker.pid, ())) == PARTITIONS

    # ---------------------------------------------------------------------------------- afterwards

    def _sum_up(self) -> None:
        checks, failed = self.proof.checks, len(self.proof.failed)
        for check in checks:
            self._screen.fact(check.name, check.value, check.remark, ok=check.ok)
        if failed:
            self.show_folder_of_logs()
        self._screen.verdict(
            f"{failed} of {len(checks)} checks FAILED, in {self._clock}."
            if failed
            else f"All {len(checks)} checks hold. It took {self._clock}.",
            ok=not failed,
        )

    def stay(self) -> None:
        """Keep everything until Ctrl-C, and show what to try."""
        screen, environment = self._screen, self._environment
        screen.section("Everything keeps running until Ctrl-C. In another terminal:")
        screen.copyable(f"{environment.psql} {environment.postgres.dsn()}")
        screen.copyable("    select * from upvest.holdings limit 5;")
        screen.copyable("    select * from upvest.order_book order by created_at desc limit 5;")
        screen.copyable(f"source {environment.write_environment()}   # then:")
        for command in _TO_TRY:
            screen.copyable(f"    {command}")
        try:
            while True:
                environment.check()
                time.sleep(1.0)
        except KeyboardInterrupt:
            screen.section("Stopping.")

    def show_folder_of_logs(self) -> None:
        """After a failure: the folder of the logs, which stays."""
        if folder := self._environment.keep_logs():
            self._screen.say(f"The logs of the workers and of PostgreSQL: {folder}")

    # -------------------------------------------------------------------------------------- waiting

    def _feed(self, records: Iterable[Record], rate: float) -> Feed:
        return Feed(
            self._environment.broker.bootstrap_servers,
            records,
            self._ledger,
            rate=rate,
            logged=lambda: queries.logged(self._engine),
        )

    def _until_produced(self, more: int) -> None:
        goal = len(self._ledger) + more
        self._until(lambda: len(self._ledger) >= goal, "the broker has more records")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, while every server and worker runs."""
        deadline = time.monotonic() + WAIT_S_MAX
        while not condition():
            self._environment.check()
            if time.monotonic() > deadline:
                raise DemoError(f"waited {WAIT_S_MAX:.0f} s, but not: {what}")
            time.sleep(LOOK_S)


_CHAOS = Chaos()
_SHARE_WITH_CHAOS = (
    1 + _CHAOS.repeats + _CHAOS.unknown_types + _CHAOS.malformed + _CHAOS.bad_amounts
)
_TO_TRY = (
    "pipeline status",
    "pipeline simulate --rate 200 --chaos --seed 8",
    "pipeline dead-letters list",
    "pipeline rebuild orders --check",
)


def _simulation(seed: int | str, events: int) -> Simulation:
    return Simulation(seed=seed, events=events, topic=TOPIC, partitions=PARTITIONS, chaos=_CHAOS)
