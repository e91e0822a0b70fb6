"""The table of log events in docs/operations.md, written from the registry.

``python -m tests.log_events_page`` writes it, after an event has changed.
"""

from pathlib import Path

from pipeline.log_events import EVENTS, LogEvent

PAGE = Path(__file__).parent.parent / "docs" / "operations.md"
BEGIN = "<!-- log events: written by python -m tests.log_events_page -->\n"
END = "<!-- end of log events -->\n"


def table() -> str:
    """The table: every event that is logged without PIPELINE_LOG_LEVEL=debug."""
    rows = [row(event) for event in EVENTS.values() if event.levels != ("debug",)]
    return "\n".join(["| event | level | meaning | to do |", "|---|---|---|---|", *rows, ""])


def row(event: LogEvent) -> str:
    """One event."""
    levels = "any" if len(event.levels) == 5 else ", ".join(event.levels)
    return f"| `{event.name}` | {levels} | {event.meaning} | {event.action or 'nothing'} |"


def with_table(page: str) -> str:
    """The page with the table as it must be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
