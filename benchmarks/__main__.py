"""Measure, and print one report."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import ingest, keying, latency, memory, projection, recovery, rivals, scale, workers
from benchmarks.report import PLOTS, Section, heading, this_run, with_new
from benchmarks.stage import Stage, set_up
from pipeline import log_events

RESULTS = Path(__file__).parent / "results.md"
PARTS = (
    "ingest",
    "rivals",
    "projection",
    "workers",
    "keying",
    "latency",
    "recovery",
    "scale",
    "memory",
)


def main() -> int:
    """Run the requested measurements.

    Returns:
        0, whatever the measurements are.
    """
    arguments = _arguments()
    log_events.configure(level="error")
    with set_up(arguments.postgres) as stage:
        head = heading(stage.postgres_version(), stage.kafka_version())
        print(head, flush=True)
        sections = []
        run = this_run()
        for section in _sections(stage, arguments):
            sections.append(replace(section, run=run))
            print(sections[-1], flush=True)
            run = this_run()
    if arguments.write:
        from benchmarks.drawing import draw  # needs packages that only `make bench` installs

        before = RESULTS.read_text() if RESULTS.exists() else ""
        RESULTS.write_text(with_new(before, head, sections))
        draw((plot for section in sections for plot in section.plots), RESULTS.parent / PLOTS)
    return 0


def _sections(stage: Stage, arguments: argparse.Namespace) -> Iterator[Section]:
    rows, backlog = (60_000, 60_000) if arguments.quick else (300_000, 1_000_000)
    pairs = arguments.pairs
    if "ingest" in arguments.only:
        yield ingest.measure(stage, rows, pairs)
    if "rivals" in arguments.only:
        yield rivals.measure(stage, rows, pairs)
        yield rivals.measure_rebuild(stage, rows // 15, pairs)
    if "projection" in arguments.only:
        yield projection.measure(stage, rows, pairs)
    if "workers" in arguments.only:
        yield workers.measure(stage, pairs, quick=arguments.quick)
    if "keying" in arguments.only:
        yield keying.measure(stage, pairs, quick=arguments.quick)
    if "latency" in arguments.only:
        yield latency.measure(stage, quick=arguments.quick)
    if "recovery" in arguments.only:
        yield recovery.measure(stage, 1 if arguments.quick else pairs)
    if "scale" in arguments.only:
        yield scale.measure(stage, quick=arguments.quick)
    if "memory" in arguments.only:
        yield memory.measure(stage, backlog, quick=arguments.quick)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small numbers, and no rivals unless requested: two minutes",
    )
    parser.add_argument("--pairs", type=int, default=3, help="how often each side runs (3)")
    parser.add_argument("--postgres", type=int, default=18, help="major version: 15, 18 (18)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some parts only")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"also into {RESULTS.name}, with plots, in place of the older sections of these parts",
    )
    arguments = parser.parse_args()
    # Rivals are installed on first use, one of them by compiling for half an hour.
    arguments.only = arguments.only or [
        part for part in PARTS if not (arguments.quick and part == "rivals")
    ]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
