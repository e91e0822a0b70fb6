"""The results of a benchmark: pairs of measurements, and one report in Markdown."""

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
"""The folder of the plots, beside the report."""


@dataclass(frozen=True)
class Run:
    """One side of a pair.

    Attributes:
        rate: Rows or events per second.
        client_us: CPU of the client's process, microseconds per row, if measured.
        server_us: CPU of PostgreSQL's processes, microseconds per row, if it can be measured.
        whole_rate: Rows per second from the start of the command to its end, if there is a command.
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
        target: The minimum ratio that is wanted.
        ours: May be shared with another pair, if several are compared with the same runs.
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
        ours, theirs = self.name.split(" / ")
        sides = [(ours, self.ours)] if with_ours else []
        return [
            *(
                f"| {name} | {_rates(runs)} | {_cpu(runs)} |"
                for name, runs in [*sides, (theirs, self.theirs)]
            ),
            f"| **{ours} / {theirs}** (wanted: {self.target:g} or more) "
            f"| {_ratio_text(self.ratios)} | |",
        ]


def _ratio_text(ratios: Sequence[float]) -> str:
    all_of_them = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"**{statistics.median(ratios):.2f}** of {all_of_them}"


def _rates(runs: Sequence[Run]) -> str:
    figures = _spread([run.rate for run in runs])
    whole = [run.whole_rate for run in runs if run.whole_rate is not None]
    return f"{figures}; with start and end {_spread(whole)}" if whole else figures


def _spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.0f}/s ({min(rates):,.0f} to {max(rates):,.0f})"


def _cpu(runs: Sequence[Run]) -> str:
    figures = []
    for name, taken in (
        ("client", [run.client_us for run in runs if run.client_us is not None]),
        ("PostgreSQL", [run.server_us for run in runs if run.server_us is not None]),
    ):
        if taken:
            figures.append(f"{name} {statistics.median(taken):.1f} µs")
    return ", ".join(figures)


@dataclass(frozen=True)
class Bars:
    """A plot of the rates of several ways.

    Attributes:
        name: The name of its file.
        title: The title of the plot.
        unit: The unit of the values.
        values: By label, from top to bottom; our own labels begin with ``pipeline``.
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
    """A plot of one quantity by another.

    Attributes:
        name: The name of its file.
        title: The title of the plot.
        across: The label of the x axis.
        up: The label of the y axis.
        series: By label, points from left to right; our own labels begin with ``pipeline``.
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
        text: The method.
        lines: The figures, as Markdown.
        plots: Some figures as plots.
        run: The time and the command of the measurement, see ``this_run``.
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
    """The median rates of both sides of pairs; shared runs appear once."""
    values = {}
    for pair in pairs:
        ours, theirs = pair.name.split(" / ")
        values[ours] = statistics.median(run.rate for run in pair.ours)
        values[theirs] = statistics.median(run.rate for run in pair.theirs)
    return Bars(name, title, unit, dict(sorted(values.items(), key=lambda value: -value[1])))


def table(pairs: Sequence[Pairs]) -> list[str]:
    """Pairs as one Markdown table; shared runs of ours appear once."""
    lines = ["| | median (spread) | CPU per row |", "|---|---|---|"]
    shown: list[int] = []
    for pair in pairs:
        lines += pair.lines(with_ours=id(pair.ours) not in shown)
        shown.append(id(pair.ours))
    return lines


Ways = Mapping[str, Sequence[Run]]
"""Several ways of doing the same, by name, measured equally often, in turn."""


def ways_table(ways: Ways) -> list[str]:
    """Ways as one Markdown table, each with its ratio to the first, run by run."""
    first, *_ = ways
    lines = [f"| | median (spread) | CPU per row | / {first} |", "|---|---|---|---|"]
    for name, runs in ways.items():
        ratios = [run.rate / base.rate for run, base in zip(runs, ways[first], strict=True)]
        ratio = "" if name == first else _ratio_text(ratios)
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
    """A report with new sections instead of those with the same titles, or after the others.

    Sections below another heading, of another machine or other versions, are left out.
    """
    old_heading, *old = re.split("^(?=## )", report, flags=re.MULTILINE)
    is_same_heading = old_heading.strip() == heading.strip()
    by_title = {section.splitlines()[0]: section for section in old if is_same_heading}
    by_title |= {f"## {section.title}": str(section) for section in sections}
    return "\n".join([heading, *(section.rstrip() + "\n" for section in by_title.values())])


def _processor() -> str:
    if CPUINFO.exists():
        found = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
