"""The report's plots as SVG files; drawn by matplotlib, which nothing else needs."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.report import Bars, Lines, Plot

OURS, THEIRS = "#1f6feb", "#8b949e"


def draw(plots: Iterable[Plot], folder: Path) -> None:
    """Write a file for each plot; two runs with the same figures give the same files."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 9}
    folder.mkdir(exist_ok=True)
    for plot in plots:
        figure = _bars(plot) if isinstance(plot, Bars) else _lines(plot)
        figure.savefig(folder / plot.file, metadata={"Date": None})


def _bars(plot: Bars) -> Figure:
    figure = Figure(figsize=(7, 0.8 + 0.32 * len(plot.values)), layout="constrained")
    axes = figure.add_subplot()
    colours = [_colour(label) for label in plot.values]
    bars = axes.barh(list(plot.values), list(plot.values.values()), color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=plot.title, xlabel=plot.unit)
    return figure


def _lines(plot: Lines) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(plot.series.items()):
        style = "-" if number % 2 == 0 else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label, color=_colour(label))
    if plot.logarithmic:
        axes.set(xscale="log", yscale="log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=plot.title, xlabel=plot.across, ylabel=plot.up)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _colour(label: str) -> str:
    return OURS if label.startswith("pipeline") else THEIRS
