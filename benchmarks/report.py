"""What a benchmark says: pairs of measurements, and one report in Markdown."""

import os
import platform
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import confluent_kafka

CPUINFO = Path("/proc/cpuinfo")
PLOTS = "plots"
"""The folder of the pictures, beside the report."""


@dataclass(frozen=True)
class Run:
    """One side of a pair.

    Attributes:
        rate: Rows or events a second.
        client_us: CPU of the client's process, microseconds a row, if it was taken.
        server_us: CPU of PostgreSQL's processes, microseconds a row, if it can be told.
        whole_rate: Rows a second from the start of the command to its end, if it is one.
    """

    rate: float
    client_us: float | None = None
    server_us: float | None = None
    whole_rate: float | None = None


@dataclass
class Pairs:
    """Two ways of doing the same, measured in turn.

    Attributes:
        name: What is compared, ours first, e.g. ``pipeline ingest / bare COPY``.
        target: The least ratio wanted.
        ours: May be the list of another pair too, where several are compared with the same runs.
    """

    name: str
    target: float
    ours: list[Run] = field(default_factory=list)
    theirs: list[Run] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, pair by pair."""
        return [
            mine.rate / others.rate for mine, others in zip(self.ours, self.theirs, strict=True)
        ]

    def lines(self, *, with_ours: bool = True) -> list[str]:
        """A table row for each side and one for the ratio."""
        one, other = self.name.split(" / ")
        sides = [(one, self.ours)] if with_ours else []
        return [
            *(
                f"| {name} | {_rates(runs)} | {_cpu(runs)} |"
                for name, runs in [*sides, (other, self.theirs)]
            ),
            f"| **{one} / {other}** (wanted: {self.target:g} or more) | {_told(self.ratios)} | |",
        ]


def _told(ratios: Sequence[float]) -> str:
    all_of_them = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"**{statistics.median(ratios):.2f}** of {all_of_them}"


def _rates(runs: Sequence[Run]) -> str:
    said = _spread([run.rate for run in runs])
    whole = [run.whole_rate for run in runs if run.whole_rate is not None]
    return f"{said}; with start and end {_spread(whole)}" if whole else said


def _spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.0f}/s ({min(rates):,.0f} to {max(rates):,.0f})"


def _cpu(runs: Sequence[Run]) -> str:
    said = []
    for name, taken in (
        ("client", [run.client_us for run in runs if run.client_us is not None]),
        ("PostgreSQL", [run.server_us for run in runs if run.server_us is not None]),
    ):
        if taken:
            said.append(f"{name} {statistics.median(taken):.1f} µs")
    return ", ".join(said)


@dataclass(frozen=True)
class Bars:
    """A plot of how much each of several ways does.

    Attributes:
        name: Of its file.
        title: What is shown.
        unit: Of the values.
        values: By label, from top to bottom; what is ours begins with ``pipeline``.
    """

    name: str
    title: str
    unit: str
    values: Mapping[str, float]

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.name}.svg"


@dataclass(frozen=True)
class Lines:
    """A plot of how something goes with something else.

    Attributes:
        name: Of its file.
        title: What is shown.
        across: What goes from left to right.
        up: What goes upwards.
        series: By label, points from left to right; what is ours begins with ``pipeline``.
        logarithmic: Both axes by powers of ten; else upwards from zero.
    """

    name: str
    title: str
    across: str
    up: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool = False

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.name}.svg"


Plot = Bars | Lines


@dataclass(frozen=True)
class Section:
    """One part of the report.

    Attributes:
        title: Its heading.
        text: What was done, and how.
        lines: The figures, as Markdown.
        plots: Some of them as pictures.
        run: When it was measured and by which command, see ``this_run``.
    """

    title: str
    text: str
    lines: Sequence[str]
    plots: Sequence[Plot] = ()
    run: str = ""

    def __str__(self) -> str:
        """The section in Markdown."""
        pictures = [f"![{plot.title}]({PLOTS}/{plot.file})" for plot in self.plots]
        parts = [f"## {self.title}", "", self.text, "", self.run, "", *self.lines, ""]
        return "\n".join([*parts, *pictures, ""] if pictures else parts)


def bars(name: str, title: str, pairs: Sequence[Pairs], unit: str = "rows/s") -> Bars:
    """The median rates of both sides of pairs; runs that several share are there once."""
    values = {}
    for pair in pairs:
        one, other = pair.name.split(" / ")
        values[one] = statistics.median(run.rate for run in pair.ours)
        values[other] = statistics.median(run.rate for run in pair.theirs)
    return Bars(name, title, unit, dict(sorted(values.items(), key=lambda it: -it[1])))


def table(pairs: Sequence[Pairs]) -> list[str]:
    """Pairs as one Markdown table; runs of ours that several share stand there once."""
    lines = ["| | median (spread) | CPU a row |", "|---|---|---|"]
    shown: list[int] = []
    for pair in pairs:
        lines += pair.lines(with_ours=id(pair.ours) not in shown)
        shown.append(id(pair.ours))
    return lines


Ways = Mapping[str, Sequence[Run]]
"""Several ways of doing the same, by name, each measured as often as the first, by turns."""


def ways_table(ways: Ways) -> list[str]:
    """Ways as one Markdown table, each with its ratio to the first, turn by turn."""
    first, *_ = ways
    lines = [f"| | median (spread) | CPU a row | / {first} |", "|---|---|---|---|"]
    for name, runs in ways.items():
        ratios = [run.rate / base.rate for run, base in zip(runs, ways[first], strict=True)]
        ratio = "" if name == first else _told(ratios)
        lines.append(f"| {name} | {_rates(runs)} | {_cpu(runs)} | {ratio} |")
    return lines


def ways_bars(name: str, title: str, ways: Ways, unit: str = "rows/s") -> Bars:
    """The median rates of ways, in their order."""
    values = {way: statistics.median(run.rate for run in runs) for way, runs in ways.items()}
    return Bars(name, title, unit, values)


def heading(postgres: str, kafka: str) -> str:
    """Machine and versions."""
    facts = {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "PostgreSQL": postgres,
        "Apache Kafka": kafka,
        "clients": f"Python {platform.python_version()}, psycopg {version('psycopg')}, "
        f"librdkafka {confluent_kafka.libversion()[0]}, orjson {version('orjson')}",
    }
    lines = [f"- {name}: {value.strip()}" for name, value in facts.items()]
    return "\n".join(["# Benchmarks", "", *lines, ""])


def this_run() -> str:
    """The time, the command and the load of the machine, before anything is measured."""
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    return f"Begun {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by `{command}`; load before: {load}."


def with_new(report: str, heading: str, sections: Iterable[Section]) -> str:
    """A report with sections in place of those with their titles, or behind the others.

    What stands below another heading, so of another machine or other versions, is left out.
    """
    stands_below, *old = re.split("^(?=## )", report, flags=re.MULTILINE)
    by_title = {one.splitlines()[0]: one for one in old if stands_below.strip() == heading.strip()}
    by_title |= {f"## {one.title}": str(one) for one in sections}
    return "\n".join([heading, *(one.rstrip() + "\n" for one in by_title.values())])


def _processor() -> str:
    if CPUINFO.exists():
        found = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
