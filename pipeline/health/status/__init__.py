"""How things stand: lag, freshness, owners, problems. SQL only, so Kafka need not answer.

Shared by `pipeline status` and the demonstration.
"""

from pipeline.health.status.queries import look
from pipeline.health.status.report import PartitionStatus, ProjectorStatus, Recent, Status, Trouble

__all__ = ["PartitionStatus", "ProjectorStatus", "Recent", "Status", "Trouble", "look"]
