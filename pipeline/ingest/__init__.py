"""Loop 1: from Kafka into the log, exactly once."""

from pipeline.ingest.loop import Progress
from pipeline.ingest.repeats import RepeatWindow
from pipeline.ingest.service import Ingest, tuned_interpreter

__all__ = ["Ingest", "Progress", "RepeatWindow", "tuned_interpreter"]
