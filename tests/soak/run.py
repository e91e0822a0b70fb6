"""A soak from its beginning to its report: storms of faults, a calm after each, then the checks."""

import logging
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.sandbox.simulator import Keying
from tests.soak import judge as judging
from tests.soak.analyst import Analyst
from tests.soak.availability import Availability
from tests.soak.faults import Lane, lanes
from tests.soak.journal import Journal
from tests.soak.judge import Judgement
from tests.soak.world import PER_SECOND, World

STORM_SECONDS = 60.0
TELL_SECONDS = 10.0
AUDIT_SHARE_MAX = 0.1
"""Maximum share of the time for audits, which read the whole log."""


@dataclass
class Report:
    """The result of a soak.

    Attributes:
        back: Maximum time from the end of a storm until everything was logged and projected.
        cores: CPU that all processes of the soak have used, divided by its duration.
    """

    seed: int
    protocol: str = "?"
    keying: str = "?"
    seconds: float = 0.0
    events: int = 0
    storms: int = 0
    back: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    fault_seconds: Mapping[str, float] = field(default_factory=dict)
    missed: int = 0
    unavailable: float = 0.0
    away: float = 0.0
    longest: float = 0.0
    longest_at: float = 0.0
    stretches: int = 0
    looks: int = 0
    put_off: int = 0
    audits: int = 0
    compared: int = 0
    cores: float = 0.0
    judgement: Judgement = field(default_factory=Judgement)
    failures: list[str] = field(default_factory=list)

    @property
    def has_passed(self) -> bool:
        """Whether there is no failure."""
        return not self.failures

    def __str__(self) -> str:
        done = self.judgement
        lines = [
            ("seed", f"{self.seed}, group protocol {self.protocol}, keyed by {self.keying}"),
            ("minutes", f"{self.seconds / 60:.1f}, {self.storms} storms"),
            ("events", f"{self.events:,} at {PER_SECOND} per second"),
            ("log", f"{done.records:,} records as Kafka holds them and the producer sent them"),
            ("lost", f"{done.lost:,}"),
            ("double", f"{done.double:,}"),
            ("changed", f"{done.changed:,}"),
            ("read models", f"{done.tables} tables, {done.rows:,} rows"),
            ("differing rows", f"{done.differing:,} from the replay of the log"),
            ("", f"{done.differing_from_books:,} from the simulator's books"),
            ("dead letters", f"{done.dead_letters:,}, {done.repeats:,} repeats"),
            ("analyst", f"{self.looks:,} looks, {self.put_off:,} put off"),
            ("", f"{self.audits} audits of {self.compared:,} sums and balances"),
            (
                "unavailable",
                f"{self.unavailable:.1f} s in {self.stretches} stretches of 1 s or more",
            ),
            ("", f"{self.away:.1f} s of it while a server was kept unavailable or restarted"),
            ("", f"the longest {self.longest:.1f} s, at {self.longest_at:.0f} s"),
            ("back after storm", f"within {self.back:.1f} s"),
            ("CPU", f"{self.cores:.2f} cores, servers and workers and all"),
            ("faults", f"{self.faults.total()}, {self.missed} more had no target"),
        ]
        lines += [
            (f"{count:>8}", f"{kind}, {self.fault_seconds[kind]:.0f} s in all")
            for kind, count in sorted(self.faults.items())
        ]
        lines += [("failure", failure) for failure in self.failures]
        lines.append(("verdict", "PASSED" if self.has_passed else "FAILED"))
        return "\n".join(f"{name:<17} {value}" for name, value in lines)


def soak(seed: int, minutes: float, folder: Path, *, keying: Keying | None = None) -> Report:
    """Run everything at once under faults drawn from the seed, and check the result.

    Args:
        seed: Of the producer's events, the faults, the group's protocol and the topic's keying.
        minutes: Duration of records and faults; start and checks take one or two minutes more.
        folder: For the logs of the workers and the list of faults.
        keying: By what the records are partitioned; drawn from the seed if None.
    """
    report = Report(seed)
    journal = Journal(folder)
    used = _cpu_seconds()
    with _library_log(folder / "producer.log"), World.made(seed, journal, folder, keying) as world:
        report.protocol, report.keying = world.protocol, world.keying
        journal.began = time.monotonic()
        _print_progress(
            journal,
            f"seed {seed}, group protocol {world.protocol}, keyed by {world.keying}, "
            f"{minutes:g} minutes",
        )
        with (
            Availability(world.bench.database, world.ends, journal) as availability,
            Analyst(world.bench.database, journal) as analyst,
        ):
            try:
                _storms(world, analyst, availability, report, minutes * 60)
                _drain(world, analyst)
            except Exception as failure:  # noqa: BLE001 - whatever it is, it is in the report
                journal.fail(f"{type(failure).__name__}: {failure}")
        _take_down(report, journal, availability, analyst)
        _print_progress(journal, "judging")
        _judge(world, report)
    report.failures += [*journal.failures, *report.judgement.failures]
    report.cores = (_cpu_seconds() - used) / journal.now
    return report


def _storms(
    world: World, analyst: Analyst, availability: Availability, report: Report, seconds: float
) -> None:
    journal, all_lanes = world.journal, lanes(world, analyst)
    audited = 0.0
    with world.feed, _ProgressPrinter(world, availability):
        while journal.now < seconds and not journal.failed.is_set():
            _storm(all_lanes, min(STORM_SECONDS, seconds - journal.now), journal)
            report.storms += 1
            began = time.monotonic()
            world.wait_until_caught_up()
            report.back = max(report.back, time.monotonic() - began)
            if audited <= AUDIT_SHARE_MAX * journal.now:
                began = time.monotonic()
                analyst.audit()
                audited += time.monotonic() - began
        report.seconds = journal.now


def _storm(all_lanes: list[Lane], seconds: float, journal: Journal) -> None:
    for lane in all_lanes:
        lane.storm()
    journal.failed.wait(seconds)
    for lane in all_lanes:
        lane.calm()
    for lane in all_lanes:
        lane.join()


def _drain(world: World, analyst: Analyst) -> None:
    """All events have arrived: now every balance must be the sum of its entries."""
    try:
        world.wait_until_caught_up()
        analyst.audit()
        if breaks := analyst.breaks():
            world.journal.fail(f"{breaks} balances are not the sum of their entries")
    finally:
        for slot in world.slots.values():
            if slot.worker is not None:
                slot.stop()
            # The worker has ended: open sessions are those of the proxy, whose client was cut off.
            slot.proxy.cut()


def _take_down(
    report: Report, journal: Journal, availability: Availability, analyst: Analyst
) -> None:
    report.faults, report.fault_seconds = journal.counts, journal.seconds
    report.missed = journal.missed
    report.unavailable, report.away = availability.seconds, availability.away
    report.longest = availability.longest
    report.longest_at, report.stretches = availability.longest_at, availability.stretches
    report.looks, report.put_off = analyst.looks, analyst.put_off
    report.audits, report.compared = analyst.audits, analyst.compared


def _judge(world: World, report: Report) -> None:
    report.events = world.feed.books.events
    try:
        report.judgement = judging.judge(world.bench, world.feed, world.ledger)
    except Exception as failure:  # noqa: BLE001 - whatever it is, it is in the report
        report.failures.append(f"could not check the result: {type(failure).__name__}: {failure}")


class _ProgressPrinter:
    """Prints progress every ten seconds, and checks whether a process has ended unexpectedly."""

    def __init__(self, world: World, availability: Availability) -> None:
        self._world = world
        self._availability = availability
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="teller", daemon=True)

    def __enter__(self) -> "_ProgressPrinter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(TELL_SECONDS):
            self._world.look()
            journal, seen = self._world.journal, self._availability
            now = ", ".join(journal.running) or "calm"
            _print_progress(
                journal,
                f"{seen.logged:,} records, lag {seen.lag:,}, {journal.counts.total()} faults, "
                f"unavailable {seen.seconds:.1f} s; now: {now}",
            )


@contextmanager
def _library_log(path: Path) -> Iterator[None]:
    """Let the producer's client log to a file: it logs every outage of Kafka."""
    logger, handler = logging.getLogger("librdkafka"), logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)
        handler.close()


def _print_progress(journal: Journal, what: str) -> None:
    print(f"{journal.now:7.0f} s  {what}", file=sys.stderr, flush=True)


def _cpu_seconds() -> float:
    """CPU of this process and of all that have ended below it."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)
