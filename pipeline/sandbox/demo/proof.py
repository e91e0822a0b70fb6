"""The checks that the demo ends with: every claim compared with what somebody else knows."""

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
    """What was checked so far, in the order in which it was."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    @property
    def failed(self) -> Sequence[Check]:
        """The checks that did not hold."""
        return [one for one in self.checks if not one.ok]

    @property
    def holds(self) -> bool:
        """Whether every check has held."""
        return not self.failed

    def found(self, name: str, value: int, remark: str, *, ok: bool) -> None:
        """Note a check."""
        self.checks.append(Check(name, value, remark, ok))

    def compare(self, engine: Engine, ledger: Ledger, simulations: Sequence[Simulation]) -> None:
        """Compare all there is, when everything produced is in the read models."""
        books = [one.books for one in simulations]
        self._compare_log(engine, ledger)
        self._compare_with_books(engine, books)
        self._replay(engine)
        self._compare_oddities(engine, [one.report for one in simulations])

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
            f"sum up to the balances: {breaks:,} do not",
            ok=not breaks,
        )

    def _replay(self, engine: Engine) -> None:
        replays = [check(engine, one) for one in catalogue.load().models]
        differing = sum(one.differing for one in replays)
        self.found(
            "replayed",
            sum(one.rows for one in replays),
            f"rows made anew from the log: {differing:,} differ",
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
        seen = read_status(engine, catalogue.load())
        # The service was stopped for the proof, so that its partitions have no reader is right.
        halted = [one for one in seen.partitions if one.state == "ERR"]
        broken = [one for one in seen.projectors if one.state == "broken"]
        wrong = len(halted) + len(broken)
        self.found("halted", wrong, "partitions and read models", ok=not wrong)
