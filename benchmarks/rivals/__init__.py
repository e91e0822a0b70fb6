"""The alternatives that users would choose, each in an environment of its own.

A package here is one rival: it declares ``rival``, and holds what the rival runs and the pins that
install it. All get the same records on the same servers, ours included, in turn; each with the best
settings that we found, and with a table that asks less of PostgreSQL than ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from benchmarks import ingest, projection
from benchmarks.filling import fill, one_row
from benchmarks.report import Pairs, Run, Section, bars, table
from benchmarks.rivals import debezium, emmett, eventsourcing, faucet, quix, redpanda_connect
from benchmarks.rivals.rival import CannotRunError, Reader, Rival
from benchmarks.stage import Stage

READERS = (quix.rival, debezium.rival, faucet.rival, redpanda_connect.rival)
PROJECTING = (eventsourcing.rival, emmett.rival)

_Rival = TypeVar("_Rival", bound=Rival)


def measure(stage: Stage, rows: int, pairs: int, rivals: Sequence[Reader] = READERS) -> Section:
    """Let ours and the rivals read the same topics, of events of several sizes, in turn.

    Args:
        stage: The servers.
        rows: How many events a topic holds.
        pairs: How often each runs.
        rivals: The rivals to measure.
    """
    missing = absent(rivals)
    present = [rival for rival in rivals if rival not in missing]
    measured = []
    for size in ingest.SIZES:
        measured += _of_size(stage, size, ingest.rows_of(size, rows), pairs, present, missing)
    large = ingest.SIZES[-1]
    return Section(
        "Ingest: what users would pick instead",
        f"{rows:,} simulated events per topic, {ingest.rows_of(large, rows):,} of those of "
        f"{large:,} bytes, in 6 partitions. Rate: rows per second from the "
        "beginning of the first transaction to that of the last, by PostgreSQL's clock; then from "
        "the start of the command until all rows are there. CPU is that of the whole command.",
        [*table(measured), "", *_described(rivals, missing)],
        [bars("rivals-ingest", "Ingest, rows per second", measured)],
    )


def _of_size(
    stage: Stage,
    size: int,
    rows: int,
    pairs: int,
    rivals: Iterable[Reader],
    missing: dict[Reader, str],
) -> list[Pairs]:
    """Adds the rivals that failed to ``missing``, with the reason."""
    topic = stage.load(rows, size=size)
    stage.warm_up(topic)
    ours: list[Run] = []
    measured = {
        rival: Pairs(
            f"pipeline ingest, {size:,} bytes / {rival.name}, {size:,} bytes",
            target=rival.wanted,
            ours=ours,
        )
        for rival in rivals
    }
    for _ in range(pairs):
        with stage.database() as database:
            ours.append(fill(stage, database, rows, partial(stage.ingest, topic, database)))
        for rival, pair in list(measured.items()):
            try:
                pair.theirs.append(rival.run(stage, topic, rows))
            except RuntimeError as failed:
                last_line = str(failed).splitlines()[-1]
                missing[rival] = f"it failed with events of {size:,} bytes: {last_line}"
                del measured[rival]
    return list(measured.values())


def measure_rebuild(stage: Stage, events: int, pairs: int) -> Section:
    """Let ours and the rivals build ``orders`` from the same log, in turn.

    Args:
        stage: The servers.
        events: How many events of orders the log holds, and no others; several times as many as a
            rival takes in one transaction, which is what its progress shows.
        pairs: How often each runs.
    """
    missing = absent(PROJECTING)
    ours: list[Run] = []
    measured = {
        rival: Pairs(f"pipeline rebuild / {rival.name}", target=rival.wanted, ours=ours)
        for rival in PROJECTING
        if rival not in missing
    }
    with projection.log_of_orders(stage, events) as (database, engine):
        for _ in range(pairs):
            ours.append(projection.timed_rebuild(stage, engine, events))
            for rival, pair in measured.items():
                pair.theirs.append(rival.run(database, events))
                assert one_row(database, projection.DIFFERING) == (0,)
    return Section(
        "Rebuild of `orders`: what users would pick instead",
        f"A log of {events:,} events of orders. Rate of a rival: from the first event that "
        "PostgreSQL shows as handled to the last one; then from the start of the command. All "
        "leave the same rows, to the last column.",
        [*table(list(measured.values())), "", *_described(PROJECTING, missing)],
    )


def absent(rivals: Iterable[_Rival]) -> dict[_Rival, str]:
    """Install the rivals; the reason for each rival that cannot be installed."""
    why = {}
    for rival in rivals:
        try:
            rival.install()
        except CannotRunError as reason:
            why[rival] = str(reason)
    return why


def _described(rivals: Iterable[_Rival], missing: Mapping[_Rival, str]) -> list[str]:
    lines = ["| | version | settings | does not promise |", "|---|---|---|---|"]
    for rival in rivals:
        how = f"**not measured**: {missing[rival]}" if rival in missing else rival.settings
        lines.append(f"| {rival.name} | {rival.version} | {how} | {rival.lacks} |")
    return lines
