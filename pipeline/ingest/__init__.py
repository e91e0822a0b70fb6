"""Loop 1: from Kafka into the log, exactly once."""

from pipeline.ingest.loop import Progress
from pipeline.ingest.service import Ingest, tuned_interpreter

__all__ = ["Ingest", "Progress", "tuned_interpreter"]
