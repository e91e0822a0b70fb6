"""What people and programs read: tables and JSON on stdout, messages and progress on stderr.

Text from outside is printed without control characters and is never interpreted as markup.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer

from pipeline.durations import duration
from pipeline.printable import printable, printable_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

PLAIN_LINE_S = 5.0
"""How often progress is printed if no bar can be drawn."""
NOTHING = "-"
"""The text of a cell that has no value."""
_UNBOUNDED_COLUMNS = 100_000


def say(text: str) -> None:
    """A message for a person, on stderr. It is lost if stderr is closed."""
    with suppress(OSError, ValueError):
        for line in text.split("\n"):
            typer.echo(printable(line), err=True)


def emit(document: object) -> None:
    """One JSON document on stdout, on one line, without characters that control a terminal."""
    import orjson

    try:
        text = orjson.dumps(document, default=_plain)
    except orjson.JSONEncodeError:
        # It refuses whole numbers of more than 64 bits, a sum of offsets for example.
        text = orjson.dumps(_with_large_numbers(document), default=_plain)
    sys.stdout.write(printable_json(text.decode()) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _with_large_numbers(value: object) -> object:
    import orjson

    if isinstance(value, int) and value.bit_length() > 63:
        return orjson.Fragment(str(value))
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return {name: _with_large_numbers(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: _with_large_numbers(inner) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return [_with_large_numbers(inner) for inner in value]  # type: ignore[attr-defined]
    return value


@dataclass(frozen=True)
class Mark:
    """A highlighted cell."""

    text: str
    style: str


Cell = str | int | float | datetime | timedelta | Mark | None


def table(headers: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A table on stdout, if it has rows; numbers to the right, and nothing cut off in a file."""
    from rich.table import Table
    from rich.text import Text

    body = [[_text(cell) for cell in row] for row in rows]
    if not body:
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    numeric = [_are_numbers([row[column].plain for row in body]) for column in range(len(headers))]
    for header, right in zip(headers, numeric, strict=True):
        grid.add_column(Text(header), justify="right" if right else "left", overflow="fold")
    for row in body:
        grid.add_row(*row)
    console = out()
    with console.capture() as captured:
        console.print(grid)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def out() -> "Console":
    """stdout: as wide as the terminal, without a limit for programs."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(file=sys.stdout, highlight=False)
    return Console(file=sys.stdout, highlight=False, width=_UNBOUNDED_COLUMNS, no_color=True)


def _text(cell: Cell) -> "Text":
    from rich.text import Text

    match cell:
        case None:
            return Text(NOTHING)
        case Mark(text, style):
            return Text(printable(text), style=style)
        case datetime():
            return Text(moment(cell))
        case timedelta():
            return Text(duration(cell.total_seconds()))
        case float():
            return Text(f"{cell:,.1f}")
        case int():
            return Text(f"{cell:,}")
        case str():
            return Text(printable(cell))


def _are_numbers(column: Sequence[str]) -> bool:
    values = [text.replace(",", "").replace(".", "", 1) for text in column if text != NOTHING]
    return bool(values) and all(value.lstrip("-").isdigit() for value in values)


def moment(time_: datetime, *, milliseconds: bool = False) -> str:
    """A time, in UTC, to the second or to the millisecond."""
    from pipeline.db.stored_times import FarTime

    if isinstance(time_, FarTime):
        return str(time_)
    time_ = time_.astimezone(UTC)
    if milliseconds:
        return time_.isoformat(" ", "milliseconds").removesuffix("+00:00")
    return time_.isoformat(" ", "seconds").replace("+00:00", "Z")


def age(of: datetime | None, now: datetime) -> str:
    """How long ago a time was, for people: ``12 s ago``."""
    if of is None:
        return "never"
    length = now - of
    if length == timedelta.max or length == timedelta.min:
        return str(of)
    if length < -timedelta(seconds=1):
        return f"in {duration(-length.total_seconds())}"
    return f"{duration(max(0.0, length.total_seconds()))} ago"


class Gauge:
    """Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere.

    Args:
        what: What is being done, e.g. ``ingesting``.
        total: How much there is to do, if known at the start.
        unit: What is counted.
        plain: Print plain lines elsewhere; False if the log reports progress.
        bar: Draw a bar on a terminal; False if several processes share it.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None = None,
        unit: str = "events",
        plain: bool = True,
        bar: bool = True,
    ) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._plain = plain
        self._done = 0
        self._has_printed = False
        self._started_at = self._printed_at = time.monotonic()
        self._bar: Progress | None = _progress_bar() if bar and sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(printable(what), total=total, rate="")

    def __enter__(self) -> Self:
        """Start to draw."""
        if self._bar:
            with suppress(OSError):
                self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _t: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen."""
        if self._bar:
            with suppress(OSError):  # the terminal is gone
                self._bar.stop()
        elif self._has_printed and kind is None:
            self._print_line()

    def show(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """Show how much is done; fast enough to be called often."""
        self._done = done
        self._total = self._total if total is None else total
        self._what = self._what if what is None else what
        if self._bar:
            with suppress(OSError):
                self._bar.update(
                    self._task,
                    description=printable(self._what),
                    completed=done,
                    total=self._total,
                    rate=f"{self._rate:,.0f} {self._unit}/s",
                )
        elif self._plain and time.monotonic() - self._printed_at >= PLAIN_LINE_S:
            self._print_line()

    @property
    def _rate(self) -> float:
        return self._done / max(time.monotonic() - self._started_at, 0.001)

    def _print_line(self) -> None:
        self._printed_at, self._has_printed = time.monotonic(), True
        of = f" of {self._total:,}" if self._total is not None else ""
        say(f"{self._what}: {self._done:,}{of} {self._unit}, {self._rate:,.0f}/s")


def _progress_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
