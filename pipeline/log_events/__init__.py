"""What the program logs, and how: the registry of events, and the form of their lines."""

from pipeline.log_events.output import configure, exception_text, set_worker
from pipeline.log_events.registry import EVENTS, LogEvent

__all__ = ["EVENTS", "LogEvent", "configure", "exception_text", "set_worker"]
