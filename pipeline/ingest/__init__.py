"""Loop 1: from Kafka into the log, exactly once."""

from pipeline.ingest.service import Ingest, Progress

__all__ = ["Ingest", "Progress"]
