"""Loop 1: from Kafka into the log, exactly once."""

from pipeline.ingest.loop import Ingest, Progress

__all__ = ["Ingest", "Progress"]
