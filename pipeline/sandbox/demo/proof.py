"""The checks at the end of the demo: every claim is compared with an independent source."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import Engine

from pipeline import catalogue
from pipeline.health.status import read_status
from pipeline.rebuild.rebuild import check
from pipeline.sandbox.demo import queries
from pipeline.sandbox.demo.load import Ledger
from pipeline.sandbox.simulator import Books, Simulation
from pipeline.sandbox.simulator.chaos import ChaosReport


class Check(NamedTuple):
    """A line of the summary: a number that was queried, and whether it is the right one."""

    name: str
    value: int
    remark: str
    ok: bool


class Proof:
    """The checks so far, in order."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    @property
    def failed(self) -> Sequence[Check]:
        """The checks that did not hold."""
        return [check for check in self.checks if not check.ok]

    @property
    def holds(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    def found(self, name: str, value: int, remark: str, *, ok: bool) -> None:
        """Add a check."""
        self.checks.append(Check(name, value, remark, ok))

    def compare(self, engine: Engine, ledger: Ledger, simulations: Sequence[Simulation]) -> None:
        """Compare all data, when every produced record is in the read models."""
        books = [simulation.books for simulation in simulations]
        self._compare_log(engine, ledger)
        self._compare_with_books(engine, books)
        self._replay(engine)
        self._compare_oddities(engine, [simulation.report for simulation in simulations])

    def _compare_log(self, engine: Engine, ledger: Ledger) -> None:
        sent = ledger.compare(queries.digests(engine))
        self.found(
            "in the log",
            sent.compared,
            f"records: {sent.missing:,} missing, {sent.extra:,} extra, {sent.changed:,} changed",
            ok=not sent.differing,
        )

    def _compare_with_books(self, engine: Engine, books: Sequence[Books]) -> None:
        tables, compared, differing = queries.compare_books(engine, books)
        self.found(
            f"in {tables} tables",
            compared,
            f"rows as in the books: {differing:,} differ",
            ok=not differing,
        )
        cash = queries.compare_cash(engine, books)
        self.found(
            "cash balances",
            cash.balances,
            f"as in the books, to the cent: {cash.differing:,} differ",
            ok=not cash.differing,
        )
        sums = queries.rows(engine, queries.CASH)
        breaks = sum(row.breaks for row in sums)
        self.found(
            "cash entries",
            sum(row.entries for row in sums),
            f"add up to the balances: {breaks:,} do not",
            ok=not breaks,
        )

    def _replay(self, engine: Engine) -> None:
        replays = [check(engine, model) for model in catalogue.load().models]
        differing = sum(replay.differing for replay in replays)
        self.found(
            "replayed",
            sum(replay.rows for replay in replays),
            f"rows recomputed from the log: {differing:,} differ",
            ok=not differing,
        )

    def _compare_oddities(self, engine: Engine, reports: Sequence[ChaosReport]) -> None:
        spoilt = {UUID(event) for report in reports for event, _type in report.bad_amounts}
        dead = queries.dead_events(engine)
        self.found(
            "dead letters",
            len(dead),
            f"bad amounts; {len(spoilt):,} were produced",
            ok=dead == spoilt,
        )
        repeats = queries.number(engine, queries.REPEATS)
        produced = sum(report.counts["repeat"] for report in reports)
        self.found(
            "repeats", repeats, f"recognized; {produced:,} were produced", ok=repeats == produced
        )
        status = read_status(engine, catalogue.load())
        # The workers are stopped for the comparison, so that no process reads the partitions.
        halted = [partition for partition in status.partitions if partition.state == "ERR"]
        broken = [model for model in status.projectors if model.state == "broken"]
        wrong = len(halted) + len(broken)
        self.found("halted", wrong, "partitions and read models", ok=not wrong)
