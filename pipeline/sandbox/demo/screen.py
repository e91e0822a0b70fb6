"""The output of the demo: sections, aligned numbers, progress; plain lines if not on a terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from pipeline.printable import printable

WIDTH_MAX = 92
PLAIN_LINE_S = 2.0
"""How often progress is printed if no bar can be drawn."""
_INDENT = "   "
_NAME_WIDTH = 22
_NUMBER_WIDTH = 9
_WORDS_WIDTH = 36

Cell = str | int | Decimal | None


class Screen:
    """Writes to stdout: with colours and bars on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        width = min(WIDTH_MAX, Console().width) if self.is_terminal else WIDTH_MAX
        self._console = Console(
            file=sys.stdout, width=width, highlight=False, no_color=not self.is_terminal or None
        )

    def title(self, text: str, subtitle: str) -> None:
        """The first two lines."""
        self._line(Text(text, style="bold"))
        self._line(Text(subtitle, style="dim"))

    def section(self, text: str) -> None:
        """A heading, with room above it."""
        self._line(Text())
        self._line(Text(text, style="bold cyan"))

    def caption(self, text: str) -> None:
        """What the next table shows."""
        self._line(Text())
        self._line(Text(_INDENT + text, style="bold"))

    def say(self, text: str, *, style: str = "") -> None:
        """A sentence, wrapped and indented."""
        for line in Text(text, style=style).wrap(self._console, self._console.width - len(_INDENT)):
            self._line(Text(_INDENT).append_text(line))

    def copyable(self, text: str) -> None:
        """A line to copy, never wrapped or cut by us."""
        self._console.print(Text(_INDENT + text), soft_wrap=True)

    def fact(self, name: str, value: Cell, remark: str = "", *, ok: bool | None = None) -> None:
        """A name, its value, and whether the value is right."""
        line = Text(_INDENT + name.ljust(_NAME_WIDTH))
        is_text = isinstance(value, str)
        line.append(
            _cell(value).ljust(_WORDS_WIDTH) if is_text else _cell(value).rjust(_NUMBER_WIDTH)
        )
        if ok is not None:
            line.append("   ")
            line.append_text(Text("ok", style="green") if ok else Text("WRONG", style="bold red"))
        if remark:
            line.append(f"   {printable(remark)}", style="dim" if ok is not False else "")
        self._line(line)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Numbers to the right, words to the left, folded where they are too long."""
        body = [list(row) for row in rows]
        grid = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
        for column, header in enumerate(headers):
            numeric = any(isinstance(row[column], int | Decimal) for row in body)
            grid.add_column(header, justify="right" if numeric else "left", no_wrap=numeric)
        for row in body:
            grid.add_row(*(Text(_cell(cell)) for cell in row))
        with self._console.capture() as captured:
            self._console.print(grid, width=self._console.width - len(_INDENT))
        for line in captured.get().splitlines():
            self._line(Text.from_ansi(_INDENT + line))

    def verdict(self, text: str, *, ok: bool) -> None:
        """The last word."""
        self._line(Text())
        self._line(Text(_INDENT + text, style="bold green" if ok else "bold red"))

    @contextmanager
    def progress(self, total: int) -> Iterator["Bars"]:
        """Several numbers that grow towards one total, each under its name."""
        bars = Bars(self._console if self.is_terminal else None, total, self._line)
        try:
            yield bars
        finally:
            bars.stop()

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """An animation on a terminal during a wait; nothing elsewhere."""
        if not self.is_terminal:
            yield
            return
        with self._console.status(Text(text, style="dim"), spinner="dots"):
            yield

    def _line(self, text: Text) -> None:
        text.rstrip()
        self._console.print(text, soft_wrap=True)
        self._console.file.flush()


class Bars:
    """A bar per number on a terminal; a line for all numbers every few seconds elsewhere."""

    def __init__(self, console: Console | None, total: int, line: Callable[[Text], None]) -> None:
        self._started_at = self._printed_at = time.monotonic()
        self._total = total
        self._line = line
        self._tasks: dict[str, TaskID] = {}
        self._bars: Progress | None = None
        if console is not None:
            self._bars = Progress(
                TextColumn(_INDENT + "{task.description}", markup=False),
                BarColumn(30),
                TextColumn("{task.fields[count]}", markup=False, justify="right"),
                TextColumn("{task.fields[rate]}", markup=False, justify="right", style="dim"),
                console=console,
                transient=True,
            )
            self._bars.start()

    def show(self, counts: Mapping[str, int]) -> None:
        """Show the current numbers."""
        seconds = max(time.monotonic() - self._started_at, 0.001)
        if self._bars is None:
            if time.monotonic() - self._printed_at >= PLAIN_LINE_S:
                self._printed_at = time.monotonic()
                line = "   ".join(f"{name} {done:>7,}" for name, done in counts.items())
                self._line(Text(f"{_INDENT}{seconds:3.0f} s   {line}"))
            return
        for name, done in counts.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=1, count="", rate="")
            self._bars.update(
                self._tasks[name],
                completed=done,
                total=max(self._total, done),
                count=f"{done:,}",
                rate=f"{done / seconds:,.0f}/s",
            )

    def stop(self) -> None:
        """Remove the bars from the screen; the lines stay."""
        if self._bars is not None:
            self._bars.stop()


def _cell(value: Cell) -> str:
    match value:
        case None:
            return "-"
        case str():
            return printable(value)
        case Decimal():
            return f"{value:,f}"
        case int():
            return f"{value:,}"
